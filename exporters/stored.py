"""Runs of a store, finished or live, as one Prometheus page: for when the process that trained is gone.

    runs = StoredRuns(Holdings("telemetry-store", is_remote=False), Choice(), is_live=..., tell=print)
    server.publish(runs.poll())          # again and again; nothing is read if nothing has changed

Decisions:

- The page has what the endpoints of the runs would have, from the rows of the store (`recorded`), and with it which
  runs are live.
- A run that is over stays on the page, with the time of its last captures, while it is among the newest (`Choice`).
- What cannot be read leaves on the page what was there before: a run whose file is damaged its last values, a store
  that is gone all of it. A metric counts it, and it is told once for as long as it lasts. A run that alone is gone from
  its store is gone from the page.
- Served are at most `MAX_RANKS` ranks, of the newest runs first; metrics tell how many runs and ranks were left out.
- Each poll that has something to read opens a database and closes it, so that no cache grows with the days.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from lm_telemetry.exporters.exposition import Exposition, expose
from lm_telemetry.exporters.naming import PREFIX
from lm_telemetry.exporters.recorded import RecordedRun
from lm_telemetry.exporters.render import clean_label, merged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import duckdb

    from lm_telemetry.exporters.holdings import Holdings, Tables

MAX_RANKS = 128
"""Ranks served, of all runs together; each has `render.MAX_SERIES` series at most."""

_END = b"# EOF\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which runs are served: those that are named, or else the newest."""

    runs: tuple[str, ...] = ()
    since_seconds: float = 86400.0
    """how long ago a run may have been written last"""
    max_runs: int = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Served:
    """Which files of which runs are served, newest first, and what is left out."""

    runs: Mapping[str, Tables]
    left_out_runs: int = 0
    left_out_ranks: int = 0


class StoredRuns:
    """The runs of a store.

    Args:
        holdings: the store.
        choice: which runs.
        is_live: whether a run is being written, from its name and the time at which it last was.
        tell: called with a line about what goes wrong, once for as long as it does.

    Attributes:
        failures: how often the `store` could not be read, and how often a `run`.
    """

    def __init__(
        self, holdings: Holdings, choice: Choice, *, is_live: Callable[[str, float], bool], tell: Callable[[str], None]
    ) -> None:
        self._holdings, self._choice, self._is_live, self._tell = holdings, choice, is_live, tell
        self.failures: Counter[str] = Counter(store=0, run=0)
        self._refreshed, self._generation = 0.0, 0
        self._raw: duckdb.DuckDBPyConnection | None = None
        self._served = _Served(runs={})
        self._read: dict[str, Tables] = {}
        """files that the values of each run are from"""
        self._recorded: dict[str, RecordedRun] = {}
        self._live: dict[str, bool] = {}
        self._body = Exposition()
        self._troubles: set[str] = set()
        self._told: set[str] = set()

    @property
    def served(self) -> list[str]:
        """Names of the runs that are on the page, newest first."""
        return [run_id for run_id in self._served.runs if run_id in self._read]

    def poll(self) -> Exposition:
        """Look at the store; the page as it is then. Never raises: what goes wrong is told, and counted."""
        began = time.monotonic()
        self._troubles = set()
        if self._contained("store", f"the store {self._holdings.name}", self._refresh):
            self._refreshed = time.time()
        for trouble in sorted(self._troubles - self._told):
            self._tell(trouble)
        self._told = self._troubles
        head = expose(self._head(time.monotonic() - began))
        return Exposition(
            text=head.text + self._body.text, openmetrics=head.openmetrics.removesuffix(_END) + self._body.openmetrics
        )

    def end(self) -> None:
        """Let go of the query that a poll on another thread may wait for, which has nothing to tell of that."""
        self._tell = lambda _: None
        with suppress(Exception):  # it may be closed at this moment, which DuckDB tells in several ways
            if self._raw is not None:
                self._raw.interrupt()

    def _contained(self, kind: str, what: str, call: Callable[[], None]) -> bool:
        """Whether it went well. The one guard: filesystems, files and DuckDB raise anything, and the page must stay."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 it is told, and counted
            self.failures[kind] += 1
            self._troubles.add(f"{what} cannot be read; what was read of it before is still served: {_reason(error)}")
            return False
        return True

    def _refresh(self) -> None:
        self._holdings.look()
        if self._holdings.generation != self._generation:
            self._generation, self._read, self._recorded = self._holdings.generation, {}, {}
        served = self._choose()
        changed = list(served.runs) != list(self._served.runs)
        self._served = served
        self._read = {run_id: files for run_id, files in self._read.items() if run_id in served.runs}
        self._recorded = {run_id: run for run_id, run in self._recorded.items() if run_id in served.runs}
        try:
            for run_id, files in served.runs.items():
                is_news = self._read.get(run_id) != files
                if is_news:
                    changed |= self._contained("run", f"run {run_id}", partial(self._read_run, run_id, files))
                if is_news or self._live.get(run_id, False):
                    self._live[run_id] = self._is_live(run_id, self._holdings.times[run_id])
        finally:
            if self._raw is not None:
                self._raw.close()
                self._raw = None
        if changed:
            latests = (latest for run_id in self.served for latest in self._recorded[run_id].latests)
            self._body = expose(merged(latests))

    def _read_run(self, run_id: str, files: Tables) -> None:
        if self._raw is None:
            self._raw = self._holdings.database()
        snapshot = self._holdings.snapshot
        recorded = self._recorded.setdefault(run_id, RecordedRun(run_id))
        recorded.read(
            self._raw,
            snapshot.base,
            files,
            cuts=[cut for cut in snapshot.cuts if cut.run_id == run_id],
            is_untold=run_id in snapshot.untold,
            written=self._holdings.manifests[run_id].written(),
        )
        self._read[run_id] = files

    def _choose(self) -> _Served:
        """The runs to serve now."""
        times = self._holdings.times
        newest = sorted(times, key=lambda run_id: (-times[run_id], run_id))
        left_out = 0
        if self._choice.runs:
            wanted = [run_id for run_id in newest if run_id in self._choice.runs]
            for missing in {*self._choice.runs} - times.keys():
                self._troubles.add(f"the store {self._holdings.name} has no run {missing} yet")
        else:
            since = time.time() - self._choice.since_seconds
            recent = [run_id for run_id in newest if times[run_id] >= since]
            wanted, left_out = recent[: self._choice.max_runs], len(recent[self._choice.max_runs :])
            if not recent:
                why = f"none of its {len(times)} runs was written lately" if times else "it has no run yet"
                self._troubles.add(f"nothing of the store {self._holdings.name} is served: {why}")
        return self._within_bounds(wanted, left_out)

    def _within_bounds(self, wanted: list[str], left_out_runs: int) -> _Served:
        """These runs, as far as there is room for their ranks, and their names differ as labels."""
        runs: dict[str, Tables] = {}
        labels: set[str] = set()
        room, left_out_ranks = MAX_RANKS, 0
        for run_id in wanted:
            if clean_label(run_id) in labels:
                self._troubles.add(f"run {run_id} is left out: its label would be that of another run")
                left_out_runs += 1
                continue
            labels.add(clean_label(run_id))
            ranks = self._holdings.ranks[run_id]
            runs[run_id] = files = self._holdings.files[run_id]
            if len(ranks) > room:
                shown = frozenset(ranks[:room])
                runs[run_id] = {t: [part for part in parts if part.rank in shown] for t, parts in files.items()}
                left_out_ranks += len(ranks) - room
            room = max(0, room - len(ranks))
        return _Served(runs=runs, left_out_runs=left_out_runs, left_out_ranks=left_out_ranks)

    def _head(self, seconds: float) -> Iterator[Metric]:
        """Families about the runs as such, and about the polls."""
        live = GaugeMetricFamily(f"{PREFIX}_run_live", "whether a process is writing the run", labels=["run_id"])
        for run_id in self.served:
            live.add_metric([clean_label(run_id)], float(self._live[run_id]))
        yield live
        failures = CounterMetricFamily(
            f"{PREFIX}_export_failures", "polls that could not read the store, or one of its runs", labels=["what"]
        )
        for what, count in self.failures.items():
            failures.add_metric([what], count)
        yield failures
        for name, meaning, value in (
            ("refresh_timestamp_seconds", "when the store was last looked at with success", self._refreshed),
            ("refresh_seconds", "how long the last look took", seconds),
            ("left_out_runs", "runs that would be served, were there not too many", self._served.left_out_runs),
            ("left_out_ranks", f"ranks left out to stay at {MAX_RANKS}", self._served.left_out_ranks),
        ):
            unit = "seconds" if name.endswith("_seconds") else ""
            yield GaugeMetricFamily(f"{PREFIX}_export_{name}", meaning, value=value, unit=unit)


def _reason(error: Exception) -> str:
    """What went wrong, in a line."""
    return str(error).partition("\n\nLINE ")[0].strip().replace("\n", " ") or type(error).__name__
