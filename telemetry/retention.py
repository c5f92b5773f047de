"""Retention: old runs are given up as a whole, so that a store does not grow for ever.

    prune(store, max_age_days=90, max_bytes=50 * 2**30)

Decisions:

- Oldest first, by the last time something was written. A run that is being written is never given up, nor the newest.
- A run goes for all readers at one moment: `pruned.json` is put beside its manifests, and readers pass it by. What it
  has on disk is deleted a grace later, for queries that began before; the manifests last, so that a deletion that is
  cut short goes on at the next call.
- A run that is launched again after it was given up, and before it was deleted, is kept.

Left out: parts of a run (early steps, single tables).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from lm_telemetry.compaction import GRACE_SECONDS
from lm_telemetry.durable import put_json
from lm_telemetry.errors import StoreError
from lm_telemetry.inventory import run_ids
from lm_telemetry.liveness import is_live
from lm_telemetry.schema import ALL_TABLES, FORMAT_VERSION
from lm_telemetry.store import PRUNED, Store
from lm_telemetry.visibility import HIDDEN

if TYPE_CHECKING:
    from collections.abc import Container, Iterator
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """A run that is given up, or would be."""

    run_id: str
    bytes: int
    written: datetime
    """when it was last written to"""
    reason: str = ""
    deleted: bool = False
    """its files are gone; else they go a grace later, at another call"""


def prune(
    store: Store,
    *,
    max_age_days: float | None = None,
    max_bytes: int | None = None,
    keep: Container[str] = (),
    grace_seconds: float = GRACE_SECONDS,
    dry_run: bool = False,
) -> list[Pruned]:
    """Give up runs that are too old, and the oldest until the rest fit; delete what was given up a grace ago.

    Args:
        store: the store.
        max_age_days: runs that were last written to longer ago are given up; None for no limit.
        max_bytes: how large all runs together may be; None for no limit.
        keep: names of runs that are never given up.
        grace_seconds: how long files of a run that was given up are kept for queries that have begun.
        dry_run: change nothing, only say what would be given up.

    Returns:
        The runs given up now or deleted now, oldest first.

    Raises:
        StoreError: a run cannot be given up or deleted.
        ValueError: a limit is negative.
    """
    for name, limit in (("max_age_days", max_age_days), ("max_bytes", max_bytes)):
        if limit is not None and limit < 0:
            raise ValueError(f"{name} must be 0 or more, got {limit}")
    try:
        names = run_ids(store)
        gone = [run_id for run_id in names if store.is_pruned(run_id)]
        runs = sorted((_measure(store, name) for name in names if name not in gone), key=lambda run: run.written)
        found = list(_surplus(store, runs, keep, max_age_days, max_bytes))
        if dry_run:
            return found
        for run in found:
            attempts = max(store.attempts(run.run_id), default=-1) + 1
            put_json(_mark(store, run.run_id), {"format": FORMAT_VERSION, "at": _now(), "attempts": attempts})
        waiting = [replace(_measure(store, name), reason="given up before") for name in gone]
        return [
            replace(run, deleted=True) if _delete(store, run.run_id, grace_seconds) else run
            for run in (*waiting, *found)
        ]
    except OSError as error:
        raise StoreError(f"cannot prune {store.path}: {error}", path=str(store.path)) from error


def _surplus(
    store: Store, runs: list[Pruned], keep: Container[str], max_age_days: float | None, max_bytes: int | None
) -> Iterator[Pruned]:
    """Of runs in the order of their age, those to give up."""
    total = sum(run.bytes for run in runs)
    now = datetime.now(UTC)
    for run in runs[:-1]:
        if max_age_days is not None and now - run.written > timedelta(days=max_age_days):
            reason = f"not written to for more than {max_age_days:g} days"
        elif max_bytes is not None and total > max_bytes:
            reason = f"{total} bytes are more than {max_bytes}"
        else:
            continue
        if run.run_id not in keep and not is_live(store, run.run_id):
            total -= run.bytes
            yield replace(run, reason=reason)


def _measure(store: Store, run_id: str) -> Pruned:
    """The size of a run, and when it was last written to."""
    size = 0
    written = 0.0
    manifests = store.manifests(run_id)
    known: set[tuple[int, int]] = set()
    for directory in (manifests, *_places(store, run_id)):
        for path in directory.rglob("*"):
            try:
                found = path.stat()
            except FileNotFoundError:
                continue  # replaced or deleted by a compaction at this moment
            if path.is_file():
                # A compacted file may have two names.
                size += 0 if (found.st_dev, found.st_ino) in known else found.st_size
                known.add((found.st_dev, found.st_ino))
                # A repair or a compaction is no sign of life.
                if path.name.startswith("part-") or path.parent.name.startswith("attempt="):
                    written = max(written, found.st_mtime)
    if not written and manifests.is_dir():
        written = manifests.stat().st_mtime  # it has begun and written nothing yet
    return Pruned(run_id=run_id, bytes=size, written=datetime.fromtimestamp(written, UTC))


def _delete(store: Store, run_id: str, grace_seconds: float) -> bool:
    """Delete what a run that was given up has on disk, if that is long enough ago; whether it was."""
    mark = _mark(store, run_id)
    then = datetime.fromisoformat(json.loads(mark.read_bytes())["at"])
    if (datetime.now(UTC) - then).total_seconds() < grace_seconds:
        return False
    for directory in _places(store, run_id):
        if not store.is_pruned(run_id):
            return False  # it was launched again
        if directory.is_dir():
            shutil.rmtree(directory)
    for path in mark.parent.iterdir():
        if path != mark:
            _remove_tree(path)
    mark.unlink()
    mark.parent.rmdir()
    return True


def _places(store: Store, run_id: str) -> list[Path]:
    """Where a run's files of tables are, hidden ones too."""
    tables = [root / table for root in (store.path, store.path / HIDDEN) for table in ALL_TABLES]
    return [table / f"run_id={run_id}" for table in tables]


def _remove_tree(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _mark(store: Store, run_id: str) -> Path:
    return store.manifests(run_id) / PRUNED


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
