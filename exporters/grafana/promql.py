"""Queries of panels: selectors with the dashboard's variables, and what the catalogue knows of a metric.

Every query aggregates over the labels that Prometheus itself adds (`job`, `instance`): a run that is scraped at its own
endpoint and through `lmt export` is drawn once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lm_telemetry.catalogue import metric
from lm_telemetry.exporters.naming import series_name

RATE = "[$__rate_interval]"
"""Window of rates over time."""
SMOOTH = "[15m]"
"""Window of rates that are judged: the one of the alert, and long enough for steps of minutes."""

NAME = re.compile(r"\b(?:lm_telemetry_\w+|ALERTS|up|scrape_\w+)\b")
"""A metric in a query."""

_UNITS = {"nats": "suffix:nats", "s": "s", "tokens": "suffix:tokens"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One query of a panel."""

    expr: str
    """PromQL"""
    legend: str = ""
    """name of a series, with its labels in double braces"""
    now: bool = False
    """whether only the end of the chosen time is asked for"""


def where(*labels: str, **exact: str) -> str:
    """A selector: the chosen runs and ranks, and further matchers.

    Args:
        labels: names of labels, each matched against the variable of that name.
        exact: regular expressions for other labels.
    """
    matchers = [f'{name}=~"${name}"' for name in ("run_id", "rank", *labels)]
    matchers += [f'{name}=~"{pattern}"' for name, pattern in exact.items()]
    return f"{{{', '.join(matchers)}}}"


RUNS = where()
"""All series of the chosen runs and ranks."""


def unit_of(table: str, column: str) -> str:
    """Grafana's name for the unit of a column."""
    return _UNITS.get(metric(table, column).unit, "short")


def described(text: str, *queries: Query) -> str:
    """The description of a panel: what is seen, how to read it, and the metrics it is made of."""
    names = dict.fromkeys(name for query in queries for name in NAME.findall(query.expr))
    return f"{text}\n\nMetric: {', '.join(names)}"


def meaning(table: str, column: str) -> str:
    """The catalogue's sentence on a column, as a sentence."""
    text = metric(table, column).meaning
    return f"{text[0].upper()}{text[1:]}."


def once(series: str, *labels: str) -> str:
    """Each series once, however often it is scraped: what sums are made of.

    Args:
        series: PromQL.
        labels: those of the metric, beside `run_id` and `rank`.
    """
    return f"max by ({', '.join(('run_id', 'rank', *labels))}) ({series})"


def per_run(table: str, column: str, pick: str = "max", **exact: str) -> str:
    """One series per run and rank: the largest, smallest or mean (`pick`) of a column's series."""
    return f"{pick} by (run_id, rank) ({series_name(table, column)}{where(**exact)})"


def share(window: str = RATE) -> str:
    """Telemetry's share of the training time, per run and rank."""
    return f"{_spent('telemetry_seconds', window)} / {_spent('run_seconds', window)}"


def budget_used(window: str) -> str:
    """That share, over the one that the run allows."""
    return f"({share(window)}) / max by (run_id, rank) (lm_telemetry_max_overhead{RUNS})"


def _spent(name: str, window: str) -> str:
    return f"max by (run_id, rank) (rate(lm_telemetry_{name}_total{RUNS}{window}))"


def lately(series: str) -> str:
    """The last value of each series within the chosen time, also of runs that are over."""
    return f"last_over_time({series}[$__range])"


def per_layer(table: str, column: str, pick: str = "max", *labels: str, **exact: str) -> str:
    """One series per layer, over the chosen ranks: rows of a map."""
    selector = where("stack", "layer", *labels, **exact)
    return f"{pick} by (layer) ({series_name(table, column)}{selector})"


LOSS = f"max by (run_id, rank) (lm_telemetry_steps_loss{RUNS})"
EDGE = (
    f"max by (run_id, rank) (lm_telemetry_curvature_value{where(scope='all')}"
    f" / lm_telemetry_curvature_threshold{where(scope='all')})"
)
"""The largest curvature estimate as a share of its threshold."""
UPDATE_RATIO = (
    f"max by (run_id, rank, stack, layer) (lm_telemetry_params_update_norm{RUNS})"
    f" / max by (run_id, rank, stack, layer) (lm_telemetry_params_norm{RUNS})"
)
"""Update over weights of each layer, its tensors taken together, as the view `update_ratios` has it."""
NONFINITE = f"sum({once(f'lm_telemetry_layers_nonfinite{RUNS}', 'stack', 'layer', 'site')})"
"""NaN and infinite activations in the last captures."""
EVENTS = f"sum by (run_id, severity) ({once(f'lm_telemetry_events_total{RUNS}', 'severity')})"
LOST = " + ".join(
    once(f"lm_telemetry_{name}_total{RUNS}")
    for name in ("dropped_captures", "dropped_rows", "capture_failures", "flush_failures")
)
"""What was captured and did not come to disk, or not at once."""
