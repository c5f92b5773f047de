"""What one rank has on disk, and what its manifests say of it: the facts that `verify` judges and `repair` mends.

Nothing is written here. A file is described by itself, in the terms of a manifest, so that the two can be compared.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lm_telemetry.catalogue import schema_id
from lm_telemetry.compaction import read_compaction
from lm_telemetry.errors import StoreError
from lm_telemetry.schema import ALL_TABLES, FORMAT_VERSION, schema
from lm_telemetry.store import MANIFESTS, PART_NAME, Manifest, PartInfo
from lm_telemetry.visibility import compact_key, hidden_files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lm_telemetry.store import Store

_RUN = re.compile(r"run_id=(.+)", re.DOTALL)  # a stranger may have put a line break into a name
_RANK = re.compile(r"rank=(\d+)(\.json)?")
_CHUNK = 1 << 20


@dataclass(slots=True, kw_only=True)
class Inventory:
    """The files of one rank of one run."""

    store: Store
    run_id: str
    rank: int
    manifests: dict[int, Manifest] = field(default_factory=dict)
    """by attempt, whole; those that can be read"""
    unreadable: dict[int, str] = field(default_factory=dict)
    """by attempt, why a manifest cannot be read"""
    replaces: dict[str, dict[int, int]] = field(default_factory=dict)
    """by table and attempt, the sequence number below which parts are replaced by compacted files"""
    compacted: dict[str, list[PartInfo]] = field(default_factory=dict)
    retired: dict[str, str] = field(default_factory=dict)
    """when each file was replaced"""
    generation: int = 0
    compaction_error: str | None = None
    disk: dict[str, dict[str, Path]] = field(default_factory=dict)
    """files by table and name, hidden compacted ones too"""
    temporaries: list[Path] = field(default_factory=list)

    @classmethod
    def take(cls, store: Store, run_id: str, rank: int) -> Inventory:
        """What is there now."""
        found = cls(store=store, run_id=run_id, rank=rank)
        for table in ALL_TABLES:
            for path in _children(store.partition(table, run_id, rank)):
                if path.name.startswith(".") and path.name.endswith(".tmp"):
                    found.temporaries.append(path)
                else:
                    found.disk.setdefault(table, {})[path.name] = path
        for table, path in hidden_files(store, run_id, rank):
            if compact_key(found.relative(path)):
                found.disk.setdefault(table, {})[path.name] = path
            else:
                found.temporaries.append(path)
        for attempt in store.attempts(run_id):
            if store.manifest_path(run_id, rank, attempt).exists():
                try:
                    found.manifests[attempt] = store.read_manifest(run_id, rank, attempt, whole=True)
                except StoreError as error:
                    found.unreadable[attempt] = str(error)
        # After the manifests: what a compaction has replaced and deleted meanwhile is known to be replaced.
        found._read_compaction()
        return found

    @property
    def compaction_path(self) -> Path:
        """Where the manifest of its compaction is."""
        return self.store.manifests(self.run_id) / "compaction" / f"rank={self.rank}.json"

    def is_replaced(self, table: str, attempt: int, seq: int) -> bool:
        """Whether the compaction's manifest says that compacted files have the part's rows."""
        return seq < self.replaces.get(table, {}).get(attempt, 0)

    def relative(self, path: Path) -> str:
        """A path as manifests spell it."""
        return str(path.relative_to(self.store.path))

    def _read_compaction(self) -> None:
        try:
            document = read_compaction(self.compaction_path)
        except StoreError as error:
            self.compaction_error = str(error)
            return
        self.replaces = {
            table: {int(attempt): seq for attempt, seq in bounds.items()}
            for table, bounds in document["replaces"].items()
        }
        self.compacted = document["files"]
        self.retired = {entry["file"]: entry["at"] for entry in document["retired"]}
        self.generation = document["generation"]


def run_ids(store: Store) -> list[str]:
    """Names of all runs that have left anything."""
    places = [store.path / MANIFESTS, *(store.path / table for table in ALL_TABLES)]
    return sorted({m[1] for place in places for path in _children(place) if (m := _RUN.fullmatch(path.name))})


def ranks(store: Store, run_id: str) -> list[int]:
    """Ranks of a run that have left anything."""
    places = [store.path / table / f"run_id={run_id}" for table in ALL_TABLES]
    places += [path for path in _children(store.manifests(run_id)) if path.is_dir()]
    return sorted({int(m[1]) for place in places for path in _children(place) if (m := _RANK.fullmatch(path.name))})


def part_key(file: str) -> tuple[int, int] | None:
    """(attempt, sequence number) in the name of a part; None if it is no part's."""
    match = PART_NAME.fullmatch(file.rpartition("/")[2])
    return (int(match[1]), int(match[2])) if match else None


def metadata(path: Path) -> dict[bytes, bytes]:
    """What a Parquet file says of itself; nothing if it cannot be read."""
    try:
        return dict(pq.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException, ValueError):
        return {}


def is_parquet(path: Path) -> bool:
    """Whether a file can be opened as Parquet, of whatever schema."""
    try:
        pq.read_metadata(path)
    except (OSError, pa.ArrowException, ValueError):
        return False
    return True


def describe(store: Store, path: Path, table: str, *, deep: bool = False) -> PartInfo:
    """The file as a manifest would list it; `deep` reads all its bytes and values, and gives the checksum.

    Raises:
        StoreError: it cannot be read as Parquet of this table.
    """
    try:
        with pq.ParquetFile(path) as file:
            footer: Any = file.metadata
            arrow = file.schema_arrow
            said = {k: v.decode("utf-8", "replace") for k, v in (arrow.metadata or {}).items()}
            of, version = said.get(b"lm_telemetry.table", table), said.get(b"lm_telemetry.format", FORMAT_VERSION)
            if of != table or version != FORMAT_VERSION:
                raise _damaged(path, f"it is of {of} in format {version}, not of {table} in format {FORMAT_VERSION}")
            if "step" not in arrow.names:
                raise _damaged(path, "it has no column `step`")
            if deep:
                file.read()
            first, last = _steps(file)
            wanted = schema(table)
            alike = arrow.names == wanted.names and arrow.types == wanted.types
        return PartInfo(
            table=table,
            file=str(path.relative_to(store.path)),
            rows=footer.num_rows,
            bytes=path.stat().st_size,
            first_step=first,
            last_step=last,
            schema=schema_id(table) if alike else None,
            crc32=checksum(path) if deep else None,
        )
    # pyarrow raises UnicodeDecodeError, a ValueError, for damaged names.
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _damaged(path, str(error).split("\n", 1)[0]) from error


def checksum(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found = zlib.crc32(chunk, found)
    return found


def _steps(file: pq.ParquetFile) -> tuple[int | None, int | None]:
    """The range of `step`, from the footer's statistics where they are there."""
    footer: Any = file.metadata
    column = next(i for i in range(footer.num_columns) if footer.schema.column(i).path == "step")
    chunks = [footer.row_group(group).column(column).statistics for group in range(footer.num_row_groups)]
    if all(s is not None and s.has_min_max for s in chunks):
        return min((s.min for s in chunks), default=None), max((s.max for s in chunks), default=None)
    bounds: Any = pc.min_max(file.read(columns=["step"])["step"]).as_py()
    return bounds["min"], bounds["max"]


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"{path} is damaged: {why}", path=str(path))


def _children(directory: Path) -> Iterator[Path]:
    try:
        yield from directory.iterdir()
    except (FileNotFoundError, NotADirectoryError):
        return
