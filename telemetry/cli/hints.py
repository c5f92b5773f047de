"""What may have been meant: names near one that is not there, and the place in a query where an error is.

DuckDB says which columns the tables of a query have that are near. What it does not know is that the column is in
another table, or that a view answers the question; that is added here, from the catalogue and the library.
"""

from __future__ import annotations

import re
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from lm_telemetry.errors import QueryError
from lm_telemetry.meant import NAMES_SHOWN, nearest

if TYPE_CHECKING:
    from collections.abc import Iterator

    import duckdb

    from lm_telemetry.queries import Connection

_LINE = re.compile(r"LINE (?P<number>\d+): (?P<text>.*)\n(?P<caret> *\^)")
_NO_TABLE = re.compile(r"Table with name (\S+) does not exist|Referenced table \"([^\"]+)\" not found")
_NO_COLUMN = re.compile(r"Referenced column \"([^\"]+)\" (?:was )?not found|does not have a column named \"([^\"]+)\"")


@cache
def relations() -> dict[str, tuple[str, ...]]:
    """The columns of all tables and views, by name."""
    from lm_telemetry.catalogue import PARTITIONS, TABLES, columns
    from lm_telemetry.queries import list_views

    tables = {table: (*PARTITIONS, *(m.name for m in columns(table))) for table in TABLES}
    return tables | {view.name: tuple(c.name for c in view.columns) for view in list_views()}


@contextmanager
def understood(connection: Connection, query: str) -> Iterator[None]:
    """A context from which errors of a query come out as QueryError, with the place and what may have been meant."""
    import duckdb

    try:
        with connection.explained():
            yield
    except duckdb.InterruptException:
        raise
    except duckdb.Error as error:
        raise QueryError(_explained(connection, query, error)) from error


def _explained(connection: Connection, query: str, error: duckdb.Error) -> str:
    message = str(error).strip()
    hint = _hint(message)
    message = _renumbered(message, query) if "\nLINE " in message else _placed(connection, query, message)
    return f"{message}\n{hint}" if hint else message


def _placed(connection: Connection, query: str, message: str) -> str:
    """The message with the line and a caret, which DuckDB's `execute` gives for what a relation is not made of."""
    import duckdb

    if not message.startswith(("Binder Error", "Catalog Error")):
        return message
    try:
        connection.execute(query)  # does nothing: it is understood no better than before
    except duckdb.Error as error:
        again = str(error).strip()
        return again if again.startswith(message.split("\n", 1)[0]) else message
    return message


def _renumbered(message: str, query: str) -> str:
    """The message with the number that the line has in the query: that of a box is of a longer one, made around it."""
    place = _LINE.search(message)
    if place is None:
        return message
    text = place["text"].removeprefix("...").removesuffix("...").strip()
    numbers = [number for number, line in enumerate(query.split("\n"), 1) if text in line]
    if not numbers or int(place["number"]) in numbers:
        return message
    shift = len(place["number"]) - len(str(numbers[0]))
    head = f"LINE {numbers[0]}: "
    return message[: place.start()] + head + place["text"] + "\n" + place["caret"][shift:] + message[place.end() :]


def _hint(message: str) -> str:
    """A line on what may have been meant; empty if there is nothing to say."""
    if message.startswith("Permission Error"):
        return "Only the store is read; --allow-external lets a query read other files."
    known = relations()
    table, column = _NO_TABLE.search(message), _NO_COLUMN.search(message)
    if table:
        name = table[1] or table[2]
        near = nearest(name.rpartition(".")[2], known)
        return f"Near it: {', '.join(near)}." if near else "`lmt views` lists the views, SHOW TABLES all there is."
    if column:
        name = column[1] or column[2]
        homes = {c: [table for table in known if c in known[table]] for columns in known.values() for c in columns}
        places = [f"{c} (in {_some(homes[c])})" for c in ([name] if name in homes else nearest(name, homes))]
        return f"Near it: {', '.join(places)}." if places else ""
    return ""


def _some(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
