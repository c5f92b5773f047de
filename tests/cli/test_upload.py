"""`lmt upload`, and what other commands say of a store at an URL; at `memory://`."""

import pytest
from remote_stores import URL, Parts, clear, held

from lm_telemetry.cli import main
from lm_telemetry.lane import Lane
from lm_telemetry.remote import Remote
from lm_telemetry.spool import spool_path
from lm_telemetry.store import Store


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr("lm_telemetry.uploader.FIRST_WAIT_SECONDS", 0.01)
    clear()
    yield
    clear()


@pytest.fixture
def spool(tmp_path):
    """A spool with three parts of a run."""
    store = Store.open_for_writing(spool_path(URL, str(tmp_path)))
    Parts(store).write(3)
    return store


def test_upload_brings_what_was_left(spool, tmp_path, capsys):
    assert main(["upload", str(tmp_path), URL]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("3 files, ")
    assert captured.out.endswith(f"went to {URL}; nothing else is left\n")
    assert captured.err == ""
    assert len(held(Remote(URL))) == 3
    assert main(["upload", str(spool.path), URL]) == 0
    assert "0 files, 0 B" in capsys.readouterr().out


def test_progress_is_for_terminals(spool, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(["upload", str(tmp_path), URL]) == 0
    error = capsys.readouterr().err
    assert "3 files, " in error
    assert "arrived; 0 files, 0 B, wait" in error
    assert error.endswith("\r\x1b[K")


def test_what_another_process_brings_is_told(spool, tmp_path, capsys):
    lane = Lane.take(spool, "r", 0, 0)
    assert main(["upload", str(tmp_path), URL]) == 0
    assert capsys.readouterr().out == "rows of 1 ranks are brought by the processes that write them\n"
    lane.let_go()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", URL], "no spool of memory://bucket/store"),
        ([".", "telemetry-store"], "expected an URL"),
        ([".", "nosuchthing://bucket/store"], "pip install"),
        ([".", "s3://user:secret@bucket/store"], "without a password"),
    ],
)
def test_what_cannot_be_done_is_said(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["upload", *words]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert "secret" not in captured.err


def test_what_does_not_arrive_is_an_error(spool, tmp_path, monkeypatch, capsys):
    def refuse(self, name, file):
        raise PermissionError("Access Denied")

    monkeypatch.setattr("lm_telemetry.remote.Remote.put", refuse)
    assert main(["upload", str(tmp_path), URL, "--patience", "0.1"]) == 1
    captured = capsys.readouterr()
    assert "3 files or more are left" in captured.err
    assert "Access Denied" in captured.err
    assert captured.out == ""


def test_other_commands_of_a_store_at_an_url(spool, tmp_path, capsys):
    assert main(["upload", str(tmp_path), URL]) == 0
    capsys.readouterr()
    assert main(["runs", "--store", URL, "--format", "csv"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("r,")
    assert main(["du", "--store", URL, "--format", "csv"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("r,steps,3,3,3,0,")
    assert main(["verify", "--deep", "--store", URL]) == 0
    assert capsys.readouterr().out == "the store is whole\n"
    assert main(["verify", "--repair", "--store", URL]) == 1
    assert "copy it to a directory" in capsys.readouterr().err
    name = min(held(Remote(URL)))
    Remote(URL).filesystem.rm_file(f"/bucket/store/{name}")
    assert main(["verify", "--store", URL]) == 1
    captured = capsys.readouterr()
    assert f"missing  {name}" in captured.out
    assert "1 findings; each says what to do" in captured.out
