"""`lmt demo`: what a newcomer sees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from stored import rows

from lm_telemetry.cli import main
from lm_telemetry.demo import StandardLibrary
from lm_telemetry.exporters.report.page import is_page


@pytest.mark.slow
def test_the_demo_trains_answers_and_says_where_to_go_on(tmp_path):
    lmt = Path(sys.executable).parent / "lmt"
    command = [lmt, "demo", "--store", "store", "--steps", "12"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "/metrics serves" in done.stdout
    assert "lm_telemetry_steps_loss" in done.stdout
    assert "The loss fell from" in done.stdout
    for view in ("edge_of_stability", "attention_health", "layer_health"):
        assert f"FROM {view}" in done.stdout
    assert "lmt sql" in done.stdout
    assert "12/12" in done.stderr  # the progress bar
    assert len(rows(tmp_path / "store", "steps")) == 12
    report = tmp_path / "report.html"
    assert done.stdout.rstrip().endswith(str(report))
    assert is_page(report.read_text())


def test_a_file_that_is_no_report_is_left_alone_and_nothing_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "report.html").write_text("mine")
    assert main(["demo", "--store", str(tmp_path / "store")]) == 1
    assert "is no report" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "mine"
    assert not (tmp_path / "store").exists()


def test_too_few_steps_are_refused(tmp_path, capsys):
    assert main(["demo", "--steps", "1", "--store", str(tmp_path / "store")]) == 1
    assert "at least 2" in capsys.readouterr().err


def test_the_text_is_pythons_own_library():
    text = StandardLibrary(64)
    assert len(text) > 10_000
    window = text[3]
    assert window["input_ids"].shape == (64,)
