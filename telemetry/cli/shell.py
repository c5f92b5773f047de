"""The shell of `lmt sql`: one question after the other, of a store that may be growing meanwhile.

A statement goes over as many lines as it takes, up to its `;`. Each is answered from what is on disk at that moment.
Ctrl-C abandons what is being typed, or the query that runs; Ctrl-D leaves.

Editing, history and completion are readline's, which comes with Python and with the keys that people have in their
fingers (`~/.inputrc`). prompt_toolkit would colour the text, for a dependency and 80 ms at each start. The history is
`$XDG_STATE_HOME/lm-telemetry/sql_history` (default `~/.local/state`), readable by its owner alone, since queries tell
what somebody looks for; where it cannot be written there is none.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lm_telemetry.cli import describe
from lm_telemetry.cli.asking import guarded
from lm_telemetry.cli.complete import COMMANDS, Completer
from lm_telemetry.cli.sql import answer
from lm_telemetry.errors import QueryError, TelemetryError
from lm_telemetry.terminal import one_line, printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from lm_telemetry.queries import Connection

HISTORY_LINES = 2000

_PROMPT, _MORE = "lmt> ", "...> "
_LEAVING = {".quit", ".exit", "quit", "exit"}


class Shell:
    """Reads statements and commands, and answers them."""

    def __init__(self, connection: Connection, arguments: argparse.Namespace) -> None:
        self._connection = connection
        self._arguments = arguments
        self._lines: list[str] = []

    def loop(self) -> None:
        """Until the user leaves."""
        with _line_editing(lambda: "\n".join(self._lines)):
            print(f"{one_line(str(self._arguments.store))}: end a query with ; or type .help")
            while True:
                try:
                    line = input(_MORE if self._lines else _PROMPT)
                    if not self._take(line):
                        return
                except EOFError:
                    print()
                    return
                except KeyboardInterrupt:
                    self._lines.clear()
                    print()
                except (TelemetryError, UnicodeError) as error:
                    print(f"lmt: {printable(str(error))}", file=sys.stderr)

    def _take(self, line: str) -> bool:
        """Take a line; False if it says to leave."""
        if not self._lines:
            word, *rest = line.split() or [""]
            if word.rstrip(";") in _LEAVING:
                return False
            if word.rstrip(";") == "help":
                word = ".help"
            if word.startswith("."):
                self._command(word, rest)
                return True
        self._lines.append(line)
        text = "\n".join(self._lines)
        if not text.strip():
            self._lines.clear()
        elif is_whole(text):
            self._lines.clear()
            for statement in split(text):
                answer(self._connection, statement, self._arguments)
                sys.stdout.flush()
        return True

    def _command(self, word: str, rest: list[str]) -> None:
        if word == ".tables":
            from lm_telemetry.catalogue import TABLES

            _list(TABLES)
        elif word == ".views":
            from lm_telemetry.queries import list_views

            _list({view.name: view.question for view in list_views()})
        elif word == ".describe":
            if not rest:
                raise QueryError(".describe takes the name of a table or view; .tables and .views list them")
            with guarded(self._connection):
                describe.write(self._connection, rest[0].rstrip(";"), self._arguments)
        else:
            if word != ".help":
                print(f"lmt: there is no {one_line(' '.join([word, *rest]))}; there are:", file=sys.stderr)
            _list(COMMANDS)


def is_whole(text: str) -> bool:
    """Whether a text ends in a `;` that is neither in quotes nor in a comment."""
    import duckdb

    encoded = text.encode()
    code = [place for place, kind in duckdb.tokenize(text) if kind != duckdb.token_type.comment]
    return bool(code) and encoded[code[-1] : code[-1] + 1] == b";"


def split(text: str) -> list[str]:
    """The statements in a text that ends in `;`, each as it was typed, whether or not it can be understood."""
    import duckdb

    encoded = text.encode()
    ends = [
        place
        for place, kind in duckdb.tokenize(text)
        if kind == duckdb.token_type.operator and encoded[place : place + 1] == b";"
    ]
    starts = [0, *(end + 1 for end in ends)]
    pieces = [encoded[start:end].decode().strip() for start, end in zip(starts, ends, strict=False)]
    return [piece for piece in pieces if piece]


def history_file() -> Path:
    """Where the history is kept."""
    state = os.environ.get("XDG_STATE_HOME", "")
    # The specification has a relative path ignored.
    home = Path(state) if state.startswith("/") else Path("~/.local/state").expanduser()
    return home / "lm-telemetry" / "sql_history"


@contextlib.contextmanager
def _line_editing(before: Callable[[], str]) -> Iterator[None]:
    """Editing with history and completion, where Python has readline; `before` gives the lines above the current."""
    try:
        import readline
    except ImportError:
        yield
        return
    readline.set_history_length(HISTORY_LINES)
    path = history_file()
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    known = readline.get_current_history_length()
    completer = Completer(lambda: (before(), readline.get_line_buffer()[: readline.get_begidx()]))
    readline.set_completer(completer)
    readline.set_completer_delims(" \t\n`~!@#$%^&*()-=+[{]}\\|;:'\",<>/?")
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    try:
        yield
    finally:
        readline.set_completer(None)
        with contextlib.suppress(OSError):
            _keep(readline, path, readline.get_current_history_length() - known)


def _keep(readline: ModuleType, path: Path, new: int) -> None:
    """Add the last `new` lines to the history; other shells may have added theirs meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    if hasattr(readline, "append_history_file"):
        readline.append_history_file(new, path)
    else:
        readline.write_history_file(path)


def _list(meanings: dict[str, str]) -> None:
    width = max(map(len, meanings))
    for name, meaning in meanings.items():
        print(f"{name:<{width}}  {meaning}")
