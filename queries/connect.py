"""A store as a DuckDB database: one view per table, and the views of the library.

    >>> con = connect("telemetry-store")  # doctest: +SKIP
    >>> con.sql("SELECT step, smoothed_loss FROM training")  # doctest: +SKIP

Decisions:

- A view per table is a glob over its parts, so that rows flushed later are seen by the next query, while the run is
  live. Tables that have no part yet are typed and empty; those are looked up again by connecting again.
- Every column of the catalogue is there, whatever the files have, as are columns that only the files have. `run_id` is
  text and `rank` an integer, whatever they look like (a run may be called `123`).
- `time` is a plain TIMESTAMP in UTC: DuckDB's Python client cannot hand out zoned ones without another package.
- Nothing is ever written. `confine` makes that hold for text that somebody else typed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lm_telemetry.catalogue import PARTITIONS, TABLES, Metric, columns
from lm_telemetry.errors import QueryError, StoreError
from lm_telemetry.queries.view import list_views

if TYPE_CHECKING:
    import os

    import duckdb

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
_PARTITION_COMMENTS = {"run_id": "name of the run", "rank": "rank of the process that captured the row"}
_MANIFESTS = "_manifests"


def connect(store: str | os.PathLike[str]) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB over the store at `store`, with all tables and views; many may be open on a live run.

    Raises:
        StoreError: there is no store.
        QueryError: DuckDB is not installed.
    """
    try:
        import duckdb
    except ImportError as error:
        raise QueryError("asking the store takes DuckDB, which is not installed: pip install duckdb") from error
    root = Path(store).absolute()
    _require_store(root)
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    for table, purpose in TABLES.items():
        connection.execute(f"CREATE VIEW {_name(table)} AS {_select(connection, root, table)}")
        comments = {m.name: _comment(m.meaning, m.unit) for m in columns(table)}
        _comment_on(connection, table, purpose, _PARTITION_COMMENTS | comments)
    for view in list_views():
        connection.execute(f"CREATE VIEW {_name(view.name)} AS {view.sql}")
        _comment_on(connection, view.name, view.question, {c.name: _comment(c.meaning, c.unit) for c in view.columns})
    return connection


def confine(connection: duckdb.DuckDBPyConnection, store: str | os.PathLike[str]) -> None:
    """Let `connection` reach no file outside the store from now on, load nothing, and never undo this.

    DuckDB has no read-only directories: COPY and ATTACH inside the store must be kept out by their kind.
    """
    root = str(Path(store).absolute())
    # A glob is checked by its text, so that the path is allowed as the views spell it, too.
    connection.execute(f"SET allowed_directories = [{_text(root)}, {_text(_escape_glob(root))}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def _require_store(root: Path) -> None:
    if not root.exists():
        raise StoreError(
            f"there is no store at {root}; give the directory that the run was given as `store`", path=str(root)
        )
    captured = any(child.is_dir() for table in TABLES for child in (root / table).glob("run_id=*"))
    if not captured and not (root / _MANIFESTS).is_dir():
        raise StoreError(
            f"{root} is not a store: it has neither {_MANIFESTS}/ nor <table>/run_id=.../; give the directory that the"
            " run was given as `store`",
            path=str(root),
        )


def _select(connection: duckdb.DuckDBPyConnection, root: Path, table: str) -> str:
    """The SELECT behind a table's view: the parts if there are any, else no rows of the same types."""
    catalogued = columns(table)
    if next((root / table).glob("run_id=*/rank=*/*.parquet"), None) is None:
        nothing = [f"CAST(NULL AS {t}) AS {_name(c)}" for c, t in _PARTITION_TYPES.items()]
        nothing += [f"CAST(NULL AS {_TYPES[m.type]}) AS {_name(m.name)}" for m in catalogued]
        return f"SELECT {', '.join(nothing)} WHERE false"
    types = ", ".join(f"{c}: {t}" for c, t in _PARTITION_TYPES.items())
    pattern = _text(f"{_escape_glob(str(root))}/{table}/run_id=*/rank=*/*.parquet")
    parts = f"read_parquet({pattern}, union_by_name = true, hive_partitioning = true, hive_types = {{{types}}})"
    present = connection.sql(f"FROM {parts}").columns
    known = {*PARTITIONS, *(m.name for m in catalogued)}
    chosen = [_name(c) for c in PARTITIONS]
    chosen += [_column(m, is_present=m.name in present) for m in catalogued]
    chosen += [_name(c) for c in present if c not in known]
    return f"SELECT {', '.join(chosen)} FROM {parts}"  # noqa: S608 names and texts are quoted; views take no parameters


def _column(metric: Metric, *, is_present: bool) -> str:
    name = _name(metric.name)
    if not is_present:
        return f"CAST(NULL AS {_TYPES[metric.type]}) AS {name}"
    if metric.type == "timestamp":
        return f"{name} AT TIME ZONE 'UTC' AS {name}"
    return f"CAST({name} AS {_TYPES[metric.type]}) AS {name}"


def _comment(meaning: str, unit: str) -> str:
    return f"{meaning} [{unit}]" if unit not in {"", "1"} else meaning


def _comment_on(connection: duckdb.DuckDBPyConnection, view: str, purpose: str, comments: dict[str, str]) -> None:
    connection.execute(f"COMMENT ON VIEW {_name(view)} IS {_text(purpose)}")
    for column, comment in comments.items():
        connection.execute(f"COMMENT ON COLUMN {_name(view)}.{_name(column)} IS {_text(comment)}")


def _escape_glob(path: str) -> str:
    """`path` for DuckDB's glob, which reads `[`, `*` and `?` as patterns."""
    return "".join(f"[{c}]" if c in "[*?" else c for c in path)


def _name(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
