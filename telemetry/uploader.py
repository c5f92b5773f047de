"""The thread that brings what the writer has put into the spool to the remote store, and never holds anything up.

Decisions:

- The writer acknowledges a row when it is on the local disk, so an outage, or a remote that accepts and never answers,
  costs training nothing and loses nothing. What fails is tried again, ever more rarely, for as long as the process is.
- The spool has a bound. It is kept on the writer's thread, since this one may hang: past it the oldest parts that wait
  go, counted, listed as lost, and told in an event.
- Rows that an earlier process has left in the spool, of any run, are taken along by whichever process comes next. Those
  that cannot be read are told of once, tried again now and then, and hold up nothing.
- The end of a run waits for the remote for some seconds, and then says where the rest is.

Left out: merging small parts on their way (`flush_seconds` decides how many there are), compaction on the remote.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_telemetry.errors import StoreError
from lm_telemetry.events import describe
from lm_telemetry.lane import Lane, is_finished
from lm_telemetry.store import MANIFESTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import pyarrow as pa

    from lm_telemetry.remote import Remote
    from lm_telemetry.store import Store
    from lm_telemetry.writer import WriterStats

PUBLISH_PARTS = 64
"""Parts that are shipped before the remote lists them, so that a long backlog appears little by little."""

RESCAN_SECONDS = 30.0
"""How often the spool is searched for rows that other processes have left."""

FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
"""Between tries while the remote fails; each wait is about twice the one before."""

TELL_SECONDS = 600.0
"""While parts have to go, an event says so this often."""

_log = logging.getLogger("lm_telemetry")


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadStats:
    """What the uploader has done so far."""

    parts: int = 0
    """files that arrived"""
    bytes: int = 0
    """bytes of them"""
    dropped_parts: int = 0
    """files given up because the spool was full"""
    dropped_rows: int = 0
    """rows in them"""
    failures: int = 0
    """tries that the remote did not take"""
    waiting_parts: int = 0
    """files in the spool that are not on the remote"""
    waiting_bytes: int = 0
    """bytes of them"""
    damaged: int = 0
    """ranks of earlier attempts whose rows cannot be read in the spool"""
    busy: int = 0
    """ranks whose rows another process brings up"""


class Uploader:
    """Uploads one rank's parts, and what others have left; an `Observer` of the writer. `start`, then `drain`, `close`.

    Args:
        spool: the store that the writer writes.
        remote: where its files go.
        limit_bytes: what may wait in this process's care.
        own: run, attempt and rank of the writer; None to bring up only what was left.

    Attributes:
        step: the step of the last rows that were captured.
        trouble: what the last try met; None if all went well.

    Raises:
        StoreError: the spool cannot be written.
    """

    def __init__(self, spool: Store, remote: Remote, *, limit_bytes: int, own: tuple[str, int, int] | None) -> None:
        self._spool, self._remote = spool, remote
        self._limit_bytes = limit_bytes
        self._tell: Callable[..., None] = _say
        self._lanes: list[Lane] = []
        self._own: Lane | None = None
        if own is not None:
            # Before the writer has listed anything, so that nobody else takes it for a leftover.
            run_id, attempt, rank = own
            try:
                self._own = Lane.take(spool, run_id, rank, attempt)
            except OSError as error:
                raise StoreError(f"cannot write the spool {spool.path}: {error}", path=str(spool.path)) from error
            self._lanes += [self._own] if self._own is not None else []
        self._counts = {"parts": 0, "bytes": 0, "dropped_parts": 0, "dropped_rows": 0, "failures": 0}
        self.step = 0
        self.trouble: str | None = None
        self._damaged: set[tuple[str, int, int]] = set()
        self._busy = 0
        self._bound = threading.Lock()
        self._told_full: float | None = None
        self._failing_since: float | None = None
        self._before_failing = dict(self._counts)
        self._changed = threading.Condition()
        self._asked = self._answered = 0
        self._has_new = True
        self._is_clean = False
        self._closing = self._has_ended = False
        self._rescan_due = 0.0
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="lm-telemetry-uploader", daemon=True)

    def start(self, tell: Callable[..., None]) -> None:
        """Begin; `tell(severity, kind, message, step=, **fields)` records an event."""
        self._tell = tell
        self._thread.start()

    # On the writer's thread.

    def observe(self, table: str, rows: pa.Table) -> None:
        """Rows were captured."""
        self.step = rows["step"][-1].as_py()

    def flushed(self, stats: WriterStats) -> None:
        """Parts may have come into the spool: keep it within its bound, and wake the thread."""
        if self._own is not None:
            self._own.refresh()
        self._keep_bound()
        with self._changed:
            self._has_new = True
            self._changed.notify_all()

    # On any thread.

    def drain(self, seconds: float) -> bool:
        """Whether all that can be read in the spool is on the remote, trying again for `seconds` at most."""
        if os.getpid() != self._pid or not self._thread.is_alive():
            return False
        end = time.monotonic() + seconds
        with self._changed:
            while True:
                self._asked += 1
                asked = self._asked
                self._changed.notify_all()
                left = end - time.monotonic()
                self._changed.wait_for(lambda: self._has_ended or self._answered >= asked, left)  # noqa: B023 called at once
                if self._answered >= asked and self._is_clean:
                    return True
                left = end - time.monotonic()
                if self._has_ended or left <= 0:
                    return False
                self._changed.wait_for(lambda: self._has_ended, min(FIRST_WAIT_SECONDS, left))

    def close(self, seconds: float) -> bool:
        """Upload what is left and end the thread; whether all is on the remote. The rest stays in the spool."""
        if os.getpid() != self._pid:  # a forked child, where a lock may be held by a thread that is not there
            return False
        clean = self.drain(seconds)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(1.0 if clean else 0.1)
        return clean

    @property
    def stats(self) -> UploadStats:
        """A snapshot of what was done so far."""
        lanes = list(self._lanes)
        return UploadStats(
            **self._counts,
            waiting_parts=sum(lane.waiting for lane in lanes),
            waiting_bytes=sum(lane.waiting_bytes for lane in lanes),
            damaged=len(self._damaged),
            busy=self._busy,
        )

    def _keep_bound(self) -> None:
        with self._bound:  # both threads come here, and each would make room
            self._make_room()

    def _make_room(self) -> None:
        lanes = list(self._lanes)
        excess = sum(lane.waiting_bytes for lane in lanes) - self._limit_bytes
        dropped = rows = 0
        for lane in sorted(lanes, key=lambda lane: lane is self._own):  # what was left by others is older
            while excess > 0 and (part := lane.drop_oldest()) is not None:
                excess -= part.bytes
                dropped += 1
                rows += part.rows
        self._counts["dropped_parts"] += dropped
        self._counts["dropped_rows"] += rows
        if dropped and (self._told_full is None or time.monotonic() - self._told_full > TELL_SECONDS):
            self._told_full = time.monotonic()
            self._event(
                "error",
                "spool_full",
                f"rows are given up: more than {self._limit_bytes} bytes wait in {self._spool.path} for"
                f" {self._remote.url}, which does not take them",
                dropped_parts=self._counts["dropped_parts"],
                dropped_rows=self._counts["dropped_rows"],
            )

    def _event(self, severity: str, kind: str, message: str, **fields: Any) -> None:
        _log.warning("lm-telemetry: %s: %s", kind, message)
        self._tell(severity, kind, message, step=self.step, **fields)

    # On the uploader's thread.

    def _run(self) -> None:
        try:
            tries = 0
            while not self._closing:
                with self._changed:
                    asked = self._asked
                    self._has_new = False
                error = self._try()
                tries = 0 if error is None else tries + 1
                with self._changed:
                    self._is_clean = error is None and all(lane.is_done for lane in self._lanes)
                    if self._is_clean or error is not None:  # else more has come meanwhile, and is next
                        self._answered = asked
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._is_wanted(failing=tries > 0), _wait_seconds(tries))  # noqa: B023 called at once
        finally:
            for lane in self._lanes:
                with suppress(OSError):
                    lane.let_go()
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()

    def _is_wanted(self, *, failing: bool) -> bool:
        return self._closing or self._asked > self._answered or (self._has_new and not failing)

    def _try(self) -> Exception | None:
        """One pass over all lanes; what it met."""
        try:
            self._adopt()
            failures = list(self._pass())
        except Exception as error:  # noqa: BLE001 filesystems raise whatever their clients do, and nothing restarts us
            failures = [error]
        if self._closing:
            return None
        self.trouble = describe(failures[0]) if failures else None
        if failures:
            self._failed(failures[0])
            return failures[0]
        if self._failing_since is not None:
            before, self._before_failing = self._before_failing, dict(self._counts)
            seconds, self._failing_since = time.monotonic() - self._failing_since, None
            self._told_full = None
            self._event(
                "warning",
                "upload_recovered",
                f"{self._remote.url} takes rows again",
                seconds=seconds,
                **{f: self._counts[f] - before[f] for f in ("failures", "dropped_parts", "dropped_rows")},
            )
        return None

    def _pass(self) -> Iterator[Exception]:
        """Bring up what each lane has. What is wrong with one is no matter of the others; of the remote, it is."""
        # All are looked at before the first is brought: what waits is to be known also while the remote fails.
        for work in (Lane.refresh, self._bring):
            for lane in sorted(self._lanes, key=lambda lane: lane is not self._own):
                try:
                    work(lane)
                except (StoreError, ValueError, KeyError, TypeError) as error:
                    if lane is self._own:
                        yield error
                    else:
                        self._set_aside(lane.key, error)
                        self._part_with(lane)
            self._keep_bound()
        for lane in [lane for lane in self._lanes if lane is not self._own and lane.is_done]:
            self._damaged.discard(lane.key)
            self._part_with(lane)

    def _part_with(self, lane: Lane) -> None:
        self._lanes.remove(lane)
        lane.let_go()

    def _set_aside(self, key: tuple[str, int, int], error: Exception) -> None:
        """Tell of a leftover that cannot be read; it is tried again when the spool is searched the next time."""
        if key not in self._damaged:
            self._damaged.add(key)
            run_id, attempt, rank = key
            self._event(
                "error",
                "spool_damaged",
                f"rows of rank {rank} in attempt {attempt} of {run_id} stay in {self._spool.path}: {describe(error)}",
                spool=self._spool.path,
            )

    def _bring(self, lane: Lane) -> None:
        apart = lane.greet(self._remote)
        if apart is not None:
            run_id, attempt, _ = lane.key
            self._event(
                "warning",
                "run_apart",
                f"attempt {attempt} of {run_id} is another launch's at {self._remote.url}, which did not answer when"
                f" this one began: its rows go to the run {apart}",
                remote_run_id=apart,
            )
        count = 0
        while not self._closing and (part := lane.ship(self._remote)) is not None:
            self._counts["parts"] += 1
            self._counts["bytes"] += part.bytes
            count += 1
            if count % PUBLISH_PARTS == 0:
                lane.publish(self._remote)
        if not self._closing:
            lane.publish(self._remote)

    def _adopt(self) -> None:
        """Take what other processes have left, now and then."""
        if time.monotonic() < self._rescan_due:
            return
        self._rescan_due = time.monotonic() + RESCAN_SECONDS
        mine = {lane.key for lane in self._lanes}
        busy = 0
        for run_id, attempt, rank in sorted(_listed(self._spool.path) - mine):
            try:
                if is_finished(self._spool, run_id, rank, attempt):
                    continue
                lane = Lane.take(self._spool, run_id, rank, attempt)
            except (OSError, StoreError) as error:
                self._set_aside((run_id, attempt, rank), error)
                continue
            if lane is None:
                busy += 1
            else:
                self._lanes.append(lane)
        self._busy = busy

    def _failed(self, error: Exception) -> None:
        self._counts["failures"] += 1
        self._remote.renew()
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            self._before_failing = self._counts | {"failures": self._counts["failures"] - 1}
            self._event(
                "error",
                "upload_failed",
                f"{self._remote.url} does not take rows; they wait in {self._spool.path}: {describe(error)}",
                url=self._remote.url,
                spool=self._spool.path,
            )


def _say(*_: Any, **__: Any) -> None:
    """For events when there is no run to record them: the log has them."""


def _wait_seconds(tries: int) -> float:
    if tries == 0:
        return RESCAN_SECONDS
    longest = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** min(tries - 1, 16))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 spreads ranks, hides nothing


def _listed(spool: Path) -> set[tuple[str, int, int]]:
    """Run, attempt and rank of every manifest in the spool."""
    found = set()
    for path in (spool / MANIFESTS).glob("run_id=*/attempt=*/rank=*.json"):
        rank, attempt = path.stem.removeprefix("rank="), path.parent.name.removeprefix("attempt=")
        if rank.isdecimal() and attempt.isdecimal():  # sealed lists are not
            found.add((path.parent.parent.name.removeprefix("run_id="), int(attempt), int(rank)))
    return found
