"""The store on disk: many small Parquet files, each put in place whole.

    <store>/<table>/run_id=<id>/rank=<r>/part-<attempt>-<seq>.parquet
    <store>/_manifests/run_id=<id>/attempt=<a>/rank=<r>.json

Decisions:

- A part is written under a hidden name, fsynced, renamed, and its directory fsynced. So `kill -9` leaves whole parts
  and at most one hidden temporary file, and a reader needs no lock. (An open ParquetWriter loses all; a DuckDB file
  locks readers out.)
- An attempt is one launch of the whole job. Making its directory is the claim: `mkdir` succeeds for exactly one
  process. Names of parts and manifests hold the attempt, so a leftover process of an earlier launch cannot overwrite
  a later one.
- Each rank has a manifest of its own, so a thousand ranks write at once without a lock. It is replaced as a whole, and
  is kept short: full lists of parts are sealed into files that never change, or a long run would rewrite megabytes at
  each flush.
- Floats are byte-stream-split under zstd without a value dictionary (3 bytes a value: two thirds of the bytes, in less
  than half the time, of a row a value by pyarrow's defaults); only strings have dictionaries.

Left out: how a file survives a power cut (`durable`), merging of small parts (`compaction`), and remote filesystems.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lm_telemetry.catalogue import schema_id
from lm_telemetry.durable import make_durable_directory, put_file, put_json
from lm_telemetry.errors import StoreError
from lm_telemetry.schema import ALL_TABLES, FORMAT_VERSION, schema

MANIFESTS = "_manifests"
"""Its underscore hides it from readers of hive datasets (Spark, pyarrow); globs over a table never reach it."""

SEAL_AFTER = 512
"""Parts in a manifest before they are sealed into a file of their own."""

PART_NAME = re.compile(r"part-(\d+)-(\d+)\.parquet")
"""attempt, sequence number"""

PRUNED = "pruned.json"
"""Beside a run's manifests: the run was given up by `retention`, and readers pass it by."""

_ATTEMPT = re.compile(r"attempt=(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartInfo:
    """One Parquet file: its path relative to the store, and what is in it."""

    table: str
    file: str
    rows: int
    bytes: int
    first_step: int | None
    last_step: int | None
    schema: str | None = None
    """`catalogue.schema_id` of the table when it was written; None in manifests older than this"""
    crc32: int | None = None
    """checksum of the file's bytes, taken while they were written; None in manifests older than this"""

    def entry(self) -> dict[str, Any]:
        """What a manifest lists of it, under its table."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "table"}


@dataclass(slots=True, kw_only=True)
class Manifest:
    """What one rank has put on disk in one attempt, in the order of writing."""

    run_id: str
    rank: int
    attempt: int
    parts: list[PartInfo] = field(default_factory=list)
    """Those that are not sealed yet."""
    sealed: list[str] = field(default_factory=list)
    """Files beside the manifest, each a list of `SEAL_AFTER` parts that is never changed again."""
    lost: list[PartInfo] = field(default_factory=list)
    """Parts that were acknowledged and then damaged or removed by others; `repair` notes them here."""


@dataclass(frozen=True, slots=True)
class Store:
    """A directory of tables. Build one to read; `open_for_writing` to write."""

    path: Path

    @classmethod
    def open_for_writing(cls, path: str | os.PathLike[str]) -> Self:
        """The store at `path`, made if need be, after a file was written there and removed again.

        Permission bits say little (root, read-only mounts, full or remote disks), so this tries.

        Raises:
            StoreError: no files can be written there; `.path` is the store's path.
        """
        store = cls(Path(path).absolute())
        probe = store.path / f".probe-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            (store.path / MANIFESTS).mkdir(parents=True, exist_ok=True)
            try:
                probe.write_bytes(b"probe")
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"the store must be a directory that can be written; {store.path}: {error.strerror or error}."
                " Give another `store`, or make room or permission there",
                path=str(store.path),
            ) from error
        return store

    def claim_attempt(self, run_id: str, *, at_least: int = 0) -> int:
        """The number of this launch of `run_id`: 0, or one more than the highest that left a trace. Claimed for good.

        With many ranks, one rank claims and tells the others. Numbers below `at_least` were taken elsewhere.

        Raises:
            StoreError: the claim cannot be written.
        """
        number = max(at_least, self._next_attempt(run_id))
        directory = self.manifests(run_id)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            while True:
                with suppress(FileExistsError):
                    (directory / f"attempt={number}").mkdir()
                    return number
                number += 1
        except OSError as error:
            raise StoreError(
                f"cannot claim an attempt of run {run_id} in {directory}: {error.strerror or error}",
                path=str(directory),
            ) from error

    def next_seq(self, run_id: str, rank: int, attempt: int) -> int:
        """The first sequence number that no part of this run, rank and attempt has."""
        found = [
            int(match[2])
            for table in ALL_TABLES
            for match in map(PART_NAME.fullmatch, _names(self.partition(table, run_id, rank)))
            if match and int(match[1]) == attempt
        ]
        return max(found, default=-1) + 1

    def write_part(self, rows: pa.Table, *, table: str, run_id: str, rank: int, attempt: int, seq: int) -> PartInfo:
        """Put `rows` (in the table's schema) on disk as one part; when this returns, it survives a power cut.

        Raises:
            StoreError: it could not be written (disk full, read-only, ...); nothing is left behind.
        """
        target = self.partition(table, run_id, rank) / f"part-{attempt}-{seq}.parquet"
        try:
            if not target.parent.is_dir():
                make_durable_directory(target.parent, below=self.path)
            return put_rows(self.path, target, rows, table=table)
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"cannot write {target}: {error}", path=str(target)) from error

    def write_manifest(self, manifest: Manifest, *, seal: bool = True) -> None:
        """Replace the rank's manifest; seals its parts first when they are many, unless it is the last that is written.

        Raises:
            StoreError: it could not be written; the one before is still whole.
        """
        target = self.manifest_path(manifest.run_id, manifest.rank, manifest.attempt)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            while seal and len(manifest.parts) >= SEAL_AFTER:
                name = f"{target.stem}.sealed-{len(manifest.sealed)}.json"
                put_json(target.with_name(name), {"parts": by_table(manifest.parts[:SEAL_AFTER])})
                manifest.sealed.append(name)
                del manifest.parts[:SEAL_AFTER]
            document = {
                "format": FORMAT_VERSION,
                "run_id": manifest.run_id,
                "rank": manifest.rank,
                "attempt": manifest.attempt,
                "host": socket.gethostname(),
                "updated": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "sealed": manifest.sealed,
                "parts": by_table(manifest.parts),
            }
            if manifest.lost:
                document["lost"] = by_table(manifest.lost)
            put_json(target, document)
        except OSError as error:
            raise StoreError(f"cannot write {target}: {error.strerror or error}", path=str(target)) from error

    def read_manifest(self, run_id: str, rank: int, attempt: int, *, whole: bool = False) -> Manifest:
        """The rank's manifest, an empty one if there is none; `whole` brings the sealed parts in too.

        Raises:
            StoreError: it is there and cannot be read.
        """
        target = self.manifest_path(run_id, rank, attempt)
        manifest = Manifest(run_id=run_id, rank=rank, attempt=attempt)
        try:
            try:
                text = target.read_text(encoding="utf-8")
            except FileNotFoundError:  # claimed, and nothing acknowledged yet; it may be there by now
                return manifest
            document = json.loads(text)
            manifest.sealed = list(document["sealed"])
            manifest.lost = listed_parts(document.get("lost", {}))
            for name in manifest.sealed if whole else ():
                sealed = json.loads(target.with_name(name).read_text(encoding="utf-8"))
                manifest.parts += listed_parts(sealed["parts"])
                manifest.lost += listed_parts(sealed.get("lost", {}))
            manifest.parts += listed_parts(document["parts"])
        except FileNotFoundError:
            raise StoreError(f"{target} names a sealed list that is gone", path=str(target)) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"cannot read the manifest {target}: {error!r}", path=str(target)) from error
        return manifest

    def _next_attempt(self, run_id: str) -> int:
        """One more than the highest attempt in the claims and in the names of parts (claims may have been deleted)."""
        claims = map(_ATTEMPT.fullmatch, _names(self.manifests(run_id)))
        parts = (
            PART_NAME.fullmatch(name)
            for table in ALL_TABLES
            for rank in _names(self.path / table / f"run_id={run_id}")
            for name in _names(self.path / table / f"run_id={run_id}" / rank)
        )
        last = max((int(match[1]) for match in (*claims, *parts) if match), default=-1)
        return max(last + 1, self._pruned(run_id))

    def is_gone(self) -> bool:
        """Whether nothing is at the store's path; False while that cannot be told (no permission, a dead mount)."""
        try:
            self.path.stat()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return False

    def is_pruned(self, run_id: str) -> bool:
        """Whether retention has given the run up, and no later launch has taken it up again.

        Raises:
            StoreError: the mark is there and cannot be read.
        """
        return max(self.attempts(run_id), default=-1) < self._pruned(run_id)

    def _pruned(self, run_id: str) -> int:
        """Number of attempts that retention has given up."""
        path = self.manifests(run_id) / PRUNED
        try:
            return int(json.loads(path.read_bytes())["attempts"])
        except (FileNotFoundError, NotADirectoryError):
            return -1
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"cannot read the manifest {path}: {error!r}", path=str(path)) from error

    def attempts(self, run_id: str) -> list[int]:
        """Numbers of the launches of a run that have a claim, in order."""
        return sorted(int(m[1]) for name in _names(self.manifests(run_id)) if (m := _ATTEMPT.fullmatch(name)))

    def partition(self, table: str, run_id: str, rank: int) -> Path:
        """The directory of a rank's files of a table."""
        return self.path / table / f"run_id={run_id}" / f"rank={rank}"

    def manifests(self, run_id: str) -> Path:
        """The directory of a run's manifests."""
        return self.path / MANIFESTS / f"run_id={run_id}"

    def manifest_path(self, run_id: str, rank: int, attempt: int) -> Path:
        """Where a rank of an attempt has its manifest."""
        return self.manifests(run_id) / f"attempt={attempt}" / f"rank={rank}.json"


def sequence(part: PartInfo) -> int:
    """The sequence number of a part, which is in its name."""
    match = PART_NAME.fullmatch(part.file.rpartition("/")[2])
    if match is None:
        raise StoreError(f"expected a part's name, part-<attempt>-<seq>.parquet; got {part.file}", path=part.file)
    return int(match[2])


def put_rows(root: Path, target: Path, rows: pa.Table, *, table: str, row_group_size: int | None = None) -> PartInfo:
    """Put rows of `table` in place as one Parquet file, whole and durably.

    Raises:
        OSError, pa.ArrowException: it could not be written; nothing is left behind.
    """
    options = {"compression": "zstd", "row_group_size": row_group_size, **_encodings(table)}
    size, crc32 = put_file(target, lambda file: pq.write_table(rows, file, **options))
    steps: Any = pc.min_max(rows["step"]).as_py()
    return PartInfo(
        table=table,
        file=str(target.relative_to(root)),
        rows=rows.num_rows,
        bytes=size,
        first_step=steps["min"],
        last_step=steps["max"],
        schema=schema_id(table) if rows.schema.names == schema(table).names else None,
        crc32=crc32,
    )


@cache
def _encodings(table: str) -> dict[str, Any]:
    """Parquet encodings by type: split bytes for floats, deltas for integers, a dictionary for strings alone."""
    encoding: dict[str, str] = {}
    strings: list[str] = []
    for column in schema(table):
        if pa.types.is_floating(column.type):
            encoding[column.name] = "BYTE_STREAM_SPLIT"
        elif pa.types.is_list(column.type):
            encoding[f"{column.name}.list.element"] = "BYTE_STREAM_SPLIT"
        elif pa.types.is_integer(column.type) or pa.types.is_timestamp(column.type):
            encoding[column.name] = "DELTA_BINARY_PACKED"
        elif pa.types.is_string(column.type):
            strings.append(column.name)
    return {"use_dictionary": strings, "column_encoding": encoding}


def _names(directory: Path) -> list[str]:
    try:
        return [entry.name for entry in directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def by_table(parts: list[PartInfo]) -> dict[str, list[dict[str, Any]]]:
    """Parts as a manifest lists them."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        tables.setdefault(part.table, []).append(part.entry())
    return tables


def listed_parts(tables: dict[str, list[dict[str, Any]]]) -> list[PartInfo]:
    """The parts that a manifest lists."""
    return [PartInfo(table=table, **entry) for table, entries in tables.items() for entry in entries]
