"""What a compactor that was killed has written and not brought into its manifest: deleted, if its rows are elsewhere.

A file whose visible name was just made is no leftover: that switch is brought to its end (`compaction`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from lm_telemetry.coverage import Coverage, coverage, has, union
from lm_telemetry.errors import StoreError
from lm_telemetry.schema import ALL_TABLES
from lm_telemetry.visibility import hidden_partition, is_hidden, is_shown, visible

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from lm_telemetry.store import PartInfo, Store


def remove_leftovers(store: Store, run_id: str, rank: int, listed: list[PartInfo], retired: Iterable[str]) -> None:
    """Delete a rank's compacted files that are neither `listed` by its manifest nor `retired`, and temporaries.

    Raises:
        StoreError: such a file has rows that no other has.
        OSError, pa.ArrowException: a file cannot be read or deleted.
    """
    known = {file.file for file in listed} | {*retired}
    known |= {visible(file.file) for file in listed if is_hidden(file.file) and is_shown(store.path, file)}
    for table in ALL_TABLES:
        of_table = [file for file in listed if file.table == table]
        for directory, pattern in (
            (store.partition(table, run_id, rank), "compact-*.parquet"),
            (hidden_partition(store, table, run_id, rank), "compact-*.merged"),
        ):
            for path in directory.glob(pattern):
                if str(path.relative_to(store.path)) not in known:
                    _require_spare(path, of_table, store.path, store.partition(table, run_id, rank))
                    path.unlink(missing_ok=True)
            for path in directory.glob(".compact-*.tmp"):
                path.unlink(missing_ok=True)
    manifests = store.manifests(run_id) / "compaction"
    for path in manifests.glob(f".rank={rank}.json.*.tmp"):
        path.unlink(missing_ok=True)


def _require_spare(path: Path, listed: list[PartInfo], root: Path, parts: Path) -> None:
    """StoreError unless all that a compacted file covers is there as parts or in listed files."""
    covered = coverage(path.name, pq.read_schema(path).metadata)
    others = union(_covered(root / file.file) for file in listed)
    if covered is None or not all(
        has(others, attempt, seq) or (parts / f"part-{attempt}-{seq}.parquet").exists()
        for attempt, spans in covered.items()
        for lo, hi in spans
        for seq in range(lo, hi)
    ):
        raise StoreError(
            f"{path} has rows that no other file has, and its compaction's manifest does not know it;"
            " `lmt verify --repair` brings it in",
            path=str(path),
        )


def _covered(path: Path) -> Coverage:
    return coverage(path.name, pq.read_schema(path).metadata) or {}
