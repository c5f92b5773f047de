"""What a store holds: the files of each run, and when it was written last; what has not changed is not looked at again.

A run's files are the same object from one look to the next for as long as nothing was written, compacted or repaired,
so that whoever has read them knows. The store need not be there yet.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lm_telemetry.errors import QueryError, StoreError
from lm_telemetry.exporters.written import Manifests
from lm_telemetry.queries.snapshot import Snapshot

if TYPE_CHECKING:
    import duckdb

    from lm_telemetry.queries.mirror import Mirror
    from lm_telemetry.queries.snapshot import Part

Tables = dict[str, list["Part"]]
"""Files of a run by table."""

THREADS = 2
"""Of the database: it shares the machine with whatever trains there."""


class Holdings:
    """The store at `name`, a directory or, with `is_remote`, an URL. Nothing is looked at before the first `look`.

    Attributes:
        files: of each run, by name.
        times: Unix time at which each run was last written; 0 where nothing tells.
        ranks: of each run, in order.
        generation: how often all runs were gone and others came. Files of one are none of another, however alike.
        manifests: of each run.
    """

    def __init__(self, name: str, *, is_remote: bool) -> None:
        self.name = name if is_remote else str(Path(name).absolute())
        self.files: dict[str, Tables] = {}
        self.times: dict[str, float] = {}
        self.ranks: dict[str, list[int]] = {}
        self.manifests: dict[str, Manifests] = {}
        self.generation = 0
        self._is_remote, self._is_gone = is_remote, False
        self._mirror: Mirror | None = None
        self._snapshot: Snapshot | None = None

    @property
    def snapshot(self) -> Snapshot:
        """What the last look has found."""
        assert self._snapshot is not None, "look first"
        return self._snapshot

    def look(self) -> None:
        """Bring it up to date.

        Raises:
            StoreError: a manifest cannot be read, or all runs are gone; what was found before stays.
            QueryError: the store is at an URL, and fsspec is not installed.
        """
        root = self._root()
        snapshot = Snapshot.take(root, self._snapshot, base=None if self._mirror is None else self._mirror.url)
        if self.files and not any(snapshot.tables.values()):
            self._snapshot, self._is_gone = snapshot, True
            raise StoreError("all its runs are gone", path=self.name)
        if snapshot is self._snapshot:
            return
        files: dict[str, Tables] = {}
        for table, parts in snapshot.tables.items():
            for part in parts:
                files.setdefault(part.run_id, {}).setdefault(table, []).append(part)
        if self._is_gone:
            self._is_gone, self.generation, self.files = False, self.generation + 1, {}
        same = {run_id: before for run_id, before in self.files.items() if files.get(run_id) == before}
        manifests = {run_id: self.manifests.get(run_id) or Manifests(root, run_id) for run_id in files}
        times = {
            run_id: self.times[run_id] if run_id in same else manifests[run_id].last_written() or self._modified(tables)
            for run_id, tables in files.items()
        }
        ranks = {
            run_id: self.ranks[run_id] if run_id in same else sorted({p.rank for ps in tables.values() for p in ps})
            for run_id, tables in files.items()
        }
        self.files, self.times, self.ranks, self.manifests = {**files, **same}, times, ranks, manifests
        self._snapshot = snapshot

    def database(self) -> duckdb.DuckDBPyConnection:
        """A database that can read the files, to be closed by the caller.

        Raises:
            QueryError: DuckDB is not installed.
        """
        try:
            import duckdb
        except ImportError as error:
            raise QueryError("it takes DuckDB, which is not installed: pip install duckdb") from error
        raw = duckdb.connect(config={"threads": THREADS})
        if self._mirror is not None:
            raw.register_filesystem(self._mirror.files)
        raw.execute("SET TimeZone = 'UTC'")
        return raw

    def _root(self) -> Path:
        """Where the manifests are, brought up to date."""
        if not self._is_remote:
            return Path(self.name)
        if self._mirror is not None:
            self._mirror.refresh()
            return self._mirror.path
        try:
            from lm_telemetry.queries.mirror import Mirror
        except ImportError as error:
            raise QueryError("it takes fsspec: pip install 'lm-telemetry[remote]'") from error
        self._mirror = Mirror(self.name)
        return self._mirror.path

    def _modified(self, tables: Tables) -> float:
        """When the newest file was written, as the filesystem tells; 0 at an URL, where it is not asked."""
        latest = 0.0
        for parts in [] if self._is_remote else tables.values():
            for part in parts:
                with suppress(OSError):
                    latest = max(latest, (Path(self.name) / part.file).stat().st_mtime)
        return latest
