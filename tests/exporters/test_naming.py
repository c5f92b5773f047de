"""Names and labels as Prometheus' rules want them, and as dashboards rely on them."""

import re

import pytest

from lm_telemetry.catalogue import CATALOGUE
from lm_telemetry.exporters.naming import (
    BY_HEAD,
    LABELS,
    SUMMED,
    metric_labels,
    metric_name,
    metric_stats,
    metric_unit,
    series_name,
)

EXPORTED = [(m.table, m.name) for m in CATALOGUE if m.exported]


@pytest.mark.parametrize(
    ("column", "name", "labels"),
    [
        (("steps", "loss"), "lm_telemetry_steps_loss", ()),
        (("steps", "seconds"), "lm_telemetry_steps_seconds", ()),
        (("overhead", "seconds"), "lm_telemetry_overhead_seconds_total", ("instrument",)),
        (("overhead", "captures"), "lm_telemetry_overhead_captures_total", ("instrument",)),
        (("layers", "rms"), "lm_telemetry_layers_rms", ("stack", "layer", "site")),
        (("heads", "entropy"), "lm_telemetry_heads_entropy", ("stack", "layer", "kind", "stat")),
        (
            ("head_effects", "effect"),
            "lm_telemetry_head_effects_effect",
            ("stack", "layer", "kind", "ablation", "stat"),
        ),
        (("params", "norm"), "lm_telemetry_params_norm", ("stack", "layer")),
        (("params", "update_ratio"), "lm_telemetry_params_update_ratio", ("stack", "layer", "stat")),
        (("curvature", "value"), "lm_telemetry_curvature_value", ("operator", "scope", "estimator", "index")),
    ],
    ids=str,
)
def test_names_that_dashboards_rely_on(column, name, labels):
    assert series_name(*column) == name
    assert metric_labels(*column) == labels


def test_every_exported_column_has_labels_and_no_two_have_one_name():
    assert {table for table, _ in EXPORTED} == set(LABELS)
    assert len({series_name(*column) for column in EXPORTED}) == len(EXPORTED)


@pytest.mark.parametrize("column", EXPORTED, ids=".".join)
def test_names_conform(column):
    table, _ = column
    name, labels = metric_name(*column), metric_labels(*column)
    assert re.fullmatch(r"lm_telemetry_[a-z][a-z0-9_]*[a-z0-9]", name)
    # Suffixes that OpenMetrics keeps for itself.
    assert not name.endswith(("_total", "_created", "_bucket", "_count", "_sum", "_info"))
    assert series_name(*column) == name + ("_total" if table in SUMMED else "")
    assert name.endswith(metric_unit(*column))
    assert len(set(labels)) == len(labels)
    assert not {"run_id", "rank", "head", "step", "job", "instance", "le", "quantile"} & set(labels)


@pytest.mark.parametrize("column", EXPORTED, ids=".".join)
def test_heads_are_summarised_and_entropies_keep_their_minimum(column):
    table, name = column
    stats = set(metric_stats(*column))
    if table in BY_HEAD:
        assert stats >= {"mean", "p90", "max"}
        assert ("min" in stats) == ("entropy" in name)
    else:
        assert ("stat" in metric_labels(*column)) == bool(stats) == (column == ("params", "update_ratio"))
