"""Programs of child processes that tests kill: a writer and a compactor, which go on until then."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pyarrow as pa

from lm_telemetry.compaction import compact
from lm_telemetry.store import Store
from lm_telemetry.writer import Writer

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path

pa.array([0])  # what this imports is imported once, in the server that the children are forked from


class Acknowledge:
    """Sends the last step that is on disk, after each flush."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._last = 0

    def observe(self, table, rows):
        if table == "steps":
            self._last = rows["step"][-1].as_py()

    def flushed(self, stats):
        if not stats.pending_rows and self._last:
            self._pipe.send(self._last)


def write_for_ever(path: Path, pipe: Connection, attempt: int | None, flush_seconds: float) -> None:
    """A run `r` from step 1 on, flushed every so often; the value is the step. No `attempt` claims the next."""
    store = Store.open_for_writing(path)
    number = store.claim_attempt("r") if attempt is None else attempt
    writer = Writer(
        store, run_id="r", rank=0, attempt=number, flush_seconds=flush_seconds, observers=[Acknowledge(pipe)]
    )
    step = 0
    while True:
        step += 1
        writer.submit(step, lambda step=step: {"steps": {"loss": [float(step)]}, "layers": {"rms": [float(step)] * 5}})
        time.sleep(0.001)


def compact_for_ever(path: Path, grace_seconds: float, file_rows: int = 1 << 20) -> None:
    """Compaction of rank 0 of run `r`, again and again."""
    store = Store(path)
    while True:
        compact(store, "r", 0, grace_seconds=grace_seconds, file_rows=file_rows)
        time.sleep(0.002)
