"""The store as tables and views of Spark or Trino: the statements to paste, for when one machine is not enough.

    >>> print(script("spark", "s3a://bucket/telemetry-store"))  # doctest: +SKIP

The store is plain Parquet in hive directories, so that these engines read it where it is. The script has, in order:
tables with the types of the catalogue; the same tables without the rows that a resumed run overtook; the views.

Decisions:

- On Spark `time` is a TIMESTAMP, an instant, which is shown in the zone of the session; the script sets that to UTC. On
  Trino it is a TIMESTAMP that reads UTC, as in DuckDB.
- `run_id` is text and `rank` an integer, whatever they look like. Columns that a file lacks are NULL; those that the
  catalogue lacks are not there.
- What a resumed run overtook is worked out from `steps`, since manifests are not SQL.
- There are no schemas in Spark's temporary views: `raw.steps` is `raw_steps` here.

Left out: the order of rows. Trino ignores the ORDER BY of a view; say it in the query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lm_telemetry.catalogue import PARTITIONS, TABLES, columns
from lm_telemetry.errors import QueryError
from lm_telemetry.queries.dialect import require_known, tables_of, translate
from lm_telemetry.queries.view import list_views

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lm_telemetry.catalogue import ColumnType
    from lm_telemetry.queries.dialect import Dialect
    from lm_telemetry.queries.view import View

SCHEMA = "telemetry"
"""Schema that the tables are made in on Trino."""

_TYPES: dict[Dialect, dict[ColumnType, str]] = {
    "spark": {
        "bool": "BOOLEAN",
        "int32": "INT",
        "int64": "BIGINT",
        "float32": "FLOAT",
        "float64": "DOUBLE",
        "string": "STRING",
        "timestamp": "TIMESTAMP",
        "list<int32>": "ARRAY<INT>",
        "list<float32>": "ARRAY<FLOAT>",
    },
    "trino": {
        "bool": "BOOLEAN",
        "int32": "INTEGER",
        "int64": "BIGINT",
        "float32": "REAL",
        "float64": "DOUBLE",
        "string": "VARCHAR",
        "timestamp": "TIMESTAMP",
        "list<int32>": "ARRAY(INTEGER)",
        "list<float32>": "ARRAY(REAL)",
    },
}
_PARTITION_TYPES: dict[str, ColumnType] = {"run_id": "string", "rank": "int32"}

_ONCE = """\
-- Every row is in one file of these tables, also after a compaction. While what it replaced is being deleted, for
-- milliseconds, rows may be there twice."""
_HEADS: dict[Dialect, str] = {
    "spark": f"""\
-- For Spark 4.1 or later. Files are listed when a table is made: run this again to see new ones.
{_ONCE}
SET TIME ZONE 'UTC'""",
    "trino": f"""\
-- For Trino, in a catalog of the Hive connector. `time` is in milliseconds, as that connector has it by default.
-- Runs are listed by sync_partition_metadata: call it again to see new ones.
{_ONCE}
CREATE SCHEMA IF NOT EXISTS {SCHEMA};

USE {SCHEMA};

-- `pathways` takes a step of recursion a layer; Trino stops at 10 otherwise
SET SESSION max_recursion_depth = 200""",
}

_STARTS = "attempt_starts"
_STARTS_SELECT = """\
SELECT run_id, rank, attempt, MIN(step) AS first_step
FROM raw_steps
GROUP BY run_id, rank, attempt"""
_SURVIVING = f"""\
WHERE NOT EXISTS (
  SELECT 1
  FROM {_STARTS} AS later
  WHERE later.run_id = r.run_id AND later.rank = r.rank
    AND later.attempt > r.attempt AND later.first_step <= r.step
)"""  # noqa: S608 all names are ours


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """A statement that makes a table or view, or tells the engine of its files."""

    name: str
    sql: str


def script(
    dialect: Dialect, location: str, names: Iterable[str] | None = None, *, present: Iterable[str] = TABLES
) -> str:
    """The statements that make the named views, or all of them and all tables, each ended by a semicolon.

    Args:
        dialect: the engine they are for.
        location: the store as that engine sees it, a directory or URL.
        names: views; with them come the tables and views that they read. None for everything.
        present: tables that have a directory in the store. The others are made without rows.

    Raises:
        QueryError: there is no such view or dialect; a view is outside the portable subset.
    """
    views = {view.name: view for view in list_views()}
    made = view_statements(dialect, names)
    read = {table for statement in made for table in tables_of(views[statement.name])}
    tables = base_tables(dialect, location, TABLES if names is None else read, present=present)
    return ";\n\n".join([_HEADS[dialect], *(statement.sql for statement in (*tables, *made))]) + ";"


def base_tables(
    dialect: Dialect, location: str, tables: Iterable[str] = TABLES, *, present: Iterable[str] = TABLES
) -> list[Statement]:
    """The statements that make tables: `raw_<table>` with every row, `<table>` with the surviving history.

    The other arguments are those of `script`. `steps` is always made, since it tells what was overtaken.

    Raises:
        QueryError: there is no such dialect.
    """
    require_known(dialect)
    wanted = [table for table in TABLES if table in {"steps", *tables}]
    there = set(present)
    statements = []
    for table in wanted:
        statements += _files(dialect, table, location) if table in there else [_no_rows(dialect, table)]
    statements.append(_view(dialect, _STARTS, _STARTS_SELECT))
    for table in wanted:
        chosen = ", ".join(f"r.{name}" for name, _ in _columns(dialect, table))
        select = f"SELECT {chosen}\nFROM raw_{table} AS r"
        statements.append(_view(dialect, table, select if table == "runs" else f"{select}\n{_SURVIVING}"))
    return statements


def view_statements(dialect: Dialect, names: Iterable[str] | None = None) -> list[Statement]:
    """The statements that make the named views, or all, each after the views that it reads.

    Raises:
        QueryError: there is no such view or dialect; a view is outside the portable subset.
    """
    require_known(dialect)
    views = {view.name: view for view in list_views()}
    order: dict[str, None] = {}
    for name in views if names is None else names:
        if name not in views:
            raise QueryError(f"there is no view {name!r}; there are {', '.join(views)}")
        _put_after_its_needs(name, views, order)
    return [_view(dialect, name, translate(views[name], dialect)) for name in order]


def _put_after_its_needs(name: str, views: dict[str, View], order: dict[str, None]) -> None:
    for needed in tables_of(views[name]):
        if needed in views and needed not in order:
            _put_after_its_needs(needed, views, order)
    order[name] = None


def _columns(dialect: Dialect, table: str) -> list[tuple[str, str]]:
    """(name, type) of the columns of a table; those of the path come last, as both engines want it."""
    types = _TYPES[dialect]
    return [(m.name, types[m.type]) for m in columns(table)] + [(c, types[_PARTITION_TYPES[c]]) for c in PARTITIONS]


def _view(dialect: Dialect, name: str, select: str) -> Statement:
    kind = {"spark": "TEMPORARY VIEW", "trino": "VIEW"}[dialect]
    return Statement(name=name, sql=f"CREATE OR REPLACE {kind} {name} AS\n{select}")


def _no_rows(dialect: Dialect, table: str) -> Statement:
    chosen = ",\n".join(f"  CAST(NULL AS {type_}) AS {name}" for name, type_ in _columns(dialect, table))
    return _view(dialect, f"raw_{table}", f"SELECT\n{chosen}\nWHERE FALSE")


def _files(dialect: Dialect, table: str, location: str) -> list[Statement]:
    """The statements that make a table of a directory of files."""
    described = ",\n".join(f"  {name} {type_}" for name, type_ in _columns(dialect, table))
    path = f"{location.rstrip('/')}/{table}"
    name = f"raw_{table}"
    if dialect == "spark":
        make = (
            f"CREATE OR REPLACE TEMPORARY VIEW {name} (\n{described}\n)\n"
            f"USING parquet OPTIONS (path {_spark_path(path)}, pathGlobFilter '*.parquet')"
        )
        return [Statement(name=name, sql=make)]
    partitions = ", ".join(f"'{column}'" for column in PARTITIONS)
    quoted = path.replace("'", "''")
    make = (
        f"CREATE TABLE IF NOT EXISTS {name} (\n{described}\n)\n"
        f"WITH (external_location = '{quoted}', format = 'PARQUET', partitioned_by = ARRAY[{partitions}])"
    )
    list_runs = f"CALL system.sync_partition_metadata('{SCHEMA}', '{name}', 'FULL')"
    return [Statement(name=name, sql=make), Statement(name=name, sql=list_runs)]


def _spark_path(path: str) -> str:
    """A path as a literal. Spark takes `[`, `{`, `*` and `?` in it for patterns, and undoes backslashes twice."""
    plain = "".join(f"\\{c}" if c in "[]{}*?\\" else c for c in path)
    return "'" + plain.replace("\\", "\\\\").replace("'", "\\'") + "'"
