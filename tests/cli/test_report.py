"""`lmt report`: one file, of the runs that were meant, in its place whole or not at all."""

from __future__ import annotations

import os

import pytest
from planted import plant

from lm_telemetry.cli import main
from lm_telemetry.exporters.report.page import is_page
from lm_telemetry.store import Store


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out.html"


@pytest.fixture
def later(store):
    """A run after `first`, and whose name comes before it."""
    rows = [{"step": s, "loss": 3.0 / s, "tokens": 1} for s in range(1000, 1030)]
    plant(store, "steps", rows, run_id="a-later")
    return "a-later"


def test_a_run_is_reported(lmt, target):
    code, out, err = lmt("report", "first", "-o", str(target))
    assert (code, err) == (0, "")
    assert out.startswith(f"{target}: ")
    assert out.endswith("kB\n")
    html = target.read_text(encoding="utf-8")
    assert is_page(html)
    assert "<title>first · training report</title>" in html
    assert [path.name for path in target.parent.glob(".*")] == []


def test_without_a_name_it_is_the_latest(lmt, target, later):
    assert lmt("report", "-o", str(target))[0] == 0
    assert f"<title>{later} · " in target.read_text(encoding="utf-8")


def test_several_runs_and_each_once(lmt, target, later):
    assert lmt("report", "first", later, "first", "-o", str(target))[0] == 0
    assert f"<title>first, {later} · " in target.read_text(encoding="utf-8")


def test_the_default_is_report_html_here(lmt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lmt("report")[1].startswith("report.html: ")
    assert is_page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_a_report_is_replaced_and_nothing_else(lmt, target):
    target.write_text("notes of a year")
    code, out, err = lmt("report", "-o", str(target))
    assert (code, out, target.read_text()) == (1, "", "notes of a year")
    assert "--force" in err
    assert lmt("report", "-o", str(target), "--force")[0] == 0
    assert lmt("report", "-o", str(target))[0] == 0


def test_through_a_link_the_file_is_written(lmt, target, tmp_path):
    link = tmp_path / "link.html"
    link.symlink_to(target)
    assert lmt("report", "-o", str(link))[0] == 0
    assert link.is_symlink()
    assert is_page(target.read_text(encoding="utf-8"))


def test_a_failure_leaves_the_old_report(lmt, target, monkeypatch):
    assert lmt("report", "-o", str(target))[0] == 0
    before = target.read_bytes()

    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = lmt("report", "-o", str(target))
    assert (code, out, target.read_bytes()) == (1, "", before)
    assert "No space left" in err
    assert [path.name for path in target.parent.glob(".*")] == []


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["frist"], "near it: first"),
        (["-o", "{tmp}"], "is a directory"),
        (["-o", "{tmp}/none/out.html"], "cannot write"),
    ],
)
def test_what_cannot_be_is_said(lmt, tmp_path, monkeypatch, words, complaint):
    monkeypatch.chdir(tmp_path)
    found, out, err = lmt("report", *(word.format(tmp=tmp_path) for word in words))
    assert (found, out) == (1, "")
    assert complaint in err
    assert "Traceback" not in err


def test_more_runs_than_colours_are_refused(lmt, store, target):
    for i in range(9):
        plant(store, "steps", [{"step": 1, "loss": 1.0}], run_id=f"r{i}")
    code, _, err = lmt("report", *(f"r{i}" for i in range(9)), "-o", str(target))
    assert code == 2
    assert "8" in err
    assert not target.exists()


def test_an_empty_store_has_nothing_to_report(tmp_path, capsys):
    empty = Store.open_for_writing(tmp_path / "empty")
    assert main(["report", "-o", str(tmp_path / "out.html"), "--store", str(empty.path)]) == 1
    assert "no run" in capsys.readouterr().err


# What a directory may be called.
@pytest.mark.parametrize("name", ['"><script>alert(1)<', "\x1b]0;owned\x07", "quote'\"$x"])
def test_hostile_names_are_harmless(lmt, store, target, name, capsys):
    plant(store, "steps", [{"step": s, "loss": float(s), "tokens": 1} for s in range(1, 4)], run_id=name)
    code, out, err = lmt("report", name, "-o", str(target))
    assert (code, err) == (0, "")
    assert [c for c in out if not c.isprintable() and c != "\n"] == []
    html = target.read_text(encoding="utf-8")
    assert html.count("<script") == 2
    assert "\x1b" not in html
    assert lmt("report", name + "q", "-o", str(target))[0] == 1
    capsys.readouterr()
