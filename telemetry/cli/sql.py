"""`lmt sql ["QUERY"]`: any question in DuckDB's SQL, of a store that the query cannot change.

A query sees the store and nothing else of this computer, unless `--allow-external` is given; even then it only reads.
What DuckDB cannot hold in memory it puts into a temporary directory of its own, not into the working directory.
Without a query, at a terminal, a shell asks for one after the other (`shell`); otherwise standard input is the query.
"""

from __future__ import annotations

import re
import sys
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from lm_telemetry.cli import output
from lm_telemetry.errors import QueryError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    import duckdb

    from lm_telemetry.queries import Connection

_READING = frozenset({"SELECT", "MULTI", "EXPLAIN"})
"""Kinds of statements that only read; `MULTI` is PIVOT."""

_EXPLAIN = re.compile(r"\s*EXPLAIN\s+(?:ANALYZE\s+)?(?=[A-Z])", re.IGNORECASE)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "sql",
        help="ask the store questions in SQL",
        description="Ask the store questions in DuckDB's SQL. Tables and views: `lmt views`, `lmt describe`.",
    )
    parser.add_argument(
        "query", nargs="?", metavar="QUERY", help="the question; - reads it from standard input, none opens a shell"
    )
    output.add_options(parser)
    parser.add_argument(
        "--allow-external", action="store_true", help="let the query read files outside the store and load extensions"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Answer; QueryError if the query is wrong or would write."""
    if arguments.query is None and sys.stdin.isatty():
        from lm_telemetry.cli.shell import Shell

        if arguments.output:
            raise QueryError("-o FILE takes the answer to one query: give it, or leave -o out to open a shell")
        with open_store(arguments) as connection:
            Shell(connection, arguments).loop()
        return 0
    query = sys.stdin.read() if arguments.query in {None, "-"} else arguments.query
    with open_store(arguments) as connection:
        answer(connection, query, arguments)
    return 0


@contextmanager
def open_store(arguments: argparse.Namespace) -> Iterator[Connection]:
    """A connection for queries that somebody has typed."""
    from lm_telemetry.queries import connect
    from lm_telemetry.queries.tables import text

    with TemporaryDirectory(prefix="lmt-") as spill, connect(arguments.store) as connection:
        connection.execute(f"SET temp_directory = {text(spill)}")
        if arguments.allow_external:
            connection.execute("SET python_enable_replacements = false")  # a table is no variable of ours
            connection.execute("SET lock_configuration = true")  # `FROM enable_logging(...)` would write a file
        else:
            connection.confine()
        yield connection


def answer(connection: Connection, query: str, arguments: argparse.Namespace) -> None:
    """Write the answer to the one reading statement in `query`.

    Raises:
        QueryError: it is not SQL, asks for what is not there, or is not one statement that only reads.
    """
    from lm_telemetry.cli.asking import interruptible
    from lm_telemetry.cli.hints import understood

    if query.encode(errors="replace").decode() != query:  # bytes that are no text come as lone surrogates
        raise QueryError("a query is text in UTF-8, and this is not")
    with interruptible(connection), understood(connection, query):
        statements = connection.extract_statements(query)
        if len(statements) != 1:
            raise QueryError(f"expected one SQL statement, got {len(statements)}")
        _require_reading(connection, query)
        output.write(connection.sql(query), arguments)


def _require_reading(connection: duckdb.DuckDBPyConnection, query: str) -> None:
    for statement in connection.extract_statements(query):
        kind = _kind(statement)
        if kind not in _READING:
            raise QueryError(f"a query only reads, and {kind} does more; to keep an answer use -o FILE")
        if kind == "EXPLAIN":
            # EXPLAIN ANALYZE runs what it explains.
            inner = _EXPLAIN.sub("", statement.query, count=1)
            if inner == statement.query:
                raise QueryError(
                    "lmt sql explains `EXPLAIN [ANALYZE] SELECT ...`, without options or comments before it"
                )
            _require_reading(connection, inner)


def _kind(statement: duckdb.Statement) -> str:
    try:
        name: str = statement.type.name
    except ValueError:  # DuckDB knows kinds that its Python client has no name for
        return "such a statement"
    return name
