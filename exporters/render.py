"""Latest values as Prometheus text: what a metric is called, how rows become series, and what is left out.

Decisions:

- Names follow the SQL: `lm_telemetry_<table>_<column>`, with `_seconds` where the unit asks for it; HELP is the
  catalogue's meaning.
- A gauge holds the last value that was measured; NULL leaves it as it is. As it then looks fresh for ever, the last
  captured step and time of each table are always served beside it.
- The number of series is bounded by the model's depth, not by its heads or tensors: heads become the mean, maximum and
  minimum of their layer, parameter tensors one norm per layer. There is no `head` and no `step` label.
- At most `MAX_SERIES` are served, the same ones each time, so that series do not come and go: those of tables that
  come later in `_LABELS` give way first. How many were left out is a metric.
"""

from __future__ import annotations

import math
import re
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest

from lm_telemetry.catalogue import columns, metric

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lm_telemetry.writer import WriterStats

MAX_SERIES = 2000
LABEL_LIMIT = 200
"""Characters kept of a label's value."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LABELS: dict[str, tuple[str, ...]] = {
    "steps": (),
    "curvature": ("operator", "scope", "estimator", "index"),
    "params": ("stack", "layer"),
    "layers": ("stack", "layer", "site"),
    "representations": ("stack", "layer", "site"),
    "heads": ("stack", "layer", "kind"),
    "head_effects": ("stack", "layer", "kind", "ablation"),
    "key_mass": ("stack", "layer", "kind"),
}
"""Labels of each exported table."""

_BY_HEAD = ("heads", "head_effects", "key_mass")
"""Tables with a row for each head, of which a layer's mean, maximum and minimum are served."""

_STATS = ("mean", "max", "min")

_COUNTERS = {
    "rows": ("written_rows", "Rows on disk."),
    "bytes": ("written_bytes", "Bytes of Parquet on disk."),
    "dropped_captures": ("dropped_captures", "Captures refused because too many were waiting."),
    "dropped_rows": ("dropped_rows", "Rows given up because nothing could be written for too long."),
    "capture_failures": ("capture_failures", "Captures that raised or did not fit the catalogue."),
    "flush_failures": ("flush_failures", "Flushes that did not reach the disk."),
}

_Series = dict[tuple[Any, ...], float]
"""Values by the values of the labels."""


def metric_name(table: str, column: str) -> str:
    """Name under which Prometheus knows a column: `lm_telemetry_steps_loss`."""
    name = f"lm_telemetry_{table}_{column}"
    return f"{name}_seconds" if metric(table, column).unit == "s" and not name.endswith("_seconds") else name


def metric_labels(table: str, column: str) -> tuple[str, ...]:
    """Labels of a column's series, beside `run_id` and `rank`."""
    summarised = table in _BY_HEAD or (table, column) == ("params", "update_ratio")
    return (*_LABELS[table], "stat") if summarised else _LABELS[table]


class Latest:
    """The latest value of every exported column, as a collector for a registry of its own."""

    def __init__(self, *, run_id: str, rank: int, info: Mapping[str, str]) -> None:
        self._run = (_clean(run_id), str(rank))
        self._info = {_label_name(name): _clean(value) for name, value in info.items()}
        for name in ("run_id", "rank"):
            self._info.pop(name, None)
        self._series: dict[tuple[str, str], _Series] = {
            (table, m.name): {} for table in _LABELS for m in columns(table) if m.exported
        }
        self._last: dict[str, tuple[int, float]] = {}
        self._telemetry_seconds = 0.0
        self._stats: WriterStats | None = None
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def observe(self, table: str, rows: pa.Table) -> None:
        """Take in a batch of rows of one step."""
        last = rows.slice(rows.num_rows - 1).select(["step", "time"]).to_pylist()[0]
        self._last[table] = (last["step"], last["time"].timestamp())
        if table == "steps":
            self._telemetry_seconds += sum(s for s in rows["telemetry_seconds"].to_pylist() if s is not None)
        if table in _BY_HEAD:
            self._observe_heads(table, rows)
        elif table == "params":
            self._observe_params(rows)
        elif table in _LABELS:
            for column in self._columns(table):
                self._set(table, column, rows, column)

    def flushed(self, stats: WriterStats) -> None:
        """Take in what the writer has done."""
        self._stats = stats

    def render(self) -> bytes:
        """All of it in the text exposition format."""
        return generate_latest(self._registry)

    def describe(self) -> Iterator[Any]:
        """Nothing: the registry need not ask for values to learn names."""
        return iter(())

    def collect(self) -> Iterator[Any]:
        """The metric families, at most `MAX_SERIES` series in all."""
        about = list(self._about())
        yield from about
        room = MAX_SERIES - sum(len(family.samples) for family in about) - 1
        left_out = 0
        for (table, column), series in self._series.items():
            if not series:
                continue
            family = _gauge(metric_name(table, column), metric(table, column).meaning, metric_labels(table, column))
            for labels in islice(sorted(series, key=_order), room):
                family.add_metric([*self._run, *map(_clean, labels)], series[labels])
            room -= len(family.samples)
            left_out += len(series) - len(family.samples)
            if family.samples:
                yield family
        family = _gauge("lm_telemetry_left_out_series", f"Series left out to stay at {MAX_SERIES}.", ())
        family.add_metric(self._run, left_out)
        yield family

    def _about(self) -> Iterator[Any]:
        """Families about the telemetry itself."""
        info = GaugeMetricFamily(
            "lm_telemetry_run_info", "What the run is; always 1.", labels=["run_id", "rank", *self._info]
        )
        info.add_metric([*self._run, *self._info.values()], 1)
        yield info
        step = _gauge("lm_telemetry_last_step", "Last step of which the table has a row.", ("table",))
        when = _gauge("lm_telemetry_last_capture_timestamp_seconds", "When that row was captured.", ("table",))
        for table, (number, seconds) in sorted(self._last.items()):
            step.add_metric([*self._run, table], number)
            when.add_metric([*self._run, table], seconds)
        yield step
        yield when
        yield self._counter("telemetry_seconds", "Time the agent took on the training thread.", self._telemetry_seconds)
        for attribute, (name, meaning) in _COUNTERS.items():
            yield self._counter(name, meaning, getattr(self._stats, attribute, 0))

    def _counter(self, name: str, meaning: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(f"lm_telemetry_{name}", meaning, labels=["run_id", "rank"])
        family.add_metric(self._run, value)
        return family

    def _columns(self, table: str) -> list[str]:
        return [column for t, column in self._series if t == table]

    def _set(self, table: str, column: str, rows: pa.Table, values: str, *more: str) -> None:
        """Take the values of a column of `rows` that are not NULL, under the table's labels and `more`."""
        labels = [rows[name].to_pylist() for name in _LABELS[table]]
        series = self._series[table, column]
        for i, value in enumerate(rows[values].to_pylist()):
            if value is not None:
                series[*(_label(label[i]) for label in labels), *more] = float(value)

    def _observe_heads(self, table: str, rows: pa.Table) -> None:
        names = self._columns(table)
        layers = _group(rows, _LABELS[table], [(name, stat) for name in names for stat in _STATS])
        for name in names:
            for stat in _STATS:
                self._set(table, name, layers, f"{name}_{stat}", stat)

    def _observe_params(self, rows: pa.Table) -> None:
        """Norms of layers, as root of the sum of squares over their tensors; of the ratio, the largest and the mean."""
        norms = [name for name in self._columns("params") if name != "update_ratio"]
        for name in norms:
            values = rows[name].cast(pa.float64())
            rows = rows.append_column(f"{name}_squared", pc.multiply(values, values))
        wanted = [(f"{name}_squared", "sum") for name in norms]
        layers = _group(rows, _LABELS["params"], [*wanted, ("update_ratio", "max"), ("update_ratio", "mean")])
        for name in norms:
            total = layers[f"{name}_squared_sum"]
            self._set("params", name, layers.append_column(name, pc.sqrt(total)), name)
        for stat in ("max", "mean"):
            self._set("params", "update_ratio", layers, f"update_ratio_{stat}", stat)


def _group(rows: pa.Table, keys: tuple[str, ...], aggregations: Any) -> pa.Table:
    """`rows` grouped by `keys`; `aggregations` as pyarrow takes them, pairs of column and function."""
    return rows.group_by(list(keys), use_threads=False).aggregate(aggregations)


def _gauge(name: str, meaning: str, labels: tuple[str, ...]) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, meaning, labels=["run_id", "rank", *labels])


def _label(value: Any) -> Any:
    """A label's value: what has no layer or index is `other`."""
    return "other" if value is None else value


def _order(labels: tuple[Any, ...]) -> tuple[tuple[float, str], ...]:
    """Numbers by size, before words."""
    return tuple((value, "") if isinstance(value, int) else (math.inf, str(value)) for value in labels)


def _clean(value: Any) -> str:
    """Any value as a label: UTF-8, not too long. The exposition escapes quotes and newlines."""
    return str(value)[:LABEL_LIMIT].encode("utf-8", "replace").decode("utf-8")


def _label_name(name: str) -> str:
    return re.sub(r"\W", "_", name, flags=re.ASCII).lstrip("_0123456789") or "label"
