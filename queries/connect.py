"""A store as a DuckDB database: one view per table, and the views of the library.

    >>> con = connect("telemetry-store")  # doctest: +SKIP
    >>> con.sql("SELECT step, smoothed_loss FROM training")  # doctest: +SKIP

Decisions:

- Which files a table has is resolved through the manifests (`snapshot`) before each query, so that rows flushed
  meanwhile are seen while the run is live, and a compaction is seen as a whole or not at all. What did not change is
  not read again.
- A table shows the surviving history: rows of an attempt from the step on that a later attempt (the run was resumed
  from a checkpoint) has captured are left out. All rows there are stand in schema `raw` (`FROM raw.steps`).
- Every column of the catalogue is there, whatever the files have, as are columns that only the files have. `run_id` is
  text and `rank` an integer, whatever they look like (a run may be called `123`).
- `time` is a plain TIMESTAMP in UTC: DuckDB's Python client cannot hand out zoned ones without another package.
- A file that is missing or damaged makes a query fail with a QueryError that names it (`damage`), never with fewer
  rows. Of a relation (`con.sql`) that is so while it is made; fetch from it inside `explained()` to have it to the end.
- Of a store at an URL the manifests are copied and the tables read where they are (`mirror`).
- Nothing is ever written. `Connection.confine` makes that hold for text that somebody else typed.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lm_telemetry.catalogue import PARTITIONS, TABLES, Metric, columns, schema_id
from lm_telemetry.errors import QueryError, StoreError
from lm_telemetry.queries.damage import explain
from lm_telemetry.queries.snapshot import MANIFESTS, Snapshot
from lm_telemetry.queries.view import list_views
from lm_telemetry.remote import is_url

if TYPE_CHECKING:
    from collections.abc import Iterator

    import duckdb

    from lm_telemetry.queries.mirror import Mirror
    from lm_telemetry.queries.snapshot import Part

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
_GLOB = str.maketrans({c: f"[{c}]" for c in "[*?"})
_ASKING = frozenset({"sql", "query", "execute", "executemany", "table", "view"})
"""Methods of a DuckDB connection that look at tables."""
_FETCHING = frozenset({"fetchone", "fetchmany", "fetchall", "fetchdf", "df", "fetchnumpy", "fetch_df", "arrow", "pl"})
"""Methods that may read on: a result is not all there when `execute` returns."""


def connect(store: str | os.PathLike[str]) -> Connection:
    """An in-memory DuckDB over the store at `store`, with all tables and views; many may be open on a live run.

    `store` is a directory, or the URL of a place that fsspec can read (`s3://bucket/path`).

    Raises:
        StoreError: there is no store, or a manifest in it cannot be read.
        QueryError: DuckDB is not installed.
    """
    try:
        import duckdb
    except ImportError as error:
        raise QueryError("asking the store takes DuckDB, which is not installed: pip install duckdb") from error
    mirror = _mirror(store)
    root = Path(store).absolute() if mirror is None else mirror.path
    if mirror is None:
        _require_store(root)
    raw = duckdb.connect()
    if mirror is not None:
        raw.register_filesystem(mirror.files)
    raw.execute("SET TimeZone = 'UTC'")
    raw.execute("CREATE SCHEMA raw")
    raw.execute("SET python_scan_all_frames = true")  # `FROM df` names a variable of the caller of our method
    return Connection(raw, root, mirror=mirror)


class Connection:
    """A `duckdb.DuckDBPyConnection` that looks for new files before each query; all its methods are here."""

    def __init__(
        self,
        raw: duckdb.DuckDBPyConnection,
        root: Path,
        tables: _Tables | None = None,
        *,
        mirror: Mirror | None = None,
    ) -> None:
        self._raw = raw
        self._root = root
        self._mirror = mirror
        self._base = str(root) if mirror is None else mirror.url
        self._tables = _Tables() if tables is None else tables
        self._snapshot: Snapshot | None = None
        self.refresh()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._raw, name)
        if name not in _ASKING and name not in _FETCHING:
            return attribute

        def ask(*args: Any, **kwargs: Any) -> Any:
            if name in _ASKING:
                self.refresh()
            with self.explained():
                answer = attribute(*args, **kwargs)
            return self if answer is self._raw else answer

        return ask

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._raw.close()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """A context from which errors that a damaged or missing file causes come out as QueryError, and name it."""
        try:
            yield
        except Exception as error:
            explained = None if self._snapshot is None else explain(error, self._raw, self._snapshot)
            if explained is None:
                raise
            raise explained from error

    def cursor(self) -> Connection:
        """Another connection to the same tables, for another thread."""
        return Connection(self._raw.cursor(), self._root, self._tables, mirror=self._mirror)

    def refresh(self) -> None:
        """Look for what was written, compacted or removed since; every query begins with this.

        Raises:
            StoreError: a manifest cannot be read.
        """
        if self._mirror is not None:
            self._mirror.refresh()
        snapshot = Snapshot.take(self._root, self._snapshot, base=self._base)
        if snapshot is not self._snapshot:
            for table, parts in snapshot.tables.items():
                if self._snapshot is None or self._snapshot.tables.get(table) != parts:
                    base = _escape_glob(self._base)
                    files = [f"{base}/{_escape_glob(part.file)}" for part in parts]
                    self._raw.execute(f"SET VARIABLE {_files_of(table)} = ?", [files])
            self._snapshot = snapshot
        with self.explained():
            self._tables.define(self._raw, snapshot)

    def confine(self) -> None:
        """Reach no file outside the store from now on, load nothing, and never undo this.

        DuckDB has no read-only directories: COPY and ATTACH inside the store must be kept out by their kind.
        """
        root = self._base
        # A glob is checked by its text, so that the path is allowed as the views spell it, too.
        self._raw.execute(f"SET allowed_directories = [{_text(root)}, {_text(_escape_glob(root))}]")
        self._raw.execute("SET enable_external_access = false")
        self._raw.execute("SET lock_configuration = true")


class _Tables:
    """The views of one database, made anew where their definition has changed."""

    def __init__(self) -> None:
        self._tables: dict[str, tuple[str, str]] = {}
        self._layouts: dict[tuple[str, frozenset[str | None]], list[str]] = {}

    def define(self, raw: duckdb.DuckDBPyConnection, snapshot: Snapshot) -> None:
        """Views of tables whose files have other columns than before or that were overtaken; of the library, once."""
        library_is_missing = not self._tables
        cuts = _cut_rows(snapshot)
        for table, parts in snapshot.tables.items():
            every = self._select(raw, snapshot.base, table, parts)
            surviving = f"FROM raw.{_name(table)} AS r"
            if cuts and table != "runs":
                surviving += f" WHERE NOT EXISTS (FROM ({cuts}) AS c WHERE {_OVERTAKEN})"
            if self._tables.get(table) == (every, surviving):
                continue
            self._tables[table] = (every, surviving)
            comments = _PARTITION_COMMENTS | {m.name: _comment(m.meaning, m.unit) for m in columns(table)}
            for schema, body in (("raw", every), ("main", surviving)):
                raw.execute(f"CREATE OR REPLACE VIEW {schema}.{_name(table)} AS {body}")
                _comment_on(raw, f"{schema}.{_name(table)}", TABLES[table], comments)
        if library_is_missing:
            for view in list_views():
                raw.execute(f"CREATE VIEW {_name(view.name)} AS {view.sql}")
                comments = {c.name: _comment(c.meaning, c.unit) for c in view.columns}
                _comment_on(raw, _name(view.name), view.question, comments)

    def _select(self, raw: duckdb.DuckDBPyConnection, base: str, table: str, parts: list[Part]) -> str:
        """The SELECT of all rows of a table: from its parts if there are any, else no rows of the same types."""
        catalogued = columns(table)
        if not parts:
            nothing = [f"CAST(NULL AS {t}) AS {_name(c)}" for c, t in _PARTITION_TYPES.items()]
            nothing += [f"CAST(NULL AS {_TYPES[m.type]}) AS {_name(m.name)}" for m in catalogued]
            return f"SELECT {', '.join(nothing)} WHERE false"
        written = frozenset(part.schema for part in parts)
        present = self._present(raw, base, table, parts, written)
        known = {*PARTITIONS, *(m.name for m in catalogued)}
        chosen = [_name(c) for c in PARTITIONS]
        chosen += [_column(m, is_present=m.name in present) for m in catalogued]
        chosen += [_name(c) for c in present if c not in known]
        source = _source(f"getvariable({_text(_files_of(table))})", alike=len(written) == 1 and None not in written)
        return f"SELECT {', '.join(chosen)} FROM {source}"  # noqa: S608 names and texts are quoted; views take no parameters

    def _present(
        self, raw: duckdb.DuckDBPyConnection, base: str, table: str, parts: list[Part], written: frozenset[str | None]
    ) -> list[str]:
        """The columns that the files of a table have; files are opened only where no manifest tells."""
        if written == {schema_id(table)}:
            return [m.name for m in columns(table)]
        key = (table, written)
        if key not in self._layouts or None in written:
            one_of_each = {part.schema or part.file: part.file for part in parts}
            files = ", ".join(_text(_escape_glob(f"{base}/{file}")) for file in one_of_each.values())
            self._layouts[key] = raw.sql(f"FROM {_source(f'[{files}]', alike=False)}").columns
        return self._layouts[key]


_OVERTAKEN = "c.run_id = r.run_id AND c.rank = r.rank AND c.attempt = r.attempt AND r.step >= c.step"


_UNTOLD = """
    SELECT earlier.run_id, earlier.rank, earlier.attempt, min(later.step) AS step
    FROM starts AS earlier JOIN starts AS later
        ON later.run_id = earlier.run_id AND later.rank = earlier.rank AND later.attempt > earlier.attempt
    GROUP BY ALL
"""


def _cut_rows(snapshot: Snapshot) -> str:
    """Where attempts were overtaken, as the text of a relation; empty if none was."""
    rows = ", ".join(f"({_text(c.run_id)}, {c.rank}, {c.attempt}, {c.step})" for c in snapshot.cuts)
    cuts = [f"FROM (VALUES {rows}) AS v(run_id, rank, attempt, step)"] if rows else []
    if snapshot.untold:
        names = ", ".join(map(_text, snapshot.untold))
        starts = "SELECT run_id, rank, attempt, min(step) AS step FROM raw.steps"
        cuts.append(f"WITH starts AS ({starts} WHERE run_id IN ({names}) GROUP BY ALL) {_UNTOLD}")
    return " UNION ALL ".join(f"({cut})" for cut in cuts)


def _source(files: str, *, alike: bool) -> str:
    types = ", ".join(f"{c}: {t}" for c, t in _PARTITION_TYPES.items())
    union = "" if alike else "union_by_name = true, "
    return f"read_parquet({files}, {union}hive_partitioning = true, hive_types = {{{types}}})"


def _files_of(table: str) -> str:
    """The variable of a connection that holds the files of a table."""
    return f"lm_telemetry_files_{table}"


def _mirror(store: str | os.PathLike[str]) -> Mirror | None:
    """The mirror of a store at an URL; None for a local one."""
    name = os.fspath(store)
    if not is_url(name):
        return None
    try:
        from lm_telemetry.queries.mirror import Mirror
    except ImportError as error:
        raise QueryError(f"reading {name} takes fsspec: pip install 'lm-telemetry[remote]'") from error
    return Mirror(name)


def _require_store(root: Path) -> None:
    if not root.exists():
        raise StoreError(
            f"there is no store at {root}; give the directory that the run was given as `store`", path=str(root)
        )
    captured = any(child.is_dir() for table in TABLES for child in (root / table).glob("run_id=*"))
    if not captured and not (root / MANIFESTS).is_dir():
        raise StoreError(
            f"{root} is not a store: it has neither {MANIFESTS}/ nor <table>/run_id=.../; give the directory that the"
            " run was given as `store`",
            path=str(root),
        )


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
    statements = [f"COMMENT ON VIEW {view} IS {_text(purpose)}"]
    statements += [
        f"COMMENT ON COLUMN {view}.{_name(column)} IS {_text(comment)}" for column, comment in comments.items()
    ]
    connection.execute(";".join(statements))


def _escape_glob(path: str) -> str:
    """`path` for DuckDB's glob, which reads `[`, `*` and `?` as patterns."""
    return path.translate(_GLOB)


def _name(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
