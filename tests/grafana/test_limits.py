"""One set of cut-offs: in the views, in the alert rules, in the colours of dashboards."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from lm_telemetry import queries
from lm_telemetry.exporters.grafana import limits
from lm_telemetry.exporters.grafana.stack import SOURCE

VIEWS = Path(queries.__file__).parent / "views"

# name: (view and how it compares there, alert and how it compares there)
WHERE = {
    "SPIKE_SIGMAS": ("spikes", r"mean_loss \+ {} \*", "LmTelemetryLossSpike", r"\+ {} \* clamp_min"),
    "EDGE_ONSET": ("edge_of_stability", r"> {} ", None, None),
    "ENTROPY_COLLAPSE": ("entropy_collapse", r"normalized_entropy < {} ", "LmTelemetryEntropyCollapse", r":mean < {}$"),
    "LOGIT_BOUND": ("logit_growth", r"max_logit > {} ", "LmTelemetryLogitGrowth", r":max > {}$"),
    "DEAD_RMS": ("dead_layers", r"rms < {} ", "LmTelemetryDeadLayer", r"rms:min < {} "),
    "DEAD_ZEROS": ("dead_layers", r"zero_fraction > {} ", "LmTelemetryDeadLayer", r"zero_fraction:max > {}$"),
    "RANK_LOSS": ("rank_collapse", r"rank_change < {} ", "LmTelemetryRankCollapse", r"< {} \* max_over_time"),
    "ANISOTROPY": ("rank_collapse", r"anisotropy > {} ", "LmTelemetryRankCollapse", r"anisotropy:max > {}$"),
    "UPDATE_FAST": ("update_ratios", r"update_ratio > {} ", "LmTelemetryExplodingUpdates", r"ratio > {} and"),
}


def number(value):
    """A pattern for every way to write it."""
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return rf"(?:{re.escape(f'{value:g}')}|{re.escape(str(value))}|{mantissa}e{int(exponent)})"


def test_every_limit_is_compared():
    assert set(WHERE) == {name for name in vars(limits) if name.isupper()}


@pytest.mark.parametrize("name", WHERE)
def test_views_and_rules_agree(name):
    view, in_view, alert, in_rule = WHERE[name]
    value = number(getattr(limits, name))
    sql = re.sub(r"\s+", " ", re.sub(r"--[^\n]*", "", (VIEWS / f"{view}.sql").read_text()))
    assert re.search(in_view.format(value), sql)
    if alert:
        document = yaml.safe_load((SOURCE / "prometheus" / "rules" / "alerts.yml").read_text())
        (expr,) = [r["expr"] for g in document["groups"] for r in g["rules"] if r["alert"] == alert]
        assert re.search(in_rule.format(value), expr.strip())
