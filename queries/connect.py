"""A store as a DuckDB database: one view per table, and the views of the library.

    >>> con = connect("telemetry-store")  # doctest: +SKIP
    >>> con.sql("SELECT step, smoothed_loss FROM training")  # doctest: +SKIP

Decisions:

- A view is made when a query first names it (`tables`): connecting costs next to nothing, however many there are.
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

from lm_telemetry.catalogue import TABLES
from lm_telemetry.errors import QueryError, StoreError
from lm_telemetry.queries.damage import explain
from lm_telemetry.queries.snapshot import MANIFESTS, Snapshot
from lm_telemetry.queries.tables import Tables, escape_glob, files_of, text
from lm_telemetry.remote import is_url

if TYPE_CHECKING:
    from collections.abc import Iterator

    import duckdb

    from lm_telemetry.queries.mirror import Mirror
    from lm_telemetry.queries.snapshot import Part

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
    # `can_have_nan` (see `tables`) has DuckDB 2.0 answer `max(loss)` from a file's statistics: NaN, whatever is there.
    raw.execute("SET disabled_optimizers = 'statistics_propagation'")
    raw.execute("SET parquet_metadata_cache = true")  # a file never changes under its name: a fifth off 1,000 parts
    return Connection(raw, root, mirror=mirror)


class Connection:
    """A `duckdb.DuckDBPyConnection` that looks for new files before each query; all its methods are here."""

    def __init__(
        self,
        raw: duckdb.DuckDBPyConnection,
        root: Path,
        tables: Tables | None = None,
        *,
        mirror: Mirror | None = None,
    ) -> None:
        self._raw = raw
        self._root = root
        self._mirror = mirror
        self._base = str(root) if mirror is None else mirror.url
        self._tables = Tables() if tables is None else tables
        self._told: dict[str, list[Part]] = {}
        """by table, the files that are in this connection's variable"""
        self._snapshot = Snapshot.take(self._root, base=self._base)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._raw, name)
        if name not in _ASKING and name not in _FETCHING:
            return attribute

        def ask(*args: Any, **kwargs: Any) -> Any:
            if name in _ASKING:
                self.refresh()
                answer = self._ask(attribute, _query_of(args, kwargs), args, kwargs)
            else:
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
            explained = explain(error, self._raw, self._snapshot)
            if explained is None:
                raise
            raise explained from error

    @property
    def snapshot(self) -> Snapshot:
        """The files that the last query was answered from."""
        return self._snapshot

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
        self._snapshot = Snapshot.take(self._root, self._snapshot, base=self._base)

    def _ask(self, method: Any, query: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method with the views that `query` takes; with all, if it names one in a way we did not see."""
        import duckdb

        self._define(query)
        with self.explained():
            try:
                return method(*args, **kwargs)
            except duckdb.CatalogException:
                # A single statement that is not understood has done nothing yet. With all views there, DuckDB also
                # knows better which one may have been meant.
                has_all = query is None or self._tables.has_all(self._snapshot)
                if has_all or len(self._raw.extract_statements(query)) != 1:
                    raise
                self._define(None)
                return method(*args, **kwargs)

    def _define(self, query: str | None) -> None:
        """Make the views that a query takes, None for all, and tell them their files."""
        snapshot = self._snapshot
        wanted = self._tables.wanted(snapshot, query)
        for table in wanted & snapshot.tables.keys():
            parts = snapshot.tables[table]
            if self._told.get(table) != parts:
                base = escape_glob(self._base)
                files = [f"{base}/{escape_glob(part.file)}" for part in parts]
                self._raw.execute(f"SET VARIABLE {files_of(table)} = ?", [files])
                self._told[table] = parts
        with self.explained():
            self._tables.define(self._raw, snapshot, wanted, query)

    def confine(self) -> None:
        """Reach no file outside the store from now on, load nothing, and never undo this.

        DuckDB has no read-only directories: COPY and ATTACH inside the store must be kept out by their kind.
        """
        root = self._base
        # A glob is checked by its text, so that the path is allowed as the views spell it, too.
        self._raw.execute(f"SET allowed_directories = [{text(root)}, {text(escape_glob(root))}]")
        self._raw.execute("SET enable_external_access = false")
        self._raw.execute("SET lock_configuration = true")


def rows_of(asked: Any) -> list[dict[str, Any]]:
    """The answer of `execute` row by row, by the names of the columns: NULL is None, NaN is NaN."""
    names = [name for name, *_ in asked.description]
    return [dict(zip(names, row, strict=True)) for row in asked.fetchall()]


def _query_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """The text of what is asked: a query, a statement or the name of a table; None if it is something else."""
    asked = next(iter((*args, *kwargs.values())), None)
    query = getattr(asked, "query", asked)
    return query if isinstance(query, str) else None


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
