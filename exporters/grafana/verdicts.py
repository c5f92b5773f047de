"""Verdicts that stand on `overview` and on the dashboard of their field: one threshold and one sentence for both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_telemetry.exporters.grafana import limits
from lm_telemetry.exporters.grafana.panels import GREEN, ORANGE, RED, verdict
from lm_telemetry.exporters.grafana.promql import EDGE, LOST, NONFINITE, SMOOTH, UPDATE_RATIO, budget_used, where

if TYPE_CHECKING:
    from grafana_foundation_sdk.builders import stat

JOBS = '{job=~"lm-telemetry.*"}'
"""The jobs of `prometheus.yml`."""


def unreachable() -> stat.Panel:
    """Whether all endpoints answer."""
    return verdict(
        "Unreachable",
        "Endpoints that are listed as targets and do not answer. A run that ends takes its target away; one that is"
        " killed, or out of reach, stands here.",
        f"sum(up{JOBS} == bool 0)",
        steps=((None, GREEN), (1, RED)),
        bounds=(0, 10),
        words={0: "all answer"},
    )


def nonfinite() -> stat.Panel:
    """Whether activations are finite."""
    return verdict(
        "Non-finite activations",
        "NaN and infinite entries in the last captures of all layers. With any, look which layer has them first.",
        NONFINITE,
        steps=((None, GREEN), (1, RED)),
        bounds=(0, 10),
        words={0: "none"},
    )


def edge() -> stat.Panel:
    """How near the edge of stability is."""
    return verdict(
        "Sharpness over threshold",
        "The largest curvature as a share of the value at which the optimizer's linearised dynamics become unstable."
        " About 100 % is the edge of stability: usual in full-batch training, a warning with small batches; far above,"
        " expect spikes.",
        f"max({EDGE})",
        steps=((None, GREEN), (limits.EDGE_ONSET, ORANGE), (1.2, RED)),
        bounds=(0, 2),
        unit="percentunit",
        decimals=0,
    )


def update_ratio() -> stat.Panel:
    """Whether the fastest layer moves at a sane rate."""
    return verdict(
        "Largest update ratio",
        f"The largest update of a layer over its weights. About 1e-3 is usual, above {limits.UPDATE_FAST} is fast:"
        " fine in the first steps, not later.",
        f"max({UPDATE_RATIO})",
        steps=((None, GREEN), (limits.UPDATE_FAST, ORANGE), (10 * limits.UPDATE_FAST, RED)),
        bounds=(0, 1),
        unit="sci",
        decimals=1,
    )


def lost() -> stat.Panel:
    """Whether anything that was captured is lost."""
    return verdict(
        "Lost captures",
        "Captures and rows that were dropped or failed, and flushes that did not reach the disk, since each process"
        " started. What is lost is counted here and told in `events`.",
        f"sum({LOST})",
        steps=((None, GREEN), (1, ORANGE)),
        bounds=(0, 10),
        words={0: "none"},
    )


def entropy() -> stat.Panel:
    """Whether attention has collapsed."""
    return verdict(
        "Lowest attention entropy",
        "Entropy of the head that looks at fewest keys, over its largest possible value. Below"
        f" {limits.ENTROPY_COLLAPSE} it looks at one key: some heads do by design, a whole layer does not.",
        f"min(lm_telemetry_heads_normalized_entropy{where(stat='min')})",
        steps=((None, RED), (limits.ENTROPY_COLLAPSE, ORANGE), (2 * limits.ENTROPY_COLLAPSE, GREEN)),
        bounds=(0, 1),
        unit="percentunit",
    )


def logits() -> stat.Panel:
    """Whether attention logits are within their bound."""
    return verdict(
        "Largest logit",
        f"The largest attention logit of any head. Growth beyond {limits.LOGIT_BOUND} comes before divergence;"
        " normalised queries and keys, or a lower learning rate, hold it.",
        f"max(lm_telemetry_heads_max_logit{where(stat='max')})",
        steps=((None, GREEN), (limits.LOGIT_BOUND / 2, ORANGE), (limits.LOGIT_BOUND, RED)),
        bounds=(0, 100),
        unit="suffix:nats",
        decimals=1,
    )


def budget() -> stat.Panel:
    """Whether telemetry keeps to its budget."""
    return verdict(
        "Telemetry budget used",
        "Telemetry's share of the training time, over the share that the run allows it (`max_overhead`). Above 100 %"
        " cadences should be stretched.",
        f"max({budget_used(SMOOTH)})",
        steps=((None, GREEN), (0.8, ORANGE), (1, RED)),
        bounds=(0, 2),
        unit="percentunit",
        decimals=0,
        nan="no steps",
    )
