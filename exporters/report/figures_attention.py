"""Figures of attention heads: entropy and logits by layer and step, and the map of all heads at the last capture."""

# ruff: noqa: S608 names of runs come quoted from `asking`, all else is our own

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lm_telemetry.exporters.report.asking import on_rank_0
from lm_telemetry.exporters.report.heatmaps import Measure, heatmaps
from lm_telemetry.exporters.report.model import Axis, Figure, HeadMap, Statistic
from lm_telemetry.exporters.report.words import layer_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_telemetry.exporters.report.asking import Source
    from lm_telemetry.exporters.report.model import Array

_HEADS = "FROM heads WHERE {run} AND kind = 'self' AND {value} IS NOT NULL GROUP BY step, stack, layer"

MEASURES = (
    Measure(
        stem="entropy",
        section="Attention",
        title="Attention entropy by layer",
        caption="Entropy of attention rows over its largest possible value, mean over the heads of each layer: 1 is"
        " even attention, 0 all on one key. A layer that falls toward 0 has collapsed (arXiv 2303.06296).",
        axis=Axis(label="normalized entropy"),
        cells="SELECT step, stack, layer, 'resid' AS site, avg(normalized_entropy) AS value "
        + _HEADS.replace("{value}", "normalized_entropy"),
        what="attention was",
        how="instrument `attention`",
    ),
    Measure(
        stem="max_logit",
        section="Attention",
        title="Largest attention logit by layer",
        caption="Largest logit of any sampled row, over the heads of each layer. Growth beyond about 50 comes before"
        " entropy collapse and divergence (arXiv 2309.14322).",
        axis=Axis(label="largest logit", unit="nats"),
        cells="SELECT step, stack, layer, 'resid' AS site, max(max_logit) AS value "
        + _HEADS.replace("{value}", "max_logit"),
        fold="max",
        what="attention logits were",
        how="instrument `attention`",
    ),
)

_STATISTICS: dict[str, tuple[Axis, str]] = {
    "normalized_entropy": (
        Axis(label="normalized entropy"),
        "entropy of the head's rows over its largest possible value: 0 is all on one key, 1 even attention",
    ),
    "entropy": (Axis(label="entropy", unit="nats"), "mean entropy of the head's rows"),
    "sink_mass": (
        Axis(label="sink mass"),
        "mean probability of the first key; above 0.3 the head is called a sink, which is common and harmless",
    ),
    "prev_token_mass": (Axis(label="previous-token mass"), "mean probability of the key just before the query"),
    "induction_score": (
        Axis(label="induction score"),
        "mean probability of the token after the previous occurrence of the query's own; above 0.3 an induction head",
    ),
    "max_logit": (Axis(label="largest logit", unit="nats"), "largest logit of any sampled row; above 50 is a warning"),
    "output_norm": (Axis(label="output norm"), "mean L2 norm of what the head writes into the residual stream"),
    "effect": (
        Axis(label="loss without the head", unit="nats"),
        "what the loss on the probe rises by when the head is knocked out, at the last capture of that",
    ),
}
"""Columns of the head map's query, in the order in which the reader may choose."""


def attention_figures(source: Source) -> Iterator[Figure | str]:
    """Figures, and a sentence for each that cannot be made."""
    captured = set()
    for run, run_id in enumerate(source.run_ids):
        for figure in _head_map(source, run, run_id):
            captured.add(run_id)
            yield figure
    yield from source.absent(captured, "attention heads were", "instrument `attention`")
    for measure in MEASURES:
        yield from heatmaps(source, measure)


def _head_map(source: Source, run: int, run_id: str) -> Iterator[Figure]:
    names = [name for name in _STATISTICS if name != "effect"]
    sql = f"""WITH latest AS (
    SELECT * FROM heads
    WHERE {on_rank_0(run_id)} AND kind = 'self' AND entropy IS NOT NULL
    QUALIFY step = max(step) OVER ()
),
knocked_out AS (
    SELECT stack, layer, head, effect FROM head_effects
    WHERE {on_rank_0(run_id)} AND kind = 'self'
    QUALIFY 1 = row_number() OVER (PARTITION BY stack, layer, head ORDER BY step DESC, ablation)
)
SELECT step, stack, layer, head, {", ".join(names)}, effect
FROM latest LEFT JOIN knocked_out USING (stack, layer, head)
ORDER BY stack, layer, head"""
    found = source.columns(sql)
    if not len(found["step"]):
        return
    places = list(zip(found["stack"], found["layer"], strict=True))
    order = sorted(set(places))
    at = [order.index(place) for place in places]
    head = found["head"].astype(int)
    statistics = []
    for name, (axis, meaning) in _STATISTICS.items():
        values = np.full((len(order), head.max() + 1), np.nan)
        values[at, head] = found[name]
        if np.isfinite(values).any():
            statistics.append(Statistic(axis=axis, meaning=meaning, values=values))
    step = int(found["step"][0])
    yield Figure(
        id=source.figure_id("heads", run_id),
        section="Attention",
        title="Attention heads",
        caption=f"Each cell is a head, each row a layer, the first at the bottom, at step {step:,}. Choose what the"
        " colour shows.",
        body=HeadMap(layers=_names(order), statistics=tuple(statistics), run=run, step=step),
        sql=sql,
    )


def _names(order: list[tuple[str, Array]]) -> tuple[str, ...]:
    several = len({stack for stack, _ in order}) > 1
    return tuple(layer_name(int(k), stack=stack if several else "").removeprefix("layer ") for stack, k in order)
