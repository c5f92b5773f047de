"""What may come next in a query: names of tables and views after FROM and JOIN, of their columns elsewhere.

Names come from the catalogue and the library, so that completion asks the store nothing.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lm_telemetry.catalogue import TABLES
from lm_telemetry.cli.hints import relations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

COMMANDS = {
    ".tables": "list the tables",
    ".views": "list the views with the questions they answer",
    ".describe NAME": "columns of a table or view: types, units, meaning, which are filled",
    ".help": "this list",
    ".quit": "leave, as Ctrl-D does",
}
"""Commands of the shell, and what they do."""

_KEYWORDS = (  # noqa: SIM905 a word a line would fill the screen
    "ALL AND AS ASC BETWEEN BY CASE CAST COUNT DESC DESCRIBE DISTINCT ELSE END EXISTS EXPLAIN FILTER FROM GROUP HAVING"
    " IN IS JOIN LEFT LIKE LIMIT NOT NULL OFFSET ON OR ORDER OVER PARTITION PIVOT QUALIFY SELECT SHOW SUMMARIZE TABLES"
    " THEN UNION USING VALUES WHEN WHERE WINDOW WITH"
).split()

_WORD = re.compile(r"\w+")
_NAMES_A_RELATION = re.compile(r"\b(FROM|JOIN|DESCRIBE|SUMMARIZE|PIVOT)\s+$", re.IGNORECASE)


class Completer:
    """readline's completer: calls with state 0, 1, ... give the candidates one by one, then None.

    `typed` gives the lines above the current one, and that one up to the word that is being completed.
    """

    def __init__(self, typed: Callable[[], tuple[str, str]]) -> None:
        self._typed = typed
        self._found: list[str] = []

    def __call__(self, word: str, state: int) -> str | None:
        """The next candidate for `word`."""
        if state == 0:
            above, line = self._typed()
            self._found = candidates(above, line, word)
        return self._found[state] if state < len(self._found) else None


def candidates(above: str, line: str, word: str) -> list[str]:
    """What `word` may become.

    Args:
        above: lines of the statement before this one.
        line: this line before the word.
        word: what is typed of it; it may hold dots.
    """
    known = relations()
    if not above and not line.strip() and word.startswith("."):
        return _beginning(word, (name.split()[0] for name in COMMANDS))
    if not above and line.split() == [".describe"]:
        return _beginning(word, known)
    before = f"{above}\n{line}"
    if _NAMES_A_RELATION.search(before):
        every_row = [f"raw.{table}" for table in TABLES] if word.lower().startswith("raw.") else []
        return _beginning(word, [*known, *every_row])
    mentioned = [known[name] for name in dict.fromkeys(_WORD.findall(before.lower())) if name in known]
    # SELECT comes before FROM: until a table is named, a column of any may be meant.
    columns = [column for names in mentioned or known.values() for column in names]
    qualifier, dot, rest = word.rpartition(".")
    if dot:
        columns = list(known.get(qualifier.rpartition(".")[2].lower(), columns))
        return [f"{qualifier}.{column}" for column in _beginning(rest, columns)]
    keywords = _KEYWORDS if word[:1].isupper() else [keyword.lower() for keyword in _KEYWORDS]
    return _beginning(word, [*columns, *known, *keywords])


def _beginning(word: str, names: Iterable[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if name.lower().startswith(word.lower())]
