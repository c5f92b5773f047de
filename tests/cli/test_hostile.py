"""What others have named and written must not reach the terminal as they please, nor a query the rest of the disk."""

import json
import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from planted import plant

from lm_telemetry.cli import main, output
from lm_telemetry.inventory import run_ids
from lm_telemetry.store import Store

LMT = [sys.executable, "-c", "import sys; from lm_telemetry.cli import main; sys.exit(main())"]
NAMES = [
    "\x1b]0;owned\x07\x1b[31mred",  # sets the title of a window, turns text red
    "c1\x9b31mred",  # the same in one character
    "left\u202ethgir",  # turns the direction of what follows
    "quote'\"; DROP TABLE steps; --",
    "back\\slash",
    "spa ce",
    "ünï",
]


@pytest.fixture(params=NAMES)
def hostile(request, tmp_path):
    """A store in which a run is named, and an event worded, by somebody who means no good."""
    store = Store.open_for_writing(tmp_path / "store")
    for run_id in (request.param, "z"):
        plant(store, "steps", [{"step": s, "loss": float(s), "tokens": 1} for s in range(1, 4)], run_id=run_id)
    event = {"step": 1, "severity": "error", "kind": "capture_failed", "message": request.param, "fields": "{}"}
    plant(store, "events", [event], run_id=request.param)
    return request.param, str(store.path)


def commands(name):
    return [
        ["runs"],
        ["runs", "--format", "json"],
        ["du"],
        ["du", name, "--format", "json"],
        ["du", f"{name}q"],
        ["diff", name, "z"],
        ["diff", "z", name, "--format", "json"],
        ["diff", "z", f"{name}q"],
        ["fit", "loss", name],
        ["fit", "loss", f"{name}q"],
        ["describe", "steps"],
        ["sql", "FROM events"],
        ["sql", f'SELECT 1 AS "{name.replace(chr(34), "")}"'],
        ["sql", f"SELECT {name}"],
        ["compact", "--grace", "0"],
        ["verify", "--deep"],
    ]


def test_no_control_character_is_printed(hostile, capsys):
    name, store = hostile
    for words in commands(name):
        code = main([*words, "--store", store])
        captured = capsys.readouterr()
        unsafe = [c for c in captured.out + captured.err if not c.isprintable() and c != "\n"]
        assert unsafe == [], words
        expected = {"sql": (0, 2), "du": (0, 1), "diff": (0, 1), "fit": (1, 2)}.get(words[0], (0,))
        assert code in expected, (words, captured.err)
        assert "Traceback" not in captured.err


def test_json_means_what_was_written(hostile, capsys):
    name, store = hostile
    assert main(["sql", "SELECT message FROM events", "--format", "json", "--store", store]) == 0
    assert json.loads(capsys.readouterr().out) == [{"message": name}]


def test_csv_is_spelled_out_for_a_terminal_alone(hostile):
    name, store = hostile
    words = [*LMT, "sql", "SELECT message FROM events", "--format", "csv", "--store", store]
    piped = subprocess.run(words, capture_output=True, check=True).stdout.decode()
    assert name.replace('"', '""') in piped
    main_end, terminal = pty.openpty()
    try:
        subprocess.run(words, stdout=terminal, check=True)
        shown = os.read(main_end, 4096).decode().replace("\r\n", "\n")
    finally:
        os.close(terminal)
        os.close(main_end)
    assert [c for c in shown if not c.isprintable() and c != "\n"] == []


def test_a_query_reads_nothing_but_the_store(lmt, store, tmp_path):
    secret = tmp_path / "secret.csv"
    secret.write_text("a\n1\n")
    for query in (f"FROM '{secret}'", f"FROM read_text('{secret}')", f"FROM glob('{tmp_path}/*')"):
        code, out, err = lmt("sql", query)
        assert (code, out) == (2, "")
        assert "--allow-external" in err
    code, out, _ = lmt("sql", f"FROM '{secret}'", "--allow-external", "--format", "csv")
    assert (code, out) == (0, "a\n1\n")


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("COPY (SELECT 1) TO '{file}'", "a query only reads"),
        ("ATTACH '{file}'", "a query only reads"),
        ("INSTALL httpfs", "a query only reads"),
        ("CREATE TABLE t AS SELECT 1", "a query only reads"),
        ("FROM enable_logging(storage = 'file', storage_path = '{file}')", ""),  # a function, in DuckDB 2
        ("FROM query($$COPY (SELECT 1) TO '{file}'$$)", "single SELECT"),
    ],
)
def test_nothing_is_written_even_where_other_files_are_read(lmt, tmp_path, query, complaint):
    file = tmp_path / "written"
    code, out, err = lmt("sql", query.format(file=file), "--allow-external")
    assert (code, out) == (2, "")
    assert complaint in err
    assert not file.exists()


@pytest.mark.parametrize("options", [[], ["--allow-external"]])
def test_what_does_not_fit_in_memory_goes_to_a_directory_of_its_own(lmt, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    code, out, _ = lmt("sql", "SELECT current_setting('temp_directory') AS d", "--format", "csv", *options)
    spill = Path(out.splitlines()[1])
    assert (code, spill.parent, spill.exists()) == (0, Path(tempfile.gettempdir()), False)


def test_the_working_directory_is_not_read(lmt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".tmp").mkdir()  # where DuckDB would spill, and which it would therefore read
    (tmp_path / ".tmp" / "secret").write_text("secret")
    code, out, _ = lmt("sql", "FROM read_text('.tmp/secret')")
    assert (code, out) == (2, "")


def test_a_line_break_in_a_name_hides_no_run_from_upkeep(tmp_path):
    store = Store.open_for_writing(tmp_path / "store")
    plant(store, "steps", [{"step": 1, "loss": 1.0}], run_id="new\nline")
    assert run_ids(store) == ["new\nline"]


def test_a_table_is_no_variable_of_ours(lmt):
    for name in ("arguments", "statements", "query"):
        assert "does not exist" in lmt("sql", f"FROM {name}", "--allow-external")[2]


def test_a_damaged_file_is_named(lmt, store):
    (first, *_) = store.path.glob("steps/**/*.parquet")
    first.write_bytes(first.read_bytes()[:-30])
    for words in (["sql", "FROM steps"], ["runs"], ["du"], ["describe", "steps"], ["fit", "loss", "first"]):
        code, out, err = lmt(*words)
        assert (code, out) == (2, "")
        assert str(first) in err
        assert "lmt verify" in err


def test_control_characters_are_spelled_out():
    assert output.one_line("a\x1b[1m\x9b\u202e\ud800é│") == "a\\x1b[1m\\x9b\\u202e\\ud800é│"
    assert output.printable("a\tb\nc\rd") == "a b\nc\\rd"
    assert json.loads(output.to_json({"a": "\x7f\x9b\u202e\u2028"})) == {"a": "\x7f\x9b\u202e\u2028"}
    assert output.to_json("\x9b") == '"\\u009b"'
