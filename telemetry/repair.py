"""What a crash, a careless hand or a bad disk has left of a store becomes a store again, without deleting a row.

For each rank of each run that is not being written:

- temporaries of killed processes are removed: no reader ever saw them;
- a part that was written and not yet listed is brought in; a manifest that is damaged is written anew from the parts;
- what is damaged, or is a copy of another file, is moved to `<store>/_quarantine/`, under the path it had, and
  acknowledged rows that are nowhere else are noted as lost, so that the loss stays on record;
- the manifest of a compaction is derived from what the compacted files say of themselves (`coverage`): it lists those
  that are whole and hold no rows twice, and parts that are still there in place of those that are not;
- where a compaction was killed as it made a file visible to all readers, that is brought to its end.

Repairing twice changes nothing more, and `verify` finds no error or warning afterwards. Foreign files are not touched.

Left out: recovering rows from damaged files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lm_telemetry.compaction import finish, locked
from lm_telemetry.coverage import KEY, coverage
from lm_telemetry.errors import StoreError
from lm_telemetry.inventory import Inventory, checksum, describe, is_parquet, metadata, part_key, ranks, run_ids
from lm_telemetry.liveness import is_live
from lm_telemetry.quarantine import Log, Repaired
from lm_telemetry.rebuild import Whole, rebuild
from lm_telemetry.store import Store
from lm_telemetry.verify import differences
from lm_telemetry.visibility import compact_key

if TYPE_CHECKING:
    import os

    from lm_telemetry.store import PartInfo


def repair(path: str | os.PathLike[str], *, deep: bool = False, even_live: bool = False) -> list[Repaired]:
    """Mend the store at `path`; what was done. Runs that are being written are left alone unless `even_live`.

    Args:
        path: the store.
        deep: also read every value and compare checksums, as `verify(deep=True)` does.
        even_live: do not ask whether a run is being written; what its writer has in hand may be taken for leftovers.

    Raises:
        StoreError: there is no store, or it cannot be written.
    """
    store = Store(Path(path).absolute())
    if not store.path.is_dir():
        raise StoreError(f"there is no store at {store.path}", path=str(store.path))
    log = Log(store.path)
    try:
        for probe in store.path.glob(".probe-*"):
            log.remove(probe)
        for run_id in run_ids(store):
            _repair_run(store, run_id, log, deep=deep, even_live=even_live)
    except OSError as error:
        raise StoreError(f"cannot repair {store.path}: {error}", path=str(store.path)) from error
    return log.done


def _repair_run(store: Store, run_id: str, log: Log, *, deep: bool, even_live: bool) -> None:
    manifests = store.manifests(run_id)
    try:
        if store.is_pruned(run_id):
            return
    except StoreError as error:
        log.set_aside(Path(error.path), str(error))
    if not even_live and is_live(store, run_id):
        log.note("skipped", manifests, "it is being written, or was just now by a host we cannot ask; try later")
        return
    directory = manifests / "compaction"
    directory.mkdir(parents=True, exist_ok=True)
    for rank in ranks(store, run_id):
        with locked(directory / f".rank={rank}.lock") as ours:
            if ours:
                _Rank(Inventory.take(store, run_id, rank), log, deep=deep).repair()
            else:
                log.note("skipped", directory / f"rank={rank}.json", "it is being compacted; try again")
    for temporary in manifests.glob("*/.*.tmp"):
        log.remove(temporary)


class _Rank:
    """One rank, with nobody else at it."""

    def __init__(self, inventory: Inventory, log: Log, *, deep: bool) -> None:
        self._inventory = inventory
        self._store = inventory.store
        self._log = log
        self._deep = deep
        self._listed = {part.file: part for manifest in inventory.manifests.values() for part in manifest.parts}
        self._whole = Whole()

    def repair(self) -> None:
        for path in self._inventory.temporaries:
            self._log.remove(path)
        self._set_aside_what_stops_queries()
        if self._is_foreign():
            return
        for table in self._inventory.disk:
            self._restore_renamed(table)
            self._sift(table)
        rebuild(self._inventory, self._whole, self._log)
        for file in finish(self._store, self._inventory.run_id, self._inventory.rank):
            self._log.note("compaction", self._store.path / file, "visible to all readers; what it replaces is deleted")

    def _set_aside_what_stops_queries(self) -> None:
        """A rank that has no manifest is read file by file, whatever their names."""
        if self._inventory.manifests or self._inventory.unreadable:
            return
        for files in self._inventory.disk.values():
            for name, path in list(files.items()):
                if name.endswith(".parquet") and not is_parquet(path):
                    self._log.set_aside(path, "it is no Parquet, and its rank has no manifest")
                    del files[name]

    def _is_foreign(self) -> bool:
        """Whether the rank has no manifest and other people's files: then its directories are what is read."""
        if self._inventory.manifests or self._inventory.unreadable:
            return False
        paths = [path for files in self._inventory.disk.values() for path in files.values()]
        files = [self._inventory.relative(path) for path in paths if path.suffix == ".parquet"]
        return any(part_key(file) is None and compact_key(file) is None for file in files)

    def _restore_renamed(self, table: str) -> None:
        """Give parts that were renamed their names back: they are known by size and checksum."""
        disk = self._inventory.disk[table]
        missing = {
            (part.bytes, part.crc32): part
            for part in self._listed.values()
            if part.table == table and part.crc32 is not None and Path(part.file).name not in disk
        }
        for name, path in list(disk.items()):
            if not missing or self._inventory.relative(path) in self._listed or not path.is_file():
                continue
            size = path.stat().st_size
            part = missing.pop((size, checksum(path)), None) if any(size == m for m, _ in missing) else None
            if part is not None:
                target = self._store.path / part.file
                path.rename(target)
                del disk[name]
                disk[target.name] = target
                self._log.note("restored", target, f"it was called {name}")

    def _sift(self, table: str) -> None:
        """Set aside what is damaged or a copy; the rest are the table's parts and compacted files."""
        listed_bytes: dict[tuple[int, int | None], str] = {
            (p.bytes, p.crc32): p.file for p in self._listed.values() if p.crc32 and p.table == table
        }
        for name, path in sorted(self._inventory.disk[table].items()):
            key = part_key(name)
            file = self._inventory.relative(path)
            if not path.is_file() or (key is None and compact_key(file) is None):
                continue
            listed = self._listed.get(file) or self._compacted(file)
            try:
                found = describe(self._store, path, table, deep=self._deep or listed is None)
                if listed is not None:
                    problem = differences(listed, found)
                    found = self._settle(path, listed, problem) if problem else listed
            except StoreError as error:
                self._log.set_aside(path, str(error))
                continue
            if key is None:
                self._whole.compacted.setdefault(table, []).append((found, coverage(name, metadata(path)) or {}))
                continue
            if listed is None and KEY in metadata(path):
                self._log.set_aside(path, "it is a copy of a compacted file")
                continue
            if listed is None:
                copy_of = listed_bytes.setdefault((found.bytes, found.crc32), found.file)
                if copy_of != found.file:
                    self._log.set_aside(path, f"it is a copy of {copy_of}")
                    continue
            self._whole.parts.setdefault(table, {})[key] = found

    def _compacted(self, file: str) -> PartInfo | None:
        return next((f for files in self._inventory.compacted.values() for f in files if f.file == file), None)

    def _settle(self, path: Path, listed: PartInfo, problem: list[str]) -> PartInfo:
        """A listed file that was written by somebody else since: kept if all its rows are there.

        Raises:
            StoreError: it is not what was written.
        """
        found = describe(self._store, path, listed.table, deep=True)
        same_rows = (found.rows, found.first_step, found.last_step) == (
            listed.rows,
            listed.first_step,
            listed.last_step,
        )
        if not same_rows or found.bytes == listed.bytes:
            raise StoreError(f"not what was written: {'; '.join(problem)}", path=str(path))
        self._log.note("relisted", path, f"it was rewritten with the same rows: {'; '.join(problem)}")
        return found
