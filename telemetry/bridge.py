r"""Forwards scalars to the trackers that people live in: TensorBoard, wandb, MLflow, trackio, through accelerate's.

    writer -> observe (writer's thread) -> one bounded queue a tracker -> [thread] GeneralTracker.log

Decisions:

- What is forwarded, and how rows of heads and of tensors become a few numbers a layer, is what Prometheus is served
  (`exporters.naming`). Names follow the SQL: `steps/loss`, `curvature/hessian/lanczos/0/value` (a scope that is not
  `all` comes after the operator), `layers/decoder/3/resid/rms`, `heads/decoder/3/self/entropy/min`. There are at most
  `MAX_NAMES` of them, those that come first.
- Every captured step is sent, at the writer's flush, as the tracker's step. That is not so in a wandb run that is live
  already: wandb refuses steps older than its newest, and ours are late by a flush. There the step is a metric of its
  own, `lm_telemetry/step`, and the x axis of ours. By name, each of our steps is a row, which moves on wandb's count of
  rows: fit for a host that lets wandb count, as transformers' callback does. A host that passes `step` would lose rows
  by that; it gives its tracker object, and our latest values join its own rows.
- Each tracker has a thread and a queue, so that none can hold up the writer or another. A full queue drops its oldest
  steps. What is dropped is counted; the store has everything.
- A tracker that is named is opened by its thread when the first rows come, with the run's name, and finished at the
  end. A tracker object, and a wandb run that is live by then, is the host's: used, and left open.
- accelerate's trackers log to a logger that refuses to work before the process has an accelerate state, and making one
  would choose a device and may start a process group. Where there is none, theirs is one that does not ask.
- Rank 0 forwards, which the session sees to.

Left out: hyperparameters, texts, events.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from lm_telemetry.columns import split
from lm_telemetry.errors import SettingsError
from lm_telemetry.events import describe
from lm_telemetry.exporters.naming import BY_HEAD, LABELS, exported_columns, metric_stats
from lm_telemetry.exporters.summary import Groups

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import pyarrow as pa

    from lm_telemetry.writer import WriterStats

PROJECT = "lm-telemetry"
"""Name of the project or experiment, where a tracker has such."""
MAX_NAMES = 2000
MAX_WAITING = 200_000
"""Values that may wait for one tracker."""
BATCH = 1000
"""Values of one call; MLflow takes no more."""
STEP = "lm_telemetry/step"

_RUN_NAME = {
    "wandb": "name",
    "trackio": "name",
    "mlflow": "run_name",
    "swanlab": "experiment_name",
    "clearml": "task_name",
}
"""The keyword by which a tracker takes the run's name, where it is not the first argument."""

_UNFIT = re.compile(r"[^A-Za-z0-9_.-]")
"""Characters that some tracker refuses in a name."""


def check_trackers(given: Sequence[Any]) -> tuple[Any, ...]:
    """Names and tracker objects, each once.

    Raises:
        SettingsError: there is no such tracker, or its package is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
    from accelerate.utils import LoggerType

    known, available = ({str(kind) for kind in kinds} for kinds in (LoggerType, get_available_trackers()))
    for tracker in given:
        if isinstance(tracker, GeneralTracker):
            continue
        if not isinstance(tracker, str) or tracker not in LOGGER_TYPE_TO_CLASS:
            raise SettingsError(
                f"forward_to: expected names of trackers ({', '.join(sorted(LOGGER_TYPE_TO_CLASS))}) or"
                f" accelerate's tracker objects; got {tracker!r}",
                setting="forward_to",
                value=tracker,
            )
        # A class that somebody has registered is there, by a name that accelerate's own list lacks.
        if tracker in known and tracker not in available:
            package = tracker.replace("_", "-")
            raise SettingsError(
                f"forward_to: {tracker} is not installed, or switched off in the environment; pip install {package}",
                setting="forward_to",
                value=tracker,
            )
    return tuple(dict.fromkeys(given))


class Bridge:
    """An observer of the writer that forwards scalars.

    Args:
        trackers: names and objects, as `check_trackers` gives them.
        run_id: name of the run.
        base: path beside which trackers that write files have their directory: `BASE-tensorboard`.
        tell: writes an event: severity, kind, message, and `step` and fields as keywords.
    """

    def __init__(self, trackers: Sequence[Any], *, run_id: str, base: str, tell: Callable[..., None]) -> None:
        self._tell = tell
        self._names: set[str] = set()
        self._is_told = False
        self._steps: dict[int, dict[str, float]] = {}
        self._lanes = [_Lane(tracker, run_id=run_id, base=base, tell=tell) for tracker in trackers]

    def observe(self, table: str, rows: pa.Table) -> None:
        """Take in rows of one capture or several."""
        if table not in LABELS or not self._lanes:
            return
        for capture in split(rows):
            step = capture["step"][0].as_py()
            values = self._steps.setdefault(step, {})
            for name, value in scalars(table, capture):
                if name not in self._names:
                    if len(self._names) >= MAX_NAMES:
                        self._left_out(step)
                        continue
                    self._names.add(name)
                values[name] = value

    def flushed(self, stats: WriterStats) -> None:
        """Hand over what has come since the last flush."""
        steps, self._steps = self._steps, {}
        for step, values in sorted(steps.items()):
            for lane in self._lanes:
                lane.put(step, values)

    def close(self, seconds: float) -> bool:
        """Send what waits, and finish the trackers that were opened here; whether all is sent, in so many seconds."""
        deadline = time.monotonic() + seconds
        lanes, self._lanes = self._lanes, []
        for lane in lanes:
            lane.end()
        sent = [lane.join(max(0.0, deadline - time.monotonic())) for lane in lanes]
        return all(sent)

    def _left_out(self, step: int) -> None:
        if not self._is_told:
            self._is_told = True
            message = f"trackers get the first {MAX_NAMES} scalars; the others are in the store alone"
            self._tell("info", "forward_limited", message, step=step, limit=MAX_NAMES)


def scalars(table: str, rows: pa.Table) -> Iterator[tuple[str, float]]:
    """Name and value of what is forwarded of rows of one step; NULL is left out, NaN is not."""
    labels = LABELS[table]
    if table in BY_HEAD or table == "params":
        groups = Groups(rows, labels)
        for column in exported_columns(table):
            stats = metric_stats(table, column)
            for (key, stat), value in groups.summarise(rows[column], stats or ("norm",)).items():
                place = _place(dict(zip(labels, key, strict=True)))
                yield "/".join([table, *place, column, *([stat] if stats else [])]), value
        return
    for row in rows.select([*labels, *exported_columns(table)]).to_pylist():
        place = _place({label: row[label] for label in labels})
        for column in exported_columns(table):
            if row[column] is not None:
                yield "/".join([table, *place, column]), float(row[column])


def _place(labels: Mapping[str, Any]) -> list[str]:
    """The values of the labels, as parts of a name."""
    if labels and all(value is None for value in labels.values()):
        return ["outside"]  # tensors of no layer
    shown = {k: v for k, v in labels.items() if v is not None and not (k == "scope" and v == "all")}
    return [_UNFIT.sub("_", str(value).replace("+", "p")) for value in shown.values()]


class _Lane:
    """One tracker, its queue and its thread."""

    def __init__(self, tracker: Any, *, run_id: str, base: str, tell: Callable[..., None]) -> None:
        self._given = tracker
        self._run_id, self._base, self._tell = run_id, base, tell
        self.name = tracker if isinstance(tracker, str) else str(tracker.name)
        self._ready = threading.Condition()
        self._queue: deque[tuple[int, dict[str, float]]] = deque()
        self._waiting = 0
        self._ended = self._broken = False
        self._dropped = self._last_step = 0
        self._told: set[str] = set()
        self._defined: set[str] = set()
        self._thread = threading.Thread(target=self._run, name=f"lm-telemetry-forward-{self.name}", daemon=True)
        self._thread.start()

    # On the writer's thread, and at the end on the caller's.

    def put(self, step: int, values: dict[str, float]) -> None:
        """Have the values sent; the oldest that wait give way where there are too many."""
        dropped = 0
        with self._ready:
            if self._broken or self._ended:
                return
            self._queue.append((step, values))
            self._waiting += len(values)
            while self._waiting > MAX_WAITING and len(self._queue) > 1:
                self._waiting -= len(self._queue.popleft()[1])
                dropped += 1
            self._dropped += dropped
            self._last_step = step
            self._ready.notify()
        if dropped:
            message = f"{self.name} does not take what is forwarded; its oldest steps are dropped. The store has them"
            self._once("warning", "forward_dropped", message)

    def end(self) -> None:
        """No more is coming."""
        with self._ready:
            self._ended = True
            self._ready.notify()

    def join(self, seconds: float) -> bool:
        """Whether everything was sent, waiting so many seconds at most; if not, an event says so."""
        self._thread.join(seconds)
        with self._ready:
            left, dropped = len(self._queue) + self._thread.is_alive(), self._dropped
        if left or dropped:
            message = f"{self.name} lacks {dropped} steps that were dropped, and what had to wait till the end"
            self._once("warning", "forward_left", message, dropped=dropped, waiting=len(self._queue))
        return not left and not dropped and not self._broken

    # On the lane's thread.

    def _run(self) -> None:
        tracker: Any = None
        while (item := self._next()) is not None:
            try:
                if tracker is None:
                    tracker, is_ours = self._open()
                self._send(tracker, is_ours, *item)
            except Exception as error:  # noqa: BLE001 other people's code, on a thread that nothing would restart
                self._failed(error)
                if tracker is None:
                    with self._ready:
                        self._broken = True
                        self._queue.clear()
                    return
        if tracker is not None and is_ours:
            try:
                tracker.finish()
            except Exception as error:  # noqa: BLE001 ditto
                self._failed(error)

    def _next(self) -> tuple[int, dict[str, float]] | None:
        """The oldest that waits; None at the end."""
        with self._ready:
            while not self._queue and not self._ended:
                self._ready.wait()
            if not self._queue:
                return None
            step, values = self._queue.popleft()
            self._waiting -= len(values)
            return step, values

    def _open(self) -> tuple[Any, bool]:
        """The tracker, and whether it is ours to finish."""
        _let_trackers_log()
        if not isinstance(self._given, str):
            return self._given, False
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[self.name]
        named = {_RUN_NAME[self.name]: self._run_id} if self.name in _RUN_NAME else {}
        if kind.requires_logging_directory:
            tracker = kind(self._run_id, f"{self._base}-{self.name}")
        else:
            tracker = kind(PROJECT, **named)
        tracker.main_process_only = False  # to find out about ranks, it would make an accelerate state
        live = getattr(sys.modules.get("wandb"), "run", None) if self.name == "wandb" else None
        if live is not None:
            tracker.run = live
            return tracker, False
        tracker.start()
        return tracker, True

    def _send(self, tracker: Any, is_ours: bool, step: int, values: dict[str, float]) -> None:
        """Log the values of a step, in pieces that any tracker takes."""
        items = list(values.items())
        for at in range(0, len(items), BATCH):
            piece = dict(items[at : at + BATCH])
            if self.name == "wandb" and not is_ours:
                self._define(tracker.tracker, piece)
                tracker.log(piece | {STEP: step}, commit=isinstance(self._given, str))
            elif self.name == "mlflow":
                # The run that is active is another one on each thread.
                tracker.log(piece, step=step, run_id=tracker.tracker.info.run_id)
            else:
                tracker.log(piece, step=step)

    def _define(self, run: Any, values: Mapping[str, float]) -> None:
        """Tell wandb what the x axis of our tables is."""
        for table in {name.partition("/")[0] for name in values} - self._defined:
            run.define_metric(f"{table}/*", step_metric=STEP)
            self._defined.add(table)

    def _failed(self, error: Exception) -> None:
        self._once("error", "observer_failed", f"{self.name}, which scalars are forwarded to, raised {describe(error)}")

    def _once(self, severity: str, kind: str, message: str, **fields: Any) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self._tell(severity, kind, message, step=self._last_step, tracker=self.name, **fields)


def _let_trackers_log() -> None:
    """Have accelerate's trackers do without an accelerate state where there is none (see the module's docstring)."""
    from accelerate import tracking
    from accelerate.logging import MultiProcessAdapter
    from accelerate.state import PartialState

    class Stateless(MultiProcessAdapter):
        """accelerate's logger, which logs as any other while there is no state."""

        def log(self, level: int, msg: object, *args: Any, **kwargs: Any) -> None:
            if PartialState._shared_state:
                super().log(level, msg, *args, **kwargs)
            else:
                self.logger.log(level, msg, *args)

    if not PartialState._shared_state and type(tracking.logger) is MultiProcessAdapter:
        tracking.logger = Stateless(tracking.logger.logger, {})
