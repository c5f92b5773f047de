"""`lmt describe NAME`: the columns of a table or view, what they mean, and which of them the store has values in.

Types are what a query gets, units and meanings are the catalogue's and the views' own. A column is empty because no
instrument that fills it was on, or because what it is about did not occur; how full it is, is counted. Counting the
rows of a view runs it, and a large store takes its time, so that after `COUNT_SECONDS` it is left out.
"""

from __future__ import annotations

import shutil
from textwrap import wrap
from threading import Timer
from typing import TYPE_CHECKING

from lm_telemetry.cli import output
from lm_telemetry.cli.asking import asking
from lm_telemetry.cli.hints import relations
from lm_telemetry.errors import QueryError
from lm_telemetry.meant import missing
from lm_telemetry.terminal import one_line, printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from typing import Any

    from lm_telemetry.queries import Connection

COUNT_SECONDS = 10.0
LEAST_MEANING = 24
"""Characters that a line of a meaning may take, however narrow the terminal."""

_COLUMNS = {
    "column": "VARCHAR",
    "type": "VARCHAR",
    "unit": "VARCHAR",
    "filled": "BIGINT",
    "rows": "BIGINT",
    "meaning": "VARCHAR",
    "source": "VARCHAR",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "describe",
        help="say what the columns of a table or view are",
        description="Show the columns of a table or view: type, unit, meaning, source, and in how many rows of the"
        " store each has a value.",
    )
    parser.add_argument("name", metavar="NAME", help="the table or view; `raw.NAME` has overtaken rows, too")
    output.add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print; QueryError if there is no such table or view."""
    with asking(arguments.store) as connection:
        write(connection, arguments.name, arguments)
    return 0


def write(connection: Connection, name: str, arguments: argparse.Namespace) -> None:
    """Write what is known of the columns of `name`.

    Raises:
        QueryError: there is no such table or view.
    """
    from lm_telemetry.catalogue import TABLES

    schema, _, bare = name.lower().rpartition(".")
    if bare not in relations() or schema not in {"", "main", "raw"} or (schema == "raw" and bare not in TABLES):
        raise QueryError(missing("table or view", name, relations(), "`lmt views` and SHOW TABLES list them"))
    rows = list(_rows(connection, f"{schema or 'main'}.{bare}", bare))
    if arguments.format == "table":
        output.write_text(f"{printable(f'{bare}: {_purpose(bare)}')}\n\n{_listing(rows)}\n", arguments)
    else:
        output.write(output.table_of(connection, _COLUMNS, rows), arguments)


def _rows(connection: Connection, relation: str, bare: str) -> Iterator[tuple[Any, ...]]:
    """Rows of `_COLUMNS`."""
    types = {name: type_ for name, type_, *_ in connection.execute(f"DESCRIBE {relation}").fetchall()}
    told = _told(bare)
    counts = _counts(connection, relation, list(types))
    for i, (name, type_) in enumerate(types.items()):
        unit, meaning, source = told.get(name, ("", "found in the files, and not in the catalogue", ""))
        filled, rows = (None, None) if counts is None else (counts[i + 1], counts[0])
        yield name, type_, unit, filled, rows, meaning, source


def _counts(connection: Connection, relation: str, columns: list[str]) -> tuple[int, ...] | None:
    """The number of rows, and of values in each column; None if it takes too long."""
    import duckdb

    wanted = ", ".join(f'count("{column.replace(chr(34), chr(34) * 2)}")' for column in columns)
    timer = Timer(COUNT_SECONDS, connection.interrupt)
    timer.start()
    try:
        (counts,) = connection.execute(f"SELECT count(*), {wanted} FROM {relation}").fetchall()  # noqa: S608 known names
    except duckdb.InterruptException:
        return None
    else:
        return tuple(counts)
    finally:
        timer.cancel()
        timer.join()


def _told(name: str) -> dict[str, tuple[str, str, str]]:
    """Unit, meaning and source of each column that the catalogue or the view tells of."""
    from lm_telemetry.catalogue import TABLES, columns
    from lm_telemetry.queries import list_views
    from lm_telemetry.queries.tables import PARTITION_MEANINGS

    if name in TABLES:
        partitions = {column: ("", meaning, "") for column, meaning in PARTITION_MEANINGS.items()}
        return partitions | {m.name: (m.unit, m.meaning, m.source) for m in columns(name)}
    return {c.name: (c.unit, c.meaning, "") for view in list_views() if view.name == name for c in view.columns}


def _purpose(name: str) -> str:
    from lm_telemetry.catalogue import TABLES
    from lm_telemetry.queries import list_views

    views = {view.name: f"{view.question}\nSource: {view.source}" for view in list_views()}
    return (TABLES | views)[name]


def _listing(rows: list[tuple[Any, ...]]) -> str:
    """Rows of `_COLUMNS` in columns of text, of which the last is as wide as the terminal lets it be."""
    cells = [("column", "type", "unit", "filled")]
    cells += [(one_line(name), type_, unit, _share(filled, n)) for name, type_, unit, filled, n, *_ in rows]
    meanings = ["meaning", *(f"{meaning} ({source})" if source else meaning for *_, meaning, source in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    begin = sum(widths) + 2 * len(widths)
    room = max(LEAST_MEANING, shutil.get_terminal_size((10_000, 0)).columns - begin)
    lines = []
    for row, meaning in zip(cells, meanings, strict=True):
        head = "".join(f"{cell:<{width}}  " for cell, width in zip(row, widths, strict=True))
        lines.append(head + f"\n{' ' * begin}".join(wrap(meaning, room)))
    return "\n".join(lines)


def _share(filled: int | None, rows: int | None) -> str:
    """How full a column is, in words that do not round a few values to none, nor all but a few to all."""
    if filled is None or rows is None:
        return "?"
    if filled in {0, rows}:
        return "all" if filled else "-"
    return f"{min(max(100 * filled / rows, 0.1), 99.9):.3g} %"
