r"""The background writer: takes captures from the training thread and puts them on disk, without ever holding it up.

    submit -> bounded queue -> [thread] produce() -> captures in memory
                               [thread, at a flush] captures -> Arrow tables -> parts in the store
                                                                           \-> observers (Prometheus)

Decisions:

- The queue is a `SimpleQueue`, whose `put` neither waits nor takes a lock that a signal handler could meet. When it is
  full, the capture is dropped and counted, and an event says how many once there is room.
- Captures become rows at the flush, all of a table together; one that does not fit is found by trying them one by one.
- A flush that fails (disk full, directory deleted, read-only) leaves the rows in memory, and is tried again at the next
  one. Past a bound the oldest rows go, counted. An event tells when writing works again.
- `produce` and observers are other people's code: what they raise becomes an event, and the writer goes on.
- A forked child has no thread: there everything is a no-op, so that a data loader's worker can neither write nor hang.
- Rows captured before the interpreter exits are flushed by `atexit`.

Left out: deciding what to capture (the agent), and how a file is made durable (`store`).
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import traceback
from dataclasses import dataclass, field
from functools import partial
from operator import methodcaller
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from lm_telemetry.columns import Captured, ColumnError, to_rows
from lm_telemetry.errors import StoreError
from lm_telemetry.events import Event, describe
from lm_telemetry.liveness import hold
from lm_telemetry.pending import Pending
from lm_telemetry.store import SEAL_AFTER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lm_telemetry.instruments.base import Columns
    from lm_telemetry.store import Store

FLUSH_BYTES = 16 * 2**20
"""Rows in memory that bring a flush forward."""

EVENT_RESERVE = 1024
"""Places in the queue that only events may take, so that a flood of captures cannot silence them."""

EXIT_SECONDS = 30.0
"""How long the interpreter's exit waits for the last flush."""

_COUNTS = ("rows", "parts", "bytes", "dropped_rows", "capture_failures", "flush_failures")

_log = logging.getLogger("lm_telemetry")


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterStats:
    """What the writer has done so far."""

    rows: int = 0
    """rows on disk"""
    parts: int = 0
    """files on disk"""
    bytes: int = 0
    """bytes of them"""
    dropped_captures: int = 0
    """captures and events refused because the queue was full"""
    dropped_rows: int = 0
    """rows given up because nothing could be written for too long"""
    capture_failures: int = 0
    """captures that raised or did not fit the catalogue"""
    flush_failures: int = 0
    """flushes that did not reach the disk"""
    queued: int = 0
    """captures and events waiting for the thread"""
    pending_rows: int = 0
    """rows in memory, waiting for a flush"""


class Observer(Protocol):
    """Who wants to see rows at each flush; called on the writer's thread."""

    def observe(self, table: str, rows: pa.Table) -> None:
        """Rows of `table` of one capture or several, in order, with all columns, before they are on disk."""

    def flushed(self, stats: WriterStats) -> None:
        """A flush was tried."""


@dataclass(frozen=True, slots=True)
class _Capture:
    step: int
    time_us: int
    produce: Callable[[], Mapping[str, Columns]]


@dataclass(slots=True)
class _Marker:
    """Asks for a flush, and, if `last`, for the end."""

    last: bool
    done: threading.Event = field(default_factory=threading.Event)
    written: bool = False


class Writer:
    """Writes captures of one rank of one run in a thread of its own; use as `submit ... submit, close`."""

    def __init__(
        self,
        store: Store,
        *,
        run_id: str,
        rank: int,
        attempt: int,
        flush_seconds: float,
        capacity: int = 4096,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._store = store
        self._run_id, self._rank, self._attempt = run_id, rank, attempt
        self._flush_seconds = flush_seconds
        self._capacity = capacity
        self._observers = list(observers)
        self._told_of: set[int] = set()
        self._manifest = store.read_manifest(run_id, rank, attempt)
        self._first_seq = store.next_seq(run_id, rank, attempt)
        self._seq: dict[str, int] = {}
        self._queue: SimpleQueue[_Capture | Event | _Marker] = SimpleQueue()
        self._pending = Pending()
        self._manifest_is_old = True
        self._lock: int | None = None
        self._stay_live()
        self._failing_since: float | None = None
        self._failed_before = 0
        self._last_step = 0
        self._refused_lock = threading.RLock()
        self._refused = self._told_refused = self._told_lost = 0
        self._counts = dict.fromkeys(_COUNTS, 0)
        # pyarrow imports pandas, where it is installed, when it first sees a list. Better here than on the thread, in
        # the middle of training, or at the interpreter's exit, where that import raises.
        pa.array([0])
        self._pid = os.getpid()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"lm-telemetry-writer-{run_id}-{rank}", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit)

    # On the caller's threads.

    def submit(self, step: int, produce: Callable[[], Mapping[str, Columns]]) -> bool:
        """Hand over a capture, stamped with the time now; `produce` gives its columns by table, on the thread.

        False if the queue is full (the capture is dropped and counted), after `close`, and in a forked child.
        """
        if self._closing or os.getpid() != self._pid:
            return False
        if self._queue.qsize() >= self._capacity:
            self._refuse()
            return False
        self._queue.put(_Capture(step, time.time_ns() // 1000, produce))
        return True

    def event(self, severity: str, kind: str, message: str, *, step: int, **fields: Any) -> None:
        """Record a row of `events`; any `fields` will do, and nothing is raised."""
        if self._closing or os.getpid() != self._pid:
            return
        if self._queue.qsize() >= self._capacity + EVENT_RESERVE:
            self._refuse()
            return
        self._queue.put(Event.now(severity, kind, message, step, fields))

    def flush(self, timeout: float) -> bool:
        """Whether all that was submitted before is on disk, waiting `timeout` seconds at most."""
        return not self._closing and self._ask(_Marker(last=False), timeout)

    def close(self, timeout: float) -> bool:
        """Write what is left, end the thread; whether all is on disk. A second call only waits for the first."""
        if os.getpid() != self._pid:
            return False
        if self._closing:
            self._thread.join(timeout)
            return not self._thread.is_alive() and not self._pending.rows
        self._closing = True
        atexit.unregister(self._at_exit)
        began = time.monotonic()
        written = self._ask(_Marker(last=True), timeout)
        self._thread.join(max(0.0, timeout - (time.monotonic() - began)))
        return written

    @property
    def stats(self) -> WriterStats:
        """A snapshot of what was done so far."""
        return WriterStats(
            **self._counts,
            dropped_captures=self._refused,
            queued=self._queue.qsize(),
            pending_rows=self._pending.rows,
        )

    def _refuse(self) -> None:
        with self._refused_lock:
            self._refused += 1

    def _ask(self, marker: _Marker, timeout: float) -> bool:
        if os.getpid() != self._pid or not self._thread.is_alive():
            return False
        self._queue.put(marker)
        return marker.done.wait(timeout) and marker.written

    def _at_exit(self) -> None:
        self.close(EXIT_SECONDS)

    # On the writer's thread.

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self._let_go()

    def _work(self) -> None:
        due = time.monotonic() + self._flush_seconds
        while True:
            item: _Capture | Event | _Marker | None
            try:
                item = self._queue.get(timeout=max(0.0, due - time.monotonic()))
            except Empty:
                item = None
            if isinstance(item, _Capture | Event):
                _, error = _contained(partial(self._take, item))
                if error is not None:
                    _contained(partial(self._lost, item.step, error))
                    _log.warning("lm-telemetry: a capture was lost: %s", describe(error))
            if self._pending.caught_bytes >= FLUSH_BYTES:
                _contained(self._gather)
            early = self._pending.bytes >= FLUSH_BYTES and self._failing_since is None
            if isinstance(item, _Marker) or early or time.monotonic() >= due:
                written, error = _contained(self._flush)
                if error is not None:
                    self._counts["flush_failures"] += 1
                    _log.warning("lm-telemetry: a flush failed: %s", describe(error))
                due = time.monotonic() + self._flush_seconds
                if isinstance(item, _Marker):
                    item.written = bool(written)
                    item.done.set()
                    if item.last:
                        return

    def _stay_live(self) -> None:
        """Have others see that this attempt is being written, as soon as it has a directory."""
        if self._lock is None:
            directory = self._store.manifest_path(self._run_id, self._rank, self._attempt).parent
            self._lock = hold(directory)

    def _let_go(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take(self, item: _Capture | Event) -> None:
        self._last_step = item.step
        if isinstance(item, Event):
            self._keep_event(item)
        else:
            self._capture(item)

    def _capture(self, capture: _Capture) -> None:
        produced, error = _contained(capture.produce)
        if error is not None:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            self._lost(capture.step, error, where=f"{frame.filename}:{frame.lineno} in {frame.name}")
        for table, columns in (produced or {}).items():
            try:
                self._keep(table, columns, capture.step, capture.time_us)
            except ColumnError as misfit:
                self._lost(capture.step, misfit, table=misfit.table, column=misfit.column)
        if self._refused > self._told_refused and self._queue.qsize() < self._capacity:
            count, self._told_refused = self._refused - self._told_refused, self._refused
            self._tell(
                "warning",
                "rows_dropped",
                f"{count} captures were dropped while {self._capacity} were waiting; capture less often",
                captures=count,
            )

    def _lost(self, step: int, error: Exception, **fields: Any) -> None:
        self._counts["capture_failures"] += 1
        self._keep_event(Event.now("error", "capture_failed", f"a capture was lost: {describe(error)}", step, fields))

    def _tell(self, severity: str, kind: str, message: str, **fields: Any) -> None:
        self._keep_event(Event.now(severity, kind, message, self._last_step, fields))

    def _keep_event(self, event: Event) -> None:
        self._keep("events", event.columns, event.step, event.time_us)

    def _keep(self, table: str, columns: Columns, step: int, time_us: int) -> None:
        captured = Captured.check(table, columns, step=step, time_us=time_us)
        if captured.rows:
            self._pending.catch(table, captured)

    def _gather(self) -> None:
        """Make rows of the captures, and show them to the observers."""
        while caught := self._pending.take_caught():  # again, where this brought events
            for table, captures in caught.items():
                for rows in self._batches(table, captures):
                    self._counts["dropped_rows"] += self._pending.add(table, rows)
                    self._show(methodcaller("observe", table, rows))

    def _batches(self, table: str, captures: list[Captured]) -> list[pa.Table]:
        """Rows of the captures: in one piece, or, where one does not fit, of each of the others."""
        rows, error = _contained(partial(to_rows, table, captures, attempt=self._attempt))
        if error is None:
            return [rows]
        if len(captures) > 1:
            return [rows for captured in captures for rows in self._batches(table, [captured])]
        if table == "events":  # an event of its own would fare no better
            _log.warning("lm-telemetry: an event was lost: %s", describe(error))
        else:
            column = error.column if isinstance(error, ColumnError) else None
            self._lost(captures[0].step, error, table=table, column=column)
        return []

    def _show(self, call: Callable[[Observer], None]) -> None:
        """Call each observer; of one that raises an event tells once, and it is called again next time."""
        for observer in self._observers:
            _, error = _contained(partial(call, observer))
            if error is not None and id(observer) not in self._told_of:
                self._told_of.add(id(observer))
                self._tell("error", "observer_failed", f"{type(observer).__name__} raised {describe(error)}")

    def _flush(self) -> bool:
        """Write all that is in memory; whether all of it, and the manifest, is on disk."""
        self._gather()
        error = self._write()
        if error is not None:
            self._counts["flush_failures"] += 1
            if self._failing_since is None:
                self._failing_since, self._failed_before = time.monotonic(), self._counts["flush_failures"] - 1
                message = f"rows stay in memory and are tried again: {error}"
                _log.warning("lm-telemetry: %s", message)
                self._tell("error", "flush_failed", message, path=error.path)
        elif self._failing_since is not None:
            self._tell(
                "warning",
                "flush_recovered",
                "writing works again",
                failures=self._counts["flush_failures"] - self._failed_before,
                seconds=time.monotonic() - self._failing_since,
                rows_lost=self._counts["dropped_rows"] - self._told_lost,
            )
            self._failing_since, self._told_lost = None, self._counts["dropped_rows"]
        self._show(lambda observer: observer.flushed(self.stats))
        self._gather()
        if error is None and self._pending.rows:  # events of this very flush
            error = self._write()
        return error is None

    def _write(self) -> StoreError | None:
        """Parts for what is in memory, then the manifest; the last error, having tried every table."""
        if (self._manifest.parts or self._manifest.sealed) and self._store.is_gone():
            parts = len(self._manifest.parts) + SEAL_AFTER * len(self._manifest.sealed)
            self._manifest.parts, self._manifest.sealed = [], []
            self._let_go()
            self._tell("error", "store_deleted", "the store was deleted; it is made again", parts=parts)
        failure: StoreError | None = None
        for table, rows in self._pending.by_table().items():
            seq = self._seq.get(table, self._first_seq)
            try:
                part = self._store.write_part(
                    rows, table=table, seq=seq, run_id=self._run_id, rank=self._rank, attempt=self._attempt
                )
            except StoreError as error:
                failure = error
                continue
            self._seq[table] = seq + 1
            self._manifest.parts.append(part)
            self._manifest_is_old = True
            self._pending.forget(table)
            for count, amount in (("rows", part.rows), ("parts", 1), ("bytes", part.bytes)):
                self._counts[count] += amount
        if self._manifest_is_old:
            try:
                self._store.write_manifest(self._manifest)
                self._manifest_is_old = False
                self._stay_live()
            except StoreError as error:
                failure = error
        return failure


def _contained(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What `call` returns, or what it raised: the one guard of the writer's thread, which nothing would restart."""
    try:
        return call(), None
    except Exception as error:  # noqa: BLE001 no bug of an instrument, an observer or our own may end the thread
        return None, error
