"""The views of a DuckDB database over a store: of the tables, and of the library. Each is made when a query names it.

To make them all takes a hundred times as long as most queries do, since DuckDB looks into the files for each. So the
words of a query decide. Comments on columns, which cost as much again, are made for those who look into DuckDB's
catalogue. A query that names a table in some other way (by an expression, through a relation's own `query`) meets
DuckDB's error that there is none, upon which `Connection` makes all views and asks again.

Which files a table has is not part of its view: it is in a variable of each connection, and the view is made anew only
when the columns of the files change, or what later launches overtook.
"""

from __future__ import annotations

import re
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING

from lm_telemetry.catalogue import PARTITIONS, TABLES, Metric, columns, schema_id
from lm_telemetry.queries.view import View, list_views

if TYPE_CHECKING:
    import duckdb

    from lm_telemetry.queries.snapshot import Part, Snapshot

_TYPES = {
    "bool": "BOOLEAN",
    "int32": "INTEGER",
    "int64": "BIGINT",
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "string": "VARCHAR",
    "timestamp": "TIMESTAMP",
    "list<int32>": "INTEGER[]",
    "list<float32>": "FLOAT[]",
}
_PARTITION_TYPES = {"run_id": "VARCHAR", "rank": "INTEGER"}
PARTITION_MEANINGS = {"run_id": "name of the run", "rank": "rank of the process that captured the row"}
_GLOB = str.maketrans({c: f"[{c}]" for c in "[*?"})

_WORD = re.compile(r"\w+")
_LISTING = re.compile(r"\b(show|pragma|information_schema|(duckdb|pg|sqlite)_\w+)\b|\bdescribe\s*(;|$)", re.IGNORECASE)
"""Queries about what tables there are."""
_COMMENTED = re.compile(r"\b(duckdb|pg)_\w+", re.IGNORECASE)
"""Queries that may read comments."""


class Tables:
    """The views that one database has so far; the connections to it share them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._tables: dict[str, tuple[str, str]] = {}
        self._made: set[str] = set()
        self._commented: set[str] = set()
        self._layouts: dict[tuple[str, frozenset[str | None]], list[str]] = {}

    def wanted(self, snapshot: Snapshot, query: str | None) -> set[str]:
        """Names of the tables and views that a query takes, with those behind them; None takes all."""
        known = {*snapshot.tables, *_library()}
        if query is None or _LISTING.search(query):
            return known
        found = _named(query, known)
        waiting = list(found)
        while waiting:
            needed = _needs(waiting.pop()) - found
            found |= needed
            waiting += needed
        if found and snapshot.untold:
            found.add("steps")
        return found

    def has_all(self, snapshot: Snapshot) -> bool:
        """Whether there is no view that is not made yet."""
        return {*snapshot.tables, *_library()} <= {*self._tables, *self._made}

    def define(
        self, raw: duckdb.DuckDBPyConnection, snapshot: Snapshot, wanted: set[str], query: str | None = None
    ) -> None:
        """Make the views of these names, unless they are there and right; with comments if the query may see them."""
        with self._lock:
            tables = [table for table in ("steps", *snapshot.tables) if table in wanted]
            cuts = _cut_rows(snapshot) if tables else ""
            for table in dict.fromkeys(tables):
                self._define_table(raw, snapshot, table, cuts)
            for name in _in_order((wanted & _library().keys()) - self._made):
                raw.execute(f"CREATE VIEW {quoted(name)} AS {_library()[name].sql}")
                self._made.add(name)
            if query is not None and _COMMENTED.search(query):
                self._comment(raw)

    def _define_table(self, raw: duckdb.DuckDBPyConnection, snapshot: Snapshot, table: str, cuts: str) -> None:
        every = self._select(raw, snapshot.base, table, snapshot.tables[table])
        surviving = f"FROM raw.{quoted(table)} AS r"
        if cuts and table != "runs":
            surviving += f" WHERE NOT EXISTS (FROM ({cuts}) AS c WHERE {_OVERTAKEN})"
        if self._tables.get(table) == (every, surviving):
            return
        for schema, body in (("raw", every), ("main", surviving)):
            raw.execute(f"CREATE OR REPLACE VIEW {schema}.{quoted(table)} AS {body}")
        self._tables[table] = (every, surviving)
        self._commented.discard(table)

    def _comment(self, raw: duckdb.DuckDBPyConnection) -> None:
        """Bring what the catalogue and the library say of tables, views and columns into DuckDB's catalogue."""
        for table in self._tables.keys() - self._commented:
            comments = PARTITION_MEANINGS | {m.name: _comment(m.meaning, m.unit) for m in _columns(table)}
            for schema in ("raw", "main"):
                _comment_on(raw, f"{schema}.{quoted(table)}", TABLES.get(table, ""), comments)
        for name in self._made - self._commented:
            view = _library()[name]
            comments = {c.name: _comment(c.meaning, c.unit) for c in view.columns}
            _comment_on(raw, quoted(name), view.question, comments)
        self._commented |= {*self._tables, *self._made}

    def _select(self, raw: duckdb.DuckDBPyConnection, base: str, table: str, parts: list[Part]) -> str:
        """The SELECT of all rows of a table: from its parts if there are any, else no rows of the same types."""
        catalogued = _columns(table)
        if not parts:
            nothing = [f"CAST(NULL AS {t}) AS {quoted(c)}" for c, t in _PARTITION_TYPES.items()]
            nothing += [f"CAST(NULL AS {_TYPES[m.type]}) AS {quoted(m.name)}" for m in catalogued]
            return f"SELECT {', '.join(nothing)} WHERE false"
        written = frozenset(part.schema for part in parts)
        present = self._present(raw, base, table, parts, written)
        known = {*PARTITIONS, *(m.name for m in catalogued)}
        chosen = [quoted(c) for c in PARTITIONS]
        chosen += [_column(m, is_present=m.name in present) for m in catalogued]
        chosen += [quoted(c) for c in present if c not in known]
        source = _source(f"getvariable({text(files_of(table))})", alike=len(written) == 1 and None not in written)
        return f"SELECT {', '.join(chosen)} FROM {source}"  # noqa: S608 names and texts are quoted; views take no parameters

    def _present(
        self, raw: duckdb.DuckDBPyConnection, base: str, table: str, parts: list[Part], written: frozenset[str | None]
    ) -> list[str]:
        """The columns that the files of a table have; files are opened only where no manifest tells."""
        if table in TABLES and written == {schema_id(table)}:
            return [m.name for m in columns(table)]
        key = (table, written)
        if key not in self._layouts or None in written:
            one_of_each = {part.schema or part.file: part.file for part in parts}
            files = ", ".join(text(escape_glob(f"{base}/{file}")) for file in one_of_each.values())
            self._layouts[key] = raw.sql(f"FROM {_source(f'[{files}]', alike=False)}").columns
        return self._layouts[key]


def files_of(table: str) -> str:
    """The variable of a connection that holds the files of a table."""
    return f"lm_telemetry_files_{table}"


def escape_glob(path: str) -> str:
    """`path` for DuckDB's glob, which reads `[`, `*` and `?` as patterns."""
    return path.translate(_GLOB)


def quoted(identifier: str) -> str:
    """A name as SQL takes it."""
    return '"' + identifier.replace('"', '""') + '"'


def text(value: str) -> str:
    """A text as SQL takes it."""
    return "'" + value.replace("'", "''") + "'"


def _named(query: str, known: set[str]) -> set[str]:
    return known & set(_WORD.findall(query.lower()))


@cache
def _needs(view: str) -> frozenset[str]:
    """What a view of the library reads, directly; nothing for a table."""
    names = {*TABLES, *_library()} - {view}
    return frozenset(_named(_library()[view].sql, names)) if view in _library() else frozenset()


@cache
def _library() -> dict[str, View]:
    return {view.name: view for view in list_views()}


def _in_order(views: set[str]) -> list[str]:
    """Names of views of the library, each after those that it reads."""
    found: dict[str, None] = {}
    on_the_way: set[str] = set()

    def visit(name: str) -> None:
        if name not in on_the_way:
            on_the_way.add(name)
            for needed in sorted(_needs(name) & views):
                visit(needed)
            found[name] = None

    for name in sorted(views):
        visit(name)
    return list(found)


_OVERTAKEN = "c.run_id = r.run_id AND c.rank = r.rank AND c.attempt = r.attempt AND r.step >= c.step"


_UNTOLD = """
    SELECT earlier.run_id, earlier.rank, earlier.attempt, min(later.step) AS step
    FROM starts AS earlier JOIN starts AS later
        ON later.run_id = earlier.run_id AND later.rank = earlier.rank AND later.attempt > earlier.attempt
    GROUP BY ALL
"""


def _cut_rows(snapshot: Snapshot) -> str:
    """Where attempts were overtaken, as the text of a relation; empty if none was."""
    rows = ", ".join(f"({text(c.run_id)}, {c.rank}, {c.attempt}, {c.step})" for c in snapshot.cuts)
    cuts = [f"FROM (VALUES {rows}) AS v(run_id, rank, attempt, step)"] if rows else []
    if snapshot.untold:
        names = ", ".join(map(text, snapshot.untold))
        starts = "SELECT run_id, rank, attempt, min(step) AS step FROM raw.steps"
        cuts.append(f"WITH starts AS ({starts} WHERE run_id IN ({names}) GROUP BY ALL) {_UNTOLD}")
    return " UNION ALL ".join(f"({cut})" for cut in cuts)


def _source(files: str, *, alike: bool) -> str:
    types = ", ".join(f"{c}: {t}" for c, t in _PARTITION_TYPES.items())
    union = "" if alike else "union_by_name = true, "
    # Statistics of a file leave NaN out, and DuckDB would conclude from them that `isnan(loss)` is false of a NaN.
    return f"read_parquet({files}, {union}hive_partitioning = true, hive_types = {{{types}}}, can_have_nan = true)"


def _columns(table: str) -> tuple[Metric, ...]:
    """What the catalogue has of a table; nothing of one that a later version has written."""
    return columns(table) if table in TABLES else ()


def _column(metric: Metric, *, is_present: bool) -> str:
    name = quoted(metric.name)
    if not is_present:
        return f"CAST(NULL AS {_TYPES[metric.type]}) AS {name}"
    if metric.type == "timestamp":
        return f"{name} AT TIME ZONE 'UTC' AS {name}"
    return f"CAST({name} AS {_TYPES[metric.type]}) AS {name}"


def _comment(meaning: str, unit: str) -> str:
    return f"{meaning} [{unit}]" if unit not in {"", "1"} else meaning


def _comment_on(connection: duckdb.DuckDBPyConnection, view: str, purpose: str, comments: dict[str, str]) -> None:
    statements = [f"COMMENT ON VIEW {view} IS {text(purpose)}"]
    statements += [
        f"COMMENT ON COLUMN {view}.{quoted(column)} IS {text(comment)}" for column, comment in comments.items()
    ]
    connection.execute(";".join(statements))
