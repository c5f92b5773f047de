"""Compaction: many small parts of a rank become a few large sorted files, under readers and beside its live writer.

    <store>/<table>/run_id=<id>/rank=<r>/compact-<generation>-<n>.parquet
    <store>/_manifests/run_id=<id>/compaction/rank=<r>.json

The one file that decides is the compaction's manifest. It lists the compacted files and, for each table and attempt,
the sequence number below which parts are replaced by them; it is put in place whole, so a reader sees the rows in the
parts or in the compacted files, never in both and never in neither. The writer's own manifest is not touched.

Decisions:

- A file holds whole consecutive parts of `FILE_ROWS` rows or a little more, sorted by what the rows are about and then
  by step, in row groups of `GROUP_ROWS`. So one series of a long run is a few row groups, and the last steps are one
  file. A file that is full is never written again: a run that is compacted often costs no more in all.
- What was replaced is deleted only after a grace, for queries that have resolved their files already. A rename or an
  immediate deletion gives a reader who globs wrong answers.
- Each compacted file says in its metadata which parts it holds (`coverage`), so that `repair` can write the manifest
  anew. A file that the manifest does not know is deleted only if its rows are elsewhere.
- One compactor a rank at a time, by a lock that dies with its holder. Whoever finds it taken leaves the rank alone.

What a compactor that was killed has left is removed by the next.

Left out: merging ranks or runs; giving up old runs (`retention`); when to compact (`upkeep`).
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lm_telemetry.catalogue import columns
from lm_telemetry.coverage import KEY, Coverage, coverage, encode, has, union
from lm_telemetry.errors import StoreError
from lm_telemetry.schema import ALL_TABLES, FORMAT_VERSION, schema
from lm_telemetry.store import PartInfo, Store, put_json, put_rows, sequence

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
    busy: bool = False
    """another process is compacting this rank"""


def compact(
    store: Store, run_id: str, rank: int, *, grace_seconds: float = GRACE_SECONDS, file_rows: int = FILE_ROWS
) -> Compacted:
    """Merge what one rank has written so far, and delete what was replaced `grace_seconds` ago or earlier.

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

    Raises:
        StoreError: the manifest cannot be read or written, or a file not be deleted.
    """
    retired = read_compaction(store.manifests(run_id) / "compaction" / f"rank={rank}.json")["retired"]
    if not any(_is_due(entry, grace_seconds) for entry in retired):
        return 0
    with _alone(store, run_id, rank) as files:
        return 0 if files is None else files.delete_retired(grace_seconds)


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
        self._remove_leftovers()
        deleted = self._delete_retired(grace_seconds)
        self._generation += 1
        before = after = 0
        bytes_before = bytes_after = 0
        replaced: list[PartInfo] = []
        for table, parts in self._live_parts().items():
            kept = [f for f in self._files.get(table, []) if f.rows >= file_rows]
            open_files = [f for f in self._files.get(table, []) if f.rows < file_rows]
            sources = [*open_files, *(part for _, _, part in parts)]
            before += len(kept) + len(sources)
            if len(sources) < 2:
                after += len(kept) + len(sources)
                continue
            written = self._write(table, sources, file_rows)
            self._files[table] = [*kept, *written]
            bounds = self._replaces.setdefault(table, {})
            for attempt, seq, _ in parts:
                bounds[str(attempt)] = max(bounds.get(str(attempt), 0), seq + 1)
            replaced += sources
            after += len(kept) + len(written)
            bytes_before += sum(source.bytes for source in sources)
            bytes_after += sum(file.bytes for file in written)
        if replaced or deleted:
            # The grace begins when readers stop to be given the files, not when their rows were copied.
            now = _now()
            self._retired += [{"file": source.file, "at": now} for source in replaced]
            self._put()
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

    def _remove_leftovers(self) -> None:
        """Delete what a compactor that was killed had written and not brought into its manifest."""
        known = {file.file for files in self._files.values() for file in files} | {r["file"] for r in self._retired}
        for table in ALL_TABLES:
            directory = self._store.partition(table, self._run_id, self._rank)
            for path in directory.glob("compact-*.parquet"):
                if str(path.relative_to(self._store.path)) in known:
                    continue
                if not self._is_spare(table, path):
                    raise StoreError(
                        f"{path} has rows that no other file has, and the compaction's manifest {self._path} does not"
                        " know it; `lmt verify --repair` brings it in",
                        path=str(path),
                    )
                path.unlink(missing_ok=True)
            for path in directory.glob(".compact-*.tmp"):
                path.unlink(missing_ok=True)
        for path in self._path.parent.glob(f".{self._path.name}.*.tmp"):
            path.unlink(missing_ok=True)

    def _is_spare(self, table: str, path: Path) -> bool:
        """Whether all that a compacted file covers is there as parts or in files of the manifest."""
        covered = coverage(path.name, pq.read_schema(path).metadata)
        files = [self._store.path / file.file for file in self._files.get(table, [])]
        listed = union(coverage(file.name, pq.read_schema(file).metadata) or {} for file in files)
        return covered is not None and all(
            has(listed, attempt, seq) or path.with_name(f"part-{attempt}-{seq}.parquet").exists()
            for attempt, spans in covered.items()
            for lo, hi in spans
            for seq in range(lo, hi)
        )

    def _write(self, table: str, sources: list[PartInfo], file_rows: int) -> list[PartInfo]:
        """The rows of `sources` in new files."""
        written: list[PartInfo] = []
        waiting: list[pa.Table] = []
        for source in sources:
            waiting.append(self._read(source))
            if source is sources[-1] or sum(rows.num_rows for rows in waiting) >= file_rows:
                name = f"compact-{self._generation}-{len(written)}.parquet"
                target = self._store.partition(table, self._run_id, self._rank) / name
                rows = _sorted(table, _unified(table, waiting))
                written.append(put_rows(self._store.path, target, rows, table=table, row_group_size=GROUP_ROWS))
                waiting.clear()
        return written

    def _read(self, source: PartInfo) -> pa.Table:
        """The rows of a file, with what it covers in the metadata of its schema.

        Raises:
            StoreError: it cannot be read, or has not the rows it should have.
        """
        path = self._store.path / source.file
        try:
            rows = pq.read_table(path, partitioning=None)
        except (OSError, pa.ArrowException) as error:
            raise _damaged(path, str(error)) from error
        if rows.num_rows != source.rows:
            raise _damaged(path, f"{source.rows} rows were expected, {rows.num_rows} came")
        covered = coverage(source.file, rows.schema.metadata)
        if covered is None:
            raise _damaged(path, "it does not say which parts it holds")
        return rows.replace_schema_metadata({KEY: encode(covered)})

    def _put(self) -> None:
        write_compaction(
            self._path,
            generation=self._generation,
            replaces=self._replaces,
            files=self._files,
            retired=self._retired,
        )

    def delete_retired(self, grace_seconds: float) -> int:
        deleted = self._delete_retired(grace_seconds)
        if deleted:
            self._put()
        return deleted

    def _delete_retired(self, grace_seconds: float) -> int:
        due = [entry for entry in self._retired if _is_due(entry, grace_seconds)]
        for entry in due:
            (self._store.path / entry["file"]).unlink(missing_ok=True)
        self._retired = [entry for entry in self._retired if entry not in due]
        return len(due)


def _is_due(retired: dict[str, str], grace_seconds: float) -> bool:
    return (datetime.now(UTC) - datetime.fromisoformat(retired["at"])).total_seconds() >= grace_seconds


def read_compaction(path: Path) -> dict[str, Any]:
    """The compaction's manifest at `path`; an empty one if there is none.

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
                {"file": str(e["file"]), "at": datetime.fromisoformat(e["at"]).isoformat(timespec="milliseconds")}
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
        "files": {
            table: [{k: v for k, v in asdict(file).items() if k != "table"} for file in found]
            for table, found in files.items()
        },
        "retired": retired,
    }
    put_json(path, document)


def sort_keys(table: str) -> list[str]:
    """What a table's compacted files are sorted by: what the rows are about, then when."""
    stamps = ("step", "attempt", "time")
    about = [m.name for m in columns(table) if m.key and m.name not in stamps]
    return [*about, "step", "attempt"]


def _unified(table: str, pieces: list[pa.Table]) -> pa.Table:
    """The pieces as one table: the catalogue's columns first, then what only the files have. It covers what they do."""
    wanted = pa.unify_schemas([schema(table), *(piece.schema for piece in pieces)], promote_options="permissive")
    covered: list[Coverage] = [found for piece in pieces if (found := coverage("", piece.schema.metadata))]
    wanted = wanted.with_metadata({**(schema(table).metadata or {}), KEY: encode(union(covered))})
    return pa.concat_tables(
        [
            pa.Table.from_arrays(
                [
                    piece[f.name].cast(f.type) if f.name in piece.column_names else pa.nulls(piece.num_rows, f.type)
                    for f in wanted
                ],
                schema=wanted,
            )
            for piece in pieces
        ]
    )


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"{path} is damaged: {why}; `lmt verify --repair` puts it aside", path=str(path))


def _sorted(table: str, rows: pa.Table) -> pa.Table:
    return rows.sort_by([(key, "ascending") for key in sort_keys(table)])


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
