"""Compaction: many small parts of a rank become a few large sorted files, under readers and beside its live writer.

    <store>/_merged/<table>/run_id=<id>/rank=<r>/compact-<generation>-<n>.merged    at first
    <store>/<table>/run_id=<id>/rank=<r>/compact-<generation>-<n>.parquet           when what it replaces is deleted
    <store>/_manifests/run_id=<id>/compaction/rank=<r>.json

For our readers the one file that decides is the compaction's manifest. It lists the compacted files and, for each table
and attempt, the sequence number below which parts are replaced by them; it is put in place whole, so they see the rows
in the parts or in the compacted files, never in both and never in neither. The writer's own manifest is not touched.

Decisions:

- A file holds whole consecutive parts of `FILE_ROWS` rows or a little more, sorted (`merging`), in row groups of
  `GROUP_ROWS`. So the last steps are one file. A file that is full is never written again: a run that is compacted
  often costs no more in all.
- What was replaced is deleted only after a grace, for queries that have resolved their files already. A rename or an
  immediate deletion gives a reader who globs wrong answers.
- Until then the compacted file is hidden from readers who do not know our manifests (`visibility`): they go on reading
  what it replaces. After the grace it is given its visible name, and what it replaces is deleted at once; the manifest
  then lists the visible name, and the hidden one goes another grace later. So ours are given no name that is about to
  go. Others may meet its rows twice, never not at all, while those files are being deleted: milliseconds.
- A file is not merged again while it is hidden, so that what is hidden has only visible files to wait for.
- Each compacted file says in its metadata which parts it holds (`coverage`), so that `repair` can write the manifest
  anew.
- One compactor a rank at a time, by a lock that dies with its holder. Whoever finds it taken leaves the rank alone.

What a compactor that was killed has left is removed (`leftovers`) or brought to its end by the next.

Left out: merging ranks or runs; giving up old runs (`retention`); when to compact (`upkeep`).
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lm_telemetry.durable import make_durable_directory, put_json
from lm_telemetry.errors import StoreError
from lm_telemetry.leftovers import remove_leftovers
from lm_telemetry.merging import merge, read_source
from lm_telemetry.schema import FORMAT_VERSION
from lm_telemetry.store import PartInfo, Store, put_rows, sequence
from lm_telemetry.visibility import hidden_partition, is_hidden, is_shown, show, sync

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FILE_ROWS = 1 << 20
"""Rows of a full file: what is sorted in memory at a time."""

GROUP_ROWS = 1 << 16
"""Rows of a row group, the least that a query reads of a column."""

GRACE_SECONDS = 600.0
"""How long replaced files are kept for queries that began before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compacted:
    """What a compaction of one rank did."""

    run_id: str
    rank: int
    files_before: int = 0
    files_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    deleted: int = 0
    """replaced files"""
    busy: bool = False
    """another process is compacting this rank"""


def compact(
    store: Store, run_id: str, rank: int, *, grace_seconds: float = GRACE_SECONDS, file_rows: int = FILE_ROWS
) -> Compacted:
    """Merge what one rank has written so far, and delete what was replaced `grace_seconds` ago or earlier.

    Without a grace that includes what this very call replaces.

    Raises:
        StoreError: a manifest or a part cannot be read, or nothing can be written; readers still see all rows.
    """
    with _alone(store, run_id, rank) as files:
        if files is None:
            return Compacted(run_id=run_id, rank=rank, busy=True)
        if store.is_pruned(run_id):
            return Compacted(run_id=run_id, rank=rank)
        return files.compact(grace_seconds, file_rows)


def delete_retired(store: Store, run_id: str, rank: int, *, grace_seconds: float = GRACE_SECONDS) -> int:
    """Delete what a compaction of this rank replaced `grace_seconds` ago or earlier; how many files.

    What replaces them becomes visible to all readers.

    Raises:
        StoreError: the manifest cannot be read or written, or a file not be deleted.
    """
    retired = read_compaction(store.manifests(run_id) / "compaction" / f"rank={rank}.json")["retired"]
    if not any(_is_due(entry, grace_seconds) for entry in retired):
        return 0
    with _alone(store, run_id, rank) as files:
        return 0 if files is None or store.is_pruned(run_id) else files.settle(grace_seconds)[0]


def finish(store: Store, run_id: str, rank: int) -> list[str]:
    """Make visible what a compactor was about to when it was killed, for a caller who has the rank's lock; the files.

    Raises:
        StoreError: the manifest cannot be read.
        OSError: it cannot be written, or a file not be deleted.
    """
    return _Rank(store, run_id, rank).settle(math.inf)[1]


@contextmanager
def _alone(store: Store, run_id: str, rank: int) -> Iterator[_Rank | None]:
    """The rank's files with no other compactor at them; None if there is one. Whatever fails is a StoreError."""
    directory = store.manifests(run_id) / "compaction"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory / f".rank={rank}.lock") as ours:
            yield _Rank(store, run_id, rank) if ours else None
    except (OSError, pa.ArrowException) as error:
        raise StoreError(f"cannot compact rank {rank} of {run_id}: {error}", path=str(directory)) from error


class _Rank:
    """One rank's files, under the lock."""

    def __init__(self, store: Store, run_id: str, rank: int) -> None:
        self._store, self._run_id, self._rank = store, run_id, rank
        self._path = store.manifests(run_id) / "compaction" / f"rank={rank}.json"
        document = read_compaction(self._path)
        self._generation: int = document["generation"]
        self._replaces: dict[str, dict[str, int]] = document["replaces"]
        self._files: dict[str, list[PartInfo]] = document["files"]
        self._retired: list[dict[str, str]] = document["retired"]

    def compact(self, grace_seconds: float, file_rows: int) -> Compacted:
        listed = [file for files in self._files.values() for file in files]
        remove_leftovers(self._store, self._run_id, self._rank, listed, [entry["file"] for entry in self._retired])
        deleted, _ = self.settle(grace_seconds)
        self._generation += 1
        before = after = 0
        bytes_before = bytes_after = 0
        replaced: list[tuple[PartInfo, PartInfo]] = []
        live = self._live_parts()
        for table in {**self._files, **live}:
            files, parts = self._files.get(table, []), live.get(table, [])
            open_files = [f for f in files if f.rows < file_rows and not is_hidden(f.file)]
            sources = [*open_files, *(part for _, _, part in parts)]
            before += len(files) + len(parts)
            if len(sources) < 2:
                after += len(files) + len(parts)
                continue
            written = self._write(table, sources, file_rows)
            self._files[table] = [*(f for f in files if f not in open_files), *(file for file, _ in written)]
            bounds = self._replaces.setdefault(table, {})
            for attempt, seq, _ in parts:
                bounds[str(attempt)] = max(bounds.get(str(attempt), 0), seq + 1)
            replaced += [(source, file) for file, merged in written for source in merged]
            after += len(self._files[table])
            bytes_before += sum(source.bytes for source in sources)
            bytes_after += sum(file.bytes for file, _ in written)
        if replaced:
            # The grace begins when readers stop to be given the files, not when their rows were copied.
            now = _now()
            self._retired += [{"file": source.file, "at": now, "by": file.file} for source, file in replaced]
            self._put()
            deleted += self.settle(grace_seconds)[0]
        return Compacted(
            run_id=self._run_id,
            rank=self._rank,
            files_before=before,
            files_after=after,
            bytes_before=bytes_before,
            bytes_after=bytes_after,
            deleted=deleted,
        )

    def _live_parts(self) -> dict[str, list[tuple[int, int, PartInfo]]]:
        """(attempt, sequence number, part) by table, of what the rank has written and nothing has replaced."""
        live: dict[str, list[tuple[int, int, PartInfo]]] = {}
        for attempt in self._store.attempts(self._run_id):
            for part in self._store.read_manifest(self._run_id, self._rank, attempt, whole=True).parts:
                seq = sequence(part)
                if seq >= self._replaces.get(part.table, {}).get(str(attempt), 0):
                    live.setdefault(part.table, []).append((attempt, seq, part))
        return live

    def _write(self, table: str, sources: list[PartInfo], file_rows: int) -> list[tuple[PartInfo, list[PartInfo]]]:
        """The rows of `sources` in new hidden files, each with those whose rows it has."""
        written: list[tuple[PartInfo, list[PartInfo]]] = []
        waiting: list[PartInfo] = []
        pieces: list[pa.Table] = []
        directory = hidden_partition(self._store, table, self._run_id, self._rank)
        if not directory.is_dir():
            make_durable_directory(directory, below=self._store.path)
        for source in sources:
            waiting.append(source)
            pieces.append(read_source(self._store.path, source))
            if source is sources[-1] or sum(rows.num_rows for rows in pieces) >= file_rows:
                target = directory / f"compact-{self._generation}-{len(written)}.merged"
                rows = merge(table, pieces)
                file = put_rows(self._store.path, target, rows, table=table, row_group_size=GROUP_ROWS)
                written.append((file, waiting))
                waiting, pieces = [], []
        return written

    def settle(self, grace_seconds: float) -> tuple[int, list[str]]:
        """Delete what is due, and make visible what replaces it: how many replaced files, and which are visible now."""
        deleted, shown = 0, []
        while (done := self._settle_once(grace_seconds)) is not None:
            deleted += done[0]
            shown += done[1]
        return deleted, shown

    def _settle_once(self, grace_seconds: float) -> tuple[int, list[str]] | None:
        """As `settle`, up to one change of the manifest; None if there is nothing to do."""
        root = self._store.path
        waiting: dict[str, list[dict[str, str]]] = {}
        for entry in self._retired:
            waiting.setdefault(entry["by"], []).append(entry)
        hidden = [file for files in self._files.values() for file in files if is_hidden(file.file)]
        # What has its visible name already was due in the eyes of a compactor that was killed then.
        ready = [
            file
            for file in hidden
            if is_shown(root, file) or all(_is_due(e, grace_seconds) for e in waiting.get(file.file, ()))
        ]
        names = {file.file for file in hidden}
        free = [e for e in self._retired if e["by"] not in names and _is_due(e, grace_seconds)]
        if not ready and not free:
            return None
        shown: dict[str, PartInfo] = {}
        gone = list(free)
        for file in ready:
            shown[file.file] = show(root, file)
            for entry in waiting.get(file.file, ()):  # nothing between: others meet the rows twice until this is done
                (root / entry["file"]).unlink(missing_ok=True)
            gone += waiting.get(file.file, ())
        for file in shown.values():
            sync(root, file)
        for entry in free:
            (root / entry["file"]).unlink(missing_ok=True)
        now = _now()
        self._files = {table: [shown.get(f.file, f) for f in files] for table, files in self._files.items()}
        names = {entry["file"] for entry in gone}
        self._retired = [entry for entry in self._retired if entry["file"] not in names]
        self._retired += [{"file": file, "at": now, "by": ""} for file in shown]
        self._put()
        return sum(not is_hidden(entry["file"]) for entry in gone), [file.file for file in shown.values()]

    def _put(self) -> None:
        write_compaction(
            self._path,
            generation=self._generation,
            replaces=self._replaces,
            files=self._files,
            retired=self._retired,
        )


def _is_due(retired: dict[str, str], grace_seconds: float) -> bool:
    return (datetime.now(UTC) - datetime.fromisoformat(retired["at"])).total_seconds() >= grace_seconds


def read_compaction(path: Path) -> dict[str, Any]:
    """The compaction's manifest at `path`; an empty one if there is none.

    Of what is retired, `by` is the hidden file that replaces it, for which it stays until that becomes visible.

    Raises:
        StoreError: it is there and cannot be read.
    """
    empty: dict[str, Any] = {"generation": 0, "replaces": {}, "files": {}, "retired": []}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return {
            "generation": int(document["generation"]),
            "replaces": {t: {str(int(a)): int(seq) for a, seq in b.items()} for t, b in document["replaces"].items()},
            "files": {t: [PartInfo(table=t, **entry) for entry in files] for t, files in document["files"].items()},
            "retired": [
                {
                    "file": str(e["file"]),
                    "at": datetime.fromisoformat(e["at"]).isoformat(timespec="milliseconds"),
                    "by": str(e.get("by", "")),
                }
                for e in document["retired"]
            ],
        }
    except FileNotFoundError:
        return empty
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"cannot read the manifest {path}: {error!r}", path=str(path)) from error


def write_compaction(
    path: Path,
    *,
    generation: int,
    replaces: dict[str, dict[str, int]],
    files: dict[str, list[PartInfo]],
    retired: list[dict[str, str]],
) -> None:
    """Replace the compaction's manifest at `path` (OSError if it cannot be written)."""
    document = {
        "format": FORMAT_VERSION,
        "generation": generation,
        "updated": _now(),
        "replaces": replaces,
        "files": {table: [file.entry() for file in found] for table, found in files.items()},
        "retired": retired,
    }
    put_json(path, document)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether the lock at `path` is ours; it is given up at the end of the block or of the process."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
