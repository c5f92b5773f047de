"""`lmt sql "QUERY"`: any question in DuckDB's SQL, of a store that the query cannot change."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from lm_telemetry.cli import output
from lm_telemetry.errors import QueryError

if TYPE_CHECKING:
    import argparse

    import duckdb

_READING = frozenset({"SELECT", "MULTI", "EXPLAIN"})
"""Kinds of statements that only read; `MULTI` is PIVOT."""

_EXPLAIN = re.compile(r"\s*EXPLAIN\s+(?:ANALYZE\s+)?(?=[A-Z])", re.IGNORECASE)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "sql",
        help="ask the store a question in SQL",
        description="Ask the store a question in DuckDB's SQL. Tables and views: `lmt views`, or SHOW TABLES.",
    )
    parser.add_argument("query", metavar="QUERY", help="the question; - reads it from standard input")
    output.add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Answer; QueryError if the query is wrong or would write."""
    from lm_telemetry.queries import connect

    query = sys.stdin.read() if arguments.query == "-" else arguments.query
    connection = connect(arguments.store)
    connection.confine()
    import duckdb

    try:
        relation = answer(connection, query)
        output.write(relation, arguments)
    except duckdb.Error as error:
        raise QueryError(str(error).strip()) from error
    return 0


def answer(connection: duckdb.DuckDBPyConnection, query: str) -> duckdb.DuckDBPyRelation:
    """The relation of the one reading statement in `query`.

    Raises:
        QueryError: there is no statement, more than one, or one that does more than read.
        duckdb.Error: it is not SQL, or asks for what is not there.
    """
    statements = connection.extract_statements(query)
    if len(statements) != 1:
        raise QueryError(f"expected one SQL statement, got {len(statements)}")
    _require_reading(connection, query)
    return connection.sql(query)


def _require_reading(connection: duckdb.DuckDBPyConnection, query: str) -> None:
    for statement in connection.extract_statements(query):
        kind = statement.type.name
        if kind not in _READING:
            raise QueryError(f"lmt sql only reads, and {kind} does more; to keep an answer use -o FILE")
        if kind == "EXPLAIN":
            # EXPLAIN ANALYZE runs what it explains.
            inner = _EXPLAIN.sub("", statement.query, count=1)
            if inner == statement.query:
                raise QueryError(
                    "lmt sql explains `EXPLAIN [ANALYZE] SELECT ...`, without options or comments before it"
                )
            _require_reading(connection, inner)
