"""The shell of `lmt sql`, at a real terminal."""

import codecs
import os
import pty
import select
import shutil
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import plant

from lm_telemetry.cli.shell import history_file, is_whole, split
from lm_telemetry.queries import list_views
from lm_telemetry.store import Store

PROGRAM = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches this process
from lm_telemetry.cli import main
sys.exit(main())
"""


class Terminal:
    """A process at a terminal of its own."""

    def __init__(self, *words, environment):
        self.end, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=os.environ | {"TERM": "dumb", "INPUTRC": "/dev/null"} | environment,
            start_new_session=True,
        )
        os.close(terminal)
        self.seen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def until(self, text, seconds=30):
        """What it writes up to and with `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.end], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come, only {self.seen!r}"
            self.seen += self._decoder.decode(os.read(self.end, 65536))
        before, _, self.seen = self.seen.partition(text)
        return before.replace("\r\n", "\n") + text

    def type(self, text):
        os.write(self.end, text.encode())

    def ask(self, text):
        """What it writes to a line, up to the next prompt."""
        self.type(f"{text}\n")
        return self.until("lmt> ")

    def leave(self, text="\x04"):
        self.type(text)
        return self.process.wait(timeout=30)


@pytest.fixture
def growing(tmp_path):
    store = Store.open_for_writing(tmp_path / "store")
    plant(store, "steps", [{"step": 1, "loss": 2.0}])
    return store


@pytest.fixture
def shell(growing, tmp_path):
    opened = []

    def start(**environment):
        words = ["sql", "--format", "csv", "--store", str(growing.path)]
        terminal = Terminal(*words, environment={"XDG_STATE_HOME": str(tmp_path / "state"), **environment})
        opened.append(terminal)
        terminal.until("lmt> ")
        return terminal

    yield start
    for terminal in opened:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.end)


def test_a_statement_goes_on_until_its_semicolon(shell):
    terminal = shell()
    terminal.type("SELECT ';' AS a, -- ;\n")
    terminal.until("...> ")
    assert "a,b\n;,2\n" in terminal.ask("2 AS b;")
    assert "a\n1\n" in (answer := terminal.ask("SELECT 1 AS a; SELECT 2 AS b;"))
    assert "b\n2\n" in answer


def test_rows_that_came_meanwhile_are_seen(shell, growing):
    terminal = shell()
    assert "n\n1\n" in terminal.ask("SELECT count(*) AS n FROM steps;")
    plant(growing, "steps", [{"step": 2, "loss": 1.0}])
    assert "n\n2\n" in terminal.ask("SELECT count(*) AS n FROM steps;")


def test_an_error_does_not_end_it(shell):
    terminal = shell()
    assert "Near it: loss" in terminal.ask("SELECT los FROM steps;")
    assert "COPY does more" in terminal.ask("COPY (SELECT 1) TO 'x';")
    assert "there is no .nonsense" in terminal.ask(".nonsense")
    assert "Traceback" not in terminal.ask("SELECT 'é' AS a;")
    assert terminal.leave(".quit\n") == 0


def test_a_store_that_duckdb_cannot_read_does_not_end_it(shell, growing):
    terminal = shell()
    plant(growing, "steps", [{"step": 1, "loss": 2.0}], run_id="w?t")  # to DuckDB, `?` ends the name of a file
    for question in ("FROM steps;", ".describe steps"):
        answer = terminal.ask(question)
        assert "lmt: " in answer
        assert "Traceback" not in answer
    for directory in list(growing.path.rglob("run_id=w[?]t")):
        shutil.rmtree(directory)
    assert "a\n1\n" in terminal.ask("SELECT 1 AS a;")


def test_ctrl_c_abandons_what_is_typed(shell):
    terminal = shell()
    terminal.type("SELECT nonsense\n")
    terminal.until("...> ")
    terminal.type("FROM")
    terminal.until("FROM")
    time.sleep(0.2)  # readline, which has just echoed, has to wait for the next key again to see a signal
    terminal.type("\x03")
    terminal.until("lmt> ")
    assert "a\n1\n" in terminal.ask("SELECT 1 AS a;")


def test_ctrl_c_abandons_the_query_that_runs(shell):
    terminal = shell()
    terminal.type("SELECT sum(a.range * b.range) FROM range(100000000) AS a, range(100000000) AS b;\n")
    terminal.until("AS b;")
    time.sleep(0.5)
    terminal.type("\x03")
    terminal.until("lmt> ")
    assert "a\n1\n" in terminal.ask("SELECT 1 AS a;")


def test_commands(shell):
    terminal = shell()
    assert "one row per optimizer step" in terminal.ask(".tables")
    assert list_views()[0].question in terminal.ask(".views")
    assert "loss,DOUBLE,nats,1,1," in terminal.ask(".describe steps")
    for word in (".help", "help", "help;"):
        assert ".describe NAME" in terminal.ask(word)
    assert ".describe takes the name of a table or view" in terminal.ask(".describe")
    assert "there is no table or view stepz; near it: steps" in terminal.ask(".describe stepz")


@pytest.mark.parametrize("words", ["\x04", ".quit\n", "quit;\n", "exit\n"])
def test_ways_to_leave(shell, words):
    assert shell().leave(words) == 0


def test_names_are_completed(shell):
    terminal = shell()
    terminal.type("SELECT count(*) AS n FROM sketc\t")
    terminal.until("FROM sketches")
    terminal.type(";\n")
    assert "n\n0\n" in terminal.until("lmt> ")


def test_lines_are_remembered_by_the_next_shell(shell, tmp_path):
    first = shell()
    first.ask("SELECT 11 AS a;")
    assert first.leave() == 0
    history = tmp_path / "state" / "lm-telemetry" / "sql_history"
    assert history.stat().st_mode & 0o077 == 0
    second = shell()
    second.type("\x10")  # Ctrl-P
    second.until("SELECT 11 AS a;")
    second.type("\n")
    assert "a\n11\n" in second.until("lmt> ")
    assert second.leave() == 0
    assert history.read_text() == "SELECT 11 AS a;\n"


def test_a_history_that_cannot_be_written_is_done_without(shell, tmp_path):
    (tmp_path / "file").write_text("")
    terminal = shell(XDG_STATE_HOME=str(tmp_path / "file"))
    assert "a\n1\n" in terminal.ask("SELECT 1 AS a;")
    assert terminal.leave() == 0


def test_the_history_is_in_the_state_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    inside = tmp_path / ".local" / "state" / "lm-telemetry" / "sql_history"
    for state in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", state)
        assert history_file() == inside
    monkeypatch.delenv("XDG_STATE_HOME")
    assert history_file() == inside
    monkeypatch.setenv("XDG_STATE_HOME", "/elsewhere")
    assert str(history_file()) == "/elsewhere/lm-telemetry/sql_history"


PIECES = ["SELECT 1", "'a;b'", '"c;d"', "$$;$$", "/* ; */ 2", "-- ;\n3", "é", "E'\\';'"]


@given(st.lists(st.lists(st.sampled_from(PIECES), min_size=1).map(" ".join), min_size=1))
def test_statements_are_split_at_semicolons_that_are_none_of_quotes_and_comments(statements):
    text = ";".join(statements)
    assert is_whole(f"{text};")
    assert is_whole(f"{text}; -- and a comment")
    assert not is_whole(text)
    assert split(f"{text};") == statements


@pytest.mark.parametrize("text", ["", "  ", "-- ;", "/* ;", "SELECT ';", 'SELECT ";', "SELECT $$ ;", "SELECT 1"])
def test_what_is_not_whole(text):
    assert not is_whole(text)
