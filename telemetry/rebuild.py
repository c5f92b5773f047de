"""The manifests of one rank, derived from the files that are whole, and written where they say something else.

Which compacted files are in force follows from what each says it covers: those in force before, then the newest, none
that holds a part twice, and none whose parts are all there anyway. Parts below the last that is covered, and not
covered, are listed beside them, so that the one bound per attempt of the compaction's manifest still holds. Of a file
that is there under both its names, the hidden one is taken: `finish` makes it visible for good, and deletes what it
replaces.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from lm_telemetry.compaction import write_compaction
from lm_telemetry.coverage import Coverage, has, overlap, union
from lm_telemetry.inventory import part_key
from lm_telemetry.store import Manifest, PartInfo
from lm_telemetry.visibility import compact_key, is_hidden, visible

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_telemetry.inventory import Inventory
    from lm_telemetry.quarantine import Log


@dataclass(slots=True)
class Whole:
    """The files of a rank that are whole."""

    parts: dict[str, dict[tuple[int, int], PartInfo]] = field(default_factory=dict)
    """by table and (attempt, sequence number)"""
    compacted: dict[str, list[tuple[PartInfo, Coverage]]] = field(default_factory=dict)
    """by table, with what each covers"""


def rebuild(inventory: Inventory, whole: Whole, log: Log) -> None:
    """Write the manifests of the rank that say what is there, and note what is lost."""
    _Rebuild(inventory, whole, log).run()


class _Rebuild:
    def __init__(self, inventory: Inventory, whole: Whole, log: Log) -> None:
        self._inventory = inventory
        self._store = inventory.store
        self._parts, self._compact = whole.parts, whole.compacted
        self._log = log

    def run(self) -> None:
        listed = {part.table for manifest in self._inventory.manifests.values() for part in manifest.parts}
        tables = sorted({*self._inventory.disk, *self._inventory.compacted, *listed})
        chosen = {table: self._choose(table) for table in tables}
        self._write_manifests(chosen)
        self._write_compaction(chosen)

    def _choose(self, table: str) -> tuple[list[PartInfo], Coverage]:
        """Files that stand for replaced parts, and the coverage of the compacted ones among them."""
        current = {file.file for file in self._inventory.compacted.get(table, [])}
        whole = self._compact.get(table, [])
        names = {file.file for file, _ in whole}
        parts = self._parts.get(table, {})

        def preference(entry: tuple[PartInfo, Coverage]) -> tuple[bool, list[int], bool]:
            """Those in force first, then the newest, then by the hidden name."""
            file = entry[0].file
            return file not in current, [-number for number in compact_key(file) or ()], not is_hidden(file)

        files: list[PartInfo] = []
        covered: Coverage = {}
        for file, mine in sorted(whole, key=preference):
            keys = [(attempt, seq) for attempt, spans in mine.items() for lo, hi in spans for seq in range(lo, hi)]
            is_shown = is_hidden(file.file) and visible(file.file) in names
            is_needed = file.file in current or is_shown or any(key not in parts for key in keys)
            if keys and is_needed and not overlap(covered, mine):
                files.append(file)
                covered = union([covered, mine])
        bounds = _bounds(covered)
        for (attempt, seq), part in sorted(parts.items()):
            if seq < bounds.get(attempt, 0) and not has(covered, attempt, seq):
                files.append(part)
        return files, covered

    def _write_manifests(self, chosen: dict[str, tuple[list[PartInfo], Coverage]]) -> None:
        """A manifest for each attempt, of what is there; written where it says something else than before."""
        inventory = self._inventory
        attempts = {*inventory.manifests, *inventory.unreadable}
        attempts |= {attempt for parts in self._parts.values() for attempt, _ in parts}
        attempts |= {attempt for _, covered in chosen.values() for attempt in covered}
        for attempt in sorted(attempts):
            old = inventory.manifests.get(attempt)
            new = Manifest(run_id=inventory.run_id, rank=inventory.rank, attempt=attempt)
            if old is not None:
                self._keep(old, new, chosen)
            self._adopt(old, new, chosen)
            self._note_gaps(new, chosen)
            if old is None or (old.parts, old.lost) != (new.parts, new.lost):
                path = self._store.manifest_path(inventory.run_id, inventory.rank, attempt)
                if attempt in inventory.unreadable:
                    self._log.set_aside(path, inventory.unreadable[attempt])
                self._store.write_manifest(new, seal=False)
                self._log.note("manifest", path, f"written anew: {len(new.parts)} parts, {len(new.lost)} lost")

    def _keep(self, old: Manifest, new: Manifest, chosen: dict[str, tuple[list[PartInfo], Coverage]]) -> None:
        """What the old manifest lists: still there, or lost."""
        new.lost = list(old.lost)
        known: set[str] = set()
        for part in old.parts:
            key = part_key(part.file)
            if key is None or key[0] != old.attempt or part.file in known:
                continue
            known.add(part.file)
            here = self._parts.get(part.table, {}).get(key)
            if has(chosen[part.table][1], *key):
                new.parts.append(part)
            elif here is not None:
                new.parts.append(here)
            else:
                new.lost.append(part)
                rows = f"{part.rows} rows, steps {part.first_step} to {part.last_step}, are in no file"
                self._log.note("lost", self._store.path / part.file, rows)

    def _adopt(self, old: Manifest | None, new: Manifest, chosen: dict[str, tuple[list[PartInfo], Coverage]]) -> None:
        """What is there and was not listed."""
        known = {part.file for part in new.parts}
        for table, (files, covered) in chosen.items():
            for key, part in sorted(self._parts.get(table, {}).items()):
                if key[0] == new.attempt and part.file not in known and not has(covered, *key):
                    new.parts.append(part)
                    if old is not None:
                        self._log.note(
                            "adopted", self._store.path / part.file, f"{part.rows} rows that were not listed"
                        )
            if old is None and new.attempt in covered:
                new.parts.append(self._stand_in(table, new.attempt, files, covered))

    def _note_gaps(self, new: Manifest, chosen: dict[str, tuple[list[PartInfo], Coverage]]) -> None:
        """Parts that are in no file and no list, though later ones are: lost, who knows how many rows."""
        for table, (_, covered) in chosen.items():
            keys = [part_key(part.file) for part in (*new.parts, *new.lost) if part.table == table]
            known = {key[1] for key in keys if key is not None}
            for seq in sorted(set(range(min(known, default=0), max(known, default=0))) - known):
                if not has(covered, new.attempt, seq):
                    directory = self._store.partition(table, new.run_id, new.rank)
                    path = directory / f"part-{new.attempt}-{seq}.parquet"
                    file = self._inventory.relative(path)
                    new.lost.append(PartInfo(table=table, file=file, rows=0, bytes=0, first_step=None, last_step=None))
                    self._log.note("lost", path, "it was in no manifest and is in no file; later parts are")

    def _stand_in(self, table: str, attempt: int, files: list[PartInfo], covered: Coverage) -> PartInfo:
        """One entry for all parts that compaction has replaced, so that it stays known where the attempt began."""
        steps: list[Any] = [
            pq.read_table(
                self._store.path / file.file, columns=["step"], filters=[("attempt", "==", attempt)], partitioning=None
            )["step"]
            for file in files
        ]
        bounds: list[Any] = [pc.min_max(column).as_py() for column in steps if len(column)]
        name = f"part-{attempt}-{covered[attempt][0][0]}.parquet"
        target = self._store.partition(table, self._inventory.run_id, self._inventory.rank) / name
        return PartInfo(
            table=table,
            file=self._inventory.relative(target),
            rows=sum(map(len, steps)),
            bytes=0,
            first_step=min((b["min"] for b in bounds), default=None),
            last_step=max((b["max"] for b in bounds), default=None),
        )

    def _write_compaction(self, chosen: dict[str, tuple[list[PartInfo], Coverage]]) -> None:
        """The compaction's manifest, if there is anything that it must say, and it does not say so."""
        inventory = self._inventory
        files = {table: found for table, (found, _) in chosen.items() if found}
        replaces = {table: _bounds(covered) for table, (_, covered) in chosen.items() if covered}
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        # Nothing else: a part that was to be deleted may be all that is left of its rows.
        spare = {file: by for table, (found, _) in chosen.items() for file, by in self._spare(table, found)}
        retired = {file: inventory.retired.get(file, now) for file in spare}
        before = {table: {file.file: file for file in found} for table, found in inventory.compacted.items()}
        after = {table: {file.file: file for file in found} for table, found in files.items()}
        same = (before, inventory.replaces, set(inventory.retired)) == (after, replaces, set(retired))
        if same and not inventory.compaction_error:
            return
        if inventory.compaction_error:
            self._log.set_aside(inventory.compaction_path, inventory.compaction_error)
        if not files and not retired:
            inventory.compaction_path.unlink(missing_ok=True)
            self._log.note("compaction", inventory.compaction_path, "removed: nothing is compacted any more")
            return
        paths = [inventory.relative(path) for found in inventory.disk.values() for path in found.values()]
        generation = max([inventory.generation, *(key[0] for path in paths if (key := compact_key(path)))])
        write_compaction(
            inventory.compaction_path,
            generation=generation,
            replaces={table: {str(a): seq for a, seq in bounds.items()} for table, bounds in replaces.items()},
            files=files,
            retired=[{"file": file, "at": at, "by": spare[file]} for file, at in retired.items()],
        )
        count = sum(map(len, files.values()))
        self._log.note(
            "compaction", inventory.compaction_path, f"written anew: {count} files, {len(retired)} to be deleted"
        )

    def _spare(self, table: str, chosen: list[PartInfo]) -> Iterator[tuple[str, str]]:
        """Files of a table whose rows are in chosen ones, each with the chosen one that is hidden while it is there."""
        kept = {file.file for file in chosen}
        compacted = [(file.file, covered) for file, covered in self._compact.get(table, [])]
        in_force = [(file, covered) for file, covered in compacted if file in kept]
        second_names = {visible(file) for file in kept if is_hidden(file)}
        others = [(file, covered) for file, covered in compacted if file not in kept | second_names]
        others += [(p.file, {key[0]: [(key[1], key[1] + 1)]}) for key, p in sorted(self._parts.get(table, {}).items())]
        everything = union(covered for _, covered in in_force)
        for file, mine in others:
            if compact_key(file) or overlap(everything, mine):
                by = (name for name, covered in in_force if is_hidden(name) and overlap(covered, mine))
                yield file, "" if is_hidden(file) else next(by, "")


def _bounds(covered: Coverage) -> dict[int, int]:
    """By attempt, the number past the last that is covered."""
    return {attempt: max(hi for _, hi in spans) for attempt, spans in covered.items()}
