"""Latest values as metric families: how rows become series, and what is left out. `naming` says what they are called.

Decisions:

- A gauge holds the last value that was measured; NULL leaves it as it is. As it then looks fresh for ever, the last
  captured step and time of each table are always served beside it.
- Counters carry an exemplar where it leads to a row: an event's kind and step, the step of a capture that was paid for.
- Labels of the run itself (model, dtype, ranks, ...) stand in `lm_telemetry_run_info` alone, and are joined to others
  by `run_id` and `rank`.
- At most `MAX_SERIES` are served for a run and rank, the same ones each time, so that series do not come and go. How
  many were left out is a metric. Nor are more than `KEPT_SERIES` kept, whatever labels the rows bring.
- What is not known is not served: without a row of `runs` there is no budget, without a writer there are no counts of
  what it wrote.
"""

from __future__ import annotations

import re
from itertools import islice
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, Exemplar, GaugeMetricFamily, InfoMetricFamily, Metric

from lm_telemetry.catalogue import metric
from lm_telemetry.columns import split
from lm_telemetry.exporters.exposition import expose
from lm_telemetry.exporters.naming import (
    BY_HEAD,
    LABELS,
    PREFIX,
    SUMMED,
    exported_columns,
    metric_labels,
    metric_name,
    metric_stats,
    metric_unit,
)
from lm_telemetry.exporters.summary import Groups

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import pyarrow as pa

    from lm_telemetry.writer import WriterStats

MAX_SERIES = 2000
"""Series served for one rank of one run."""
KEPT_SERIES = 50 * MAX_SERIES
"""Series held in memory for it; past it, rows with labels that were not seen before are passed over."""
LABEL_LIMIT = 200
"""Characters kept of a label's value."""
KIND_LIMIT = 64
"""Characters kept of an event's kind, so that its exemplar stays under the 128 that OpenMetrics allows."""

_RUN_INFO = (
    "model_class", "n_parameters", "n_layers", "n_heads", "hidden_size", "dtype", "attention", "mode", "optimizer",
    "world_size",
)  # fmt: skip
"""Columns of `runs` that become labels of `lm_telemetry_run_info`."""

_SEVERITIES = ("info", "warning", "error")
"""Counted from the start; events of any other severity become those of `other`."""

_COUNTERS = {
    "rows": ("written_rows", "rows on disk"),
    "bytes": ("written_bytes", "bytes of Parquet on disk"),
    "dropped_captures": ("dropped_captures", "captures refused because too many were waiting"),
    "dropped_rows": ("dropped_rows", "rows given up because nothing could be written for too long"),
    "capture_failures": ("capture_failures", "captures that raised or did not fit the catalogue"),
    "flush_failures": ("flush_failures", "flushes that did not reach the disk"),
}

_Series = dict[tuple[str, ...], tuple[float, Exemplar | None]]
"""Values, and exemplars, by the values of the labels."""


class Latest:
    """The latest value of every exported column of one rank of one run.

    Args:
        run_id: label of every series.
        rank: label of every series.
        info: labels of `lm_telemetry_run_info`; those of the row of `runs` are added when it comes.
    """

    def __init__(self, *, run_id: str, rank: int, info: Mapping[str, str]) -> None:
        self._run = (clean_label(run_id), str(rank))
        self._info = {_label_name(name): clean_label(value) for name, value in info.items()}
        for name in ("run_id", "rank"):
            self._info.pop(name, None)
        self._series: dict[tuple[str, str], _Series] = {
            (table, column): {} for table in LABELS for column in exported_columns(table)
        }
        self._kept = 0
        self._last: dict[str, tuple[int, float]] = {}
        self._seconds = dict.fromkeys(("telemetry_seconds", "seconds"), 0.0)
        self._max_overhead: float | None = None
        self._events: dict[str, tuple[int, Exemplar | None]] = dict.fromkeys(_SEVERITIES, (0, None))
        self._stats: WriterStats | None = None

    def observe(self, table: str, rows: pa.Table) -> None:
        """Take in rows of one capture or several, in order."""
        self._last[table] = _stamp(rows)
        if table == "runs":
            self._observe_run(rows)
        elif table == "events":
            self._observe_events(rows)
        elif table in LABELS:
            if table == "steps":
                for name in self._seconds:
                    self._seconds[name] += sum(s for s in rows[name].to_pylist() if s is not None)
            self._observe_values(table, rows)

    def flushed(self, stats: WriterStats) -> None:
        """Take in what the writer has done."""
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """The metric families, at most `MAX_SERIES` series in all."""
        about = list(self._about())
        yield from about
        room = MAX_SERIES - sum(len(family.samples) for family in about) - 1
        left_out = 0
        for (table, column), series in self._series.items():
            if not series:
                continue
            make = CounterMetricFamily if table in SUMMED else GaugeMetricFamily
            family = make(
                metric_name(table, column),
                metric(table, column).meaning,
                labels=["run_id", "rank", *metric_labels(table, column)],
                unit=metric_unit(table, column),
            )
            for labels, (value, exemplar) in islice(series.items(), room):
                if isinstance(family, CounterMetricFamily):
                    family.add_metric([*self._run, *labels], value, exemplar=exemplar)
                else:
                    family.add_metric([*self._run, *labels], value)
            room -= len(family.samples)
            left_out += len(series) - len(family.samples)
            if family.samples:
                yield family
        yield self._gauge("left_out_series", f"series left out to stay at {MAX_SERIES}", {(): left_out})

    def _about(self) -> Iterator[Metric]:
        """Families about the run and the telemetry itself."""
        info = InfoMetricFamily(f"{PREFIX}_run", "what the run is; always 1", labels=["run_id", "rank"])
        info.add_metric(self._run, self._info)
        yield info
        steps: dict[tuple[str, ...], float] = {(table,): step for table, (step, _) in sorted(self._last.items())}
        times: dict[tuple[str, ...], float] = {(table,): time for table, (_, time) in sorted(self._last.items())}
        yield self._gauge("last_step", "last step of which the table has a row", steps, "table")
        yield self._gauge("last_capture_timestamp_seconds", "when that row was captured", times, "table")
        telemetry, run = self._seconds["telemetry_seconds"], self._seconds["seconds"]
        yield self._counter("telemetry_seconds", "time the agent took on the training thread", telemetry)
        yield self._counter("run_seconds", "wall time of all steps", run)
        if self._max_overhead is not None:
            meaning = "share of the training time the agent may take"
            yield self._gauge("max_overhead", meaning, {(): self._max_overhead})
        events = CounterMetricFamily(f"{PREFIX}_events", "events by severity", labels=["run_id", "rank", "severity"])
        for severity, (count, exemplar) in self._events.items():
            events.add_metric([*self._run, severity], count, exemplar=exemplar)
        yield events
        if self._stats is not None:
            yield self._gauge(
                "queue_captures", "captures and events that wait to be taken in", {(): self._stats.queued}
            )
            for attribute, (name, meaning) in _COUNTERS.items():
                yield self._counter(name, meaning, getattr(self._stats, attribute))

    def _gauge(self, name: str, meaning: str, values: Mapping[tuple[str, ...], float], *labels: str) -> Metric:
        family = GaugeMetricFamily(f"{PREFIX}_{name}", meaning, labels=["run_id", "rank", *labels], unit=_unit_of(name))
        for own, value in values.items():
            family.add_metric([*self._run, *own], value)
        return family

    def _counter(self, name: str, meaning: str, value: float) -> Metric:
        family = CounterMetricFamily(f"{PREFIX}_{name}", meaning, labels=["run_id", "rank"], unit=_unit_of(name))
        family.add_metric(self._run, value)
        return family

    def _observe_run(self, rows: pa.Table) -> None:
        row = rows.slice(rows.num_rows - 1).to_pylist()[0]
        self._info |= {name: clean_label(row[name]) for name in _RUN_INFO if row[name] is not None}
        self._max_overhead = row["max_overhead"]

    def _observe_events(self, rows: pa.Table) -> None:
        for row in rows.select(["severity", "kind", "step", "time"]).to_pylist():
            severity = row["severity"] if row["severity"] in _SEVERITIES else "other"
            # Of exemplars some parsers read plain words only, whatever the format says.
            kind = re.sub(r"[^\w.-]", "_", str(row["kind"])[:KIND_LIMIT], flags=re.ASCII)
            labels = {"kind": kind, "step": str(row["step"])}
            exemplar = Exemplar(labels, 1, row["time"].timestamp())
            count, _ = self._events.get(severity, (0, None))
            self._events[severity] = (count + 1, exemplar)

    def _observe_values(self, table: str, rows: pa.Table) -> None:
        """Take the last values that are not NULL, or all where they are summed."""
        *earlier, last = split(rows)
        for capture in earlier:
            if table in SUMMED:
                self._take(table, capture, exported_columns(table))
            else:
                self._take(table, capture, _not_replaced(table, capture, last))
        self._take(table, last, exported_columns(table))

    def _take(self, table: str, rows: pa.Table, columns: Sequence[str]) -> None:
        """Take a capture's values that are not NULL; of heads and of parameter tensors what stands for their layer."""
        if not columns:
            return
        names = LABELS[table]
        self._last[table] = _stamp(rows)
        if table in BY_HEAD or table == "params":
            groups = Groups(rows, names)
            for column in columns:
                stats = metric_stats(table, column)
                for (key, stat), summary in groups.summarise(rows[column], stats or ("norm",)).items():
                    self._set(table, column, (*key, stat) if stats else key, summary)
            return
        keys = list(zip(*(rows[name].to_pylist() for name in names), strict=True)) or [()] * rows.num_rows
        for column in columns:
            for key, value in zip(keys, rows[column].to_pylist(), strict=True):
                if value is not None:
                    self._set(table, column, key, float(value))

    def _set(self, table: str, column: str, labels: tuple[Any, ...], value: float) -> None:
        """Give a series its latest value, or add to it where its table is summed."""
        series = self._series[table, column]
        key = tuple("other" if label is None else clean_label(label) for label in labels)
        if key not in series:
            if self._kept >= KEPT_SERIES:
                return
            self._kept += 1
        if table in SUMMED:
            step, time = self._last[table]
            before, _ = series.get(key, (0.0, None))
            series[key] = (before + value, Exemplar({"step": str(step)}, value, time))
        else:
            series[key] = (value, None)


def _stamp(rows: pa.Table) -> tuple[int, float]:
    """Step of the last row, and when it was captured."""
    last = rows.slice(rows.num_rows - 1).select(["step", "time"]).to_pylist()[0]
    return last["step"], last["time"].timestamp()


def _not_replaced(table: str, rows: pa.Table, later: pa.Table) -> list[str]:
    """Columns of a capture with values for which a later one has no others: mostly none, and then it costs nothing."""
    is_alike = all(rows[name].equals(later[name]) for name in LABELS[table])
    return [
        column
        for column in exported_columns(table)
        if rows[column].null_count < rows.num_rows and not (is_alike and later[column].null_count == 0)
    ]


def render(latests: Iterable[Latest], *, openmetrics: bool = False) -> bytes:
    """Several ranks or runs on one page: each family once, with the samples of all."""
    exposition = expose(merged(latests))
    return exposition.openmetrics if openmetrics else exposition.text


def merged(latests: Iterable[Latest]) -> list[Metric]:
    """The families of all, those of the same name as one."""
    families: dict[str, Metric] = {}
    for latest in latests:
        for family in latest.collect():
            if family.name in families:
                families[family.name].samples.extend(family.samples)
            else:
                families[family.name] = family
    return list(families.values())


def _unit_of(name: str) -> str:
    return next((unit for unit in ("seconds", "bytes") if name.endswith(f"_{unit}")), "")


def clean_label(value: Any) -> str:
    """Any value as a label: UTF-8, not too long. The exposition escapes quotes and newlines."""
    return str(value)[:LABEL_LIMIT].encode("utf-8", "replace").decode("utf-8")


def _label_name(name: str) -> str:
    return re.sub(r"\W", "_", name, flags=re.ASCII).lstrip("_0123456789") or "label"
