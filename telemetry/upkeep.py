"""What a run does for its store when it begins and ends: merge its small parts, delete what was merged long ago.

Left to those who are asked for it: merging large runs (`lmt compact`), giving up old ones (`retention`).
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from lm_telemetry.compaction import GRACE_SECONDS, compact, delete_retired
from lm_telemetry.errors import StoreError

if TYPE_CHECKING:
    from lm_telemetry.store import Store

FEW_PARTS = 16
"""Parts of a rank that are not worth merging."""

MAX_BYTES = 128 * 2**20
"""Bytes of parts that a run's end does not merge: at the 25 MB/s of one core it is to take seconds."""

SWEEP_SECONDS = 1.0
"""How long a run's beginning or end may look for files that are due."""


def compact_own(store: Store, run_id: str, rank: int) -> None:
    """Merge what this rank has written, if it is more than a few files and takes seconds at most.

    Raises:
        StoreError: it cannot be done; the rows are all there.
    """
    parts = [p for a in store.attempts(run_id) for p in store.read_manifest(run_id, rank, a, whole=True).parts]
    if len(parts) > FEW_PARTS and sum(part.bytes for part in parts) <= MAX_BYTES:
        compact(store, run_id, rank)


def sweep(store: Store, *, grace_seconds: float = GRACE_SECONDS, seconds: float = SWEEP_SECONDS) -> int:
    """Delete files of all runs that a compaction replaced a grace ago, as far as `seconds` reach; how many.

    What is in another process's hands, or cannot be read, is left to `lmt compact` and `lmt verify`.
    """
    end = time.monotonic() + seconds
    deleted = 0
    for path in store.manifests("*").parent.glob("run_id=*/compaction/rank=*.json"):
        if time.monotonic() > end:
            break
        run_id = path.parent.parent.name.removeprefix("run_id=")
        with suppress(StoreError, ValueError):  # ValueError: the name is none of ours
            deleted += delete_retired(store, run_id, int(path.stem.removeprefix("rank=")), grace_seconds=grace_seconds)
    return deleted
