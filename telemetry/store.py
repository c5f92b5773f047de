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
- Floats are byte-stream-split under zstd without a value dictionary (3 bytes a value, ten times the speed of pyarrow's
  defaults); only strings have dictionaries.

Left out: merging of small parts, and remote filesystems.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lm_telemetry.errors import StoreError
from lm_telemetry.schema import ALL_TABLES, FORMAT_VERSION, schema

MANIFESTS = "_manifests"
"""Its underscore hides it from readers of hive datasets (Spark, pyarrow); globs over a table never reach it."""

SEAL_AFTER = 512
"""Parts in a manifest before they are sealed into a file of their own."""

_PART = re.compile(r"part-(\d+)-(\d+)\.parquet")
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

    def claim_attempt(self, run_id: str) -> int:
        """The number of this launch of `run_id`: 0, or one more than the highest that left a trace. Claimed for good.

        With many ranks, one rank claims and tells the others.

        Raises:
            StoreError: the claim cannot be written.
        """
        number = self._next_attempt(run_id)
        directory = self.path / MANIFESTS / f"run_id={run_id}"
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
            for match in map(_PART.fullmatch, _names(self._partition(table, run_id, rank)))
            if match and int(match[1]) == attempt
        ]
        return max(found, default=-1) + 1

    def write_part(self, rows: pa.Table, *, table: str, run_id: str, rank: int, attempt: int, seq: int) -> PartInfo:
        """Put `rows` (in the table's schema) on disk as one part; when this returns, it survives a power cut.

        Raises:
            StoreError: it could not be written (disk full, read-only, ...); nothing is left behind.
        """
        target = self._partition(table, run_id, rank) / f"part-{attempt}-{seq}.parquet"
        try:
            if not target.parent.is_dir():
                _make_durable_directory(target.parent, below=self.path)
            size = _put(target, lambda file: pq.write_table(rows, file, compression="zstd", **_encodings(table)))
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"cannot write {target}: {error}", path=str(target)) from error
        steps: Any = pc.min_max(rows["step"]).as_py()
        return PartInfo(
            table=table,
            file=str(target.relative_to(self.path)),
            rows=rows.num_rows,
            bytes=size,
            first_step=steps["min"],
            last_step=steps["max"],
        )

    def write_manifest(self, manifest: Manifest) -> None:
        """Replace the rank's manifest; seals its parts first when they are many.

        Raises:
            StoreError: it could not be written; the one before is still whole.
        """
        target = self._manifest(manifest.run_id, manifest.rank, manifest.attempt)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            while len(manifest.parts) >= SEAL_AFTER:
                name = f"{target.stem}.sealed-{len(manifest.sealed)}.json"
                _put_json(target.with_name(name), {"parts": _by_table(manifest.parts[:SEAL_AFTER])})
                manifest.sealed.append(name)
                del manifest.parts[:SEAL_AFTER]
            document = {
                "format": FORMAT_VERSION,
                "run_id": manifest.run_id,
                "rank": manifest.rank,
                "attempt": manifest.attempt,
                "updated": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "sealed": manifest.sealed,
                "parts": _by_table(manifest.parts),
            }
            _put_json(target, document)
        except OSError as error:
            raise StoreError(f"cannot write {target}: {error.strerror or error}", path=str(target)) from error

    def read_manifest(self, run_id: str, rank: int, attempt: int, *, whole: bool = False) -> Manifest:
        """The rank's manifest, an empty one if there is none; `whole` brings the sealed parts in too.

        Raises:
            StoreError: it is there and cannot be read.
        """
        target = self._manifest(run_id, rank, attempt)
        manifest = Manifest(run_id=run_id, rank=rank, attempt=attempt)
        try:
            document = json.loads(target.read_text(encoding="utf-8"))
            manifest.sealed = list(document["sealed"])
            for name in manifest.sealed if whole else ():
                sealed = json.loads(target.with_name(name).read_text(encoding="utf-8"))
                manifest.parts += _parts(sealed["parts"])
            manifest.parts += _parts(document["parts"])
        except FileNotFoundError:
            if target.exists():
                raise StoreError(f"{target} names a sealed list that is gone", path=str(target)) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"cannot read the manifest {target}: {error!r}", path=str(target)) from error
        return manifest

    def _next_attempt(self, run_id: str) -> int:
        """One more than the highest attempt in the claims and in the names of parts (claims may have been deleted)."""
        claims = map(_ATTEMPT.fullmatch, _names(self.path / MANIFESTS / f"run_id={run_id}"))
        parts = (
            _PART.fullmatch(name)
            for table in ALL_TABLES
            for rank in _names(self.path / table / f"run_id={run_id}")
            for name in _names(self.path / table / f"run_id={run_id}" / rank)
        )
        return max((int(match[1]) for match in (*claims, *parts) if match), default=-1) + 1

    def _partition(self, table: str, run_id: str, rank: int) -> Path:
        return self.path / table / f"run_id={run_id}" / f"rank={rank}"

    def _manifest(self, run_id: str, rank: int, attempt: int) -> Path:
        return self.path / MANIFESTS / f"run_id={run_id}" / f"attempt={attempt}" / f"rank={rank}.json"


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


def _put(target: Path, write: Any) -> int:
    """Write a file so that `target` is whole or absent at every moment; its size in bytes."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        temporary.replace(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)
    return size


def _put_json(target: Path, document: dict[str, Any]) -> None:
    _put(target, lambda file: file.write(json.dumps(document, separators=(",", ":")).encode()))


def _make_durable_directory(directory: Path, *, below: Path) -> None:
    """Make `directory` and have each new name in it survive a power cut, down from `below`."""
    directory.mkdir(parents=True, exist_ok=True)
    for parent in directory.parents:
        _sync_directory(parent)
        if parent == below:
            break


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        # Some network filesystems refuse to sync directories; the file itself is synced by then.
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _names(directory: Path) -> list[str]:
    try:
        return [entry.name for entry in directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _by_table(parts: list[PartInfo]) -> dict[str, list[dict[str, Any]]]:
    tables: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        entry = asdict(part)
        tables.setdefault(entry.pop("table"), []).append(entry)
    return tables


def _parts(tables: dict[str, list[dict[str, Any]]]) -> list[PartInfo]:
    return [PartInfo(table=table, **entry) for table, entries in tables.items() for entry in entries]
