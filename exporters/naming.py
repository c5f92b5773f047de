"""What the columns of the catalogue are called in Prometheus, under which labels, and which summaries are served.

The exporter, the dashboards and the alert rules all take their names from here:

    metric_name("steps", "seconds")      # lm_telemetry_steps_seconds
    metric_labels("heads", "entropy")    # ("stack", "layer", "kind", "stat")
    metric_stats("heads", "entropy")     # ("mean", "p90", "max", "min")

Decisions:

- Names follow the SQL, `lm_telemetry_<table>_<column>`, with the base unit at the end where there is one.
- A row of `overhead` holds what came since the last one: its columns are counters of the sum over rows, and what one
  asks for has `_total` behind the name (`series_name`).
- There is no `head` and no `step` label, so that the number of series is bounded by the model's depth. Of the heads of
  a layer these are served, of the parameter tensors of a layer one norm:

  | columns | served | why |
  | --- | --- | --- |
  | of `heads`, `head_effects`, `key_mass` | mean, p90, max | the layer, its upper heads, and the one that runs away |
  | `heads.entropy`, `heads.normalized_entropy` | min as well | attention collapses downwards, in one head first |
  | `params.update_ratio` | max, mean | the tensor that moves fastest, and the layer |
  | norms of `params` | root of the sum of squares | the norm of the layer's tensors as one vector |
"""

from __future__ import annotations

from lm_telemetry.catalogue import columns, metric

PREFIX = "lm_telemetry"

LABELS: dict[str, tuple[str, ...]] = {
    "steps": (),
    "overhead": ("instrument",),
    "curvature": ("operator", "scope", "estimator", "index"),
    "params": ("stack", "layer"),
    "layers": ("stack", "layer", "site"),
    "representations": ("stack", "layer", "site"),
    "heads": ("stack", "layer", "kind"),
    "head_effects": ("stack", "layer", "kind", "ablation"),
    "key_mass": ("stack", "layer", "kind"),
}
"""Labels of each exported table; where not all series can be served, tables that come later give way first."""

BY_HEAD = frozenset({"heads", "head_effects", "key_mass"})
"""Tables with a row for each head, which are summarised over the heads of a layer."""

SUMMED = frozenset({"overhead"})
"""Tables whose rows hold what came since the last one, of which the sum is served, as a counter."""

_OF_HEADS = ("mean", "p90", "max")
_STATS: dict[tuple[str, str], tuple[str, ...]] = {
    ("heads", "entropy"): (*_OF_HEADS, "min"),
    ("heads", "normalized_entropy"): (*_OF_HEADS, "min"),
    ("params", "update_ratio"): ("max", "mean"),
}

_UNITS = {"s": "seconds"}
"""Names that Prometheus has for the catalogue's units; a pure number, and one of tokens or nats, has none."""


def exported_columns(table: str) -> tuple[str, ...]:
    """The columns of `table` that are served, in the catalogue's order."""
    return tuple(m.name for m in columns(table) if m.exported)


def metric_unit(table: str, column: str) -> str:
    """Unit at the end of the name; "" for none."""
    return _UNITS.get(metric(table, column).unit, "")


def metric_name(table: str, column: str) -> str:
    """Name of the metric family of a column: `lm_telemetry_steps_loss`."""
    name, unit = f"{PREFIX}_{table}_{column}", metric_unit(table, column)
    return name if name.endswith(unit) else f"{name}_{unit}"


def series_name(table: str, column: str) -> str:
    """Name by which a query asks for a column: that of the family, of a counter with `_total`."""
    name = metric_name(table, column)
    return f"{name}_total" if table in SUMMED else name


def metric_stats(table: str, column: str) -> tuple[str, ...]:
    """Values of the label `stat`; empty where a column is not summarised."""
    return _STATS.get((table, column), _OF_HEADS if table in BY_HEAD else ())


def metric_labels(table: str, column: str) -> tuple[str, ...]:
    """Labels of a column's series, beside `run_id` and `rank`."""
    return (*LABELS[table], "stat") if metric_stats(table, column) else LABELS[table]
