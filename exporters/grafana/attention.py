"""The dashboard `attention`: do heads collapse, run away, or specialise, and in which layer?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_telemetry.exporters.grafana import limits, verdicts
from lm_telemetry.exporters.grafana.board import Section, board
from lm_telemetry.exporters.grafana.panels import GREEN, ORANGE, RED, layer_map, lines, verdict
from lm_telemetry.exporters.grafana.promql import Query, meaning, per_layer, per_run, unit_of, where

if TYPE_CHECKING:
    from grafana_foundation_sdk.builders.heatmap import Panel as LayerMap
    from grafana_foundation_sdk.models.dashboard import Dashboard

_RUN = "{{run_id}} r{{rank}}"
_SHARE: tuple[float, float] = (0, 1)


def dashboard() -> Dashboard:
    """Built anew."""
    return board(
        "attention",
        "Attention: do heads collapse, run away, or specialise?",
        "Statistics of attention rows, over the heads of each layer. Single heads are in the table `heads`: ask"
        ' `lmt sql "FROM attention_health"`.',
        [
            Section(title="Where it stands", panels=_verdicts()),
            Section(title="Layer by layer: $run_id", panels=_layers(), each_run=True),
            Section(title="Keys and heads: $run_id", panels=_probing(), each_run=True),
            Section(title="Runs compared", panels=_runs()),
        ],
        layers="lm_telemetry_heads_entropy",
    )


def _heads(column: str, stat: str) -> str:
    return f"lm_telemetry_heads_{column}{where(stat=stat)}"


def _verdicts() -> list[Any]:
    return [
        verdicts.entropy(),
        verdict(
            "Lowest layer",
            "Normalized entropy of the layer whose heads look at fewest keys in the mean: a collapse, if low.",
            f"min({_heads('normalized_entropy', 'mean')})",
            steps=((None, RED), (limits.ENTROPY_COLLAPSE, ORANGE), (2 * limits.ENTROPY_COLLAPSE, GREEN)),
            bounds=_SHARE,
            unit="percentunit",
        ),
        verdicts.logits(),
        verdict(
            "Strongest sink",
            "The largest share of attention that a head gives to the first key. Sinks are common, and harmless in"
            " themselves.",
            f"max({_heads('sink_mass', 'max')})",
            steps=((None, GREEN), (0.5, ORANGE)),
            bounds=_SHARE,
            unit="percentunit",
        ),
        verdict(
            "Best induction head",
            "The largest share of attention on the token after the previous occurrence of the present one. It rises"
            " when the model learns to copy.",
            f"max({_heads('induction_score', 'max')})",
            steps=((None, ORANGE), (0.3, GREEN)),
            bounds=_SHARE,
            unit="percentunit",
        ),
        verdict(
            "Best previous-token head",
            "The largest share of attention on the key just before the query: the other half of an induction circuit.",
            f"max({_heads('prev_token_mass', 'max')})",
            steps=((None, ORANGE), (0.3, GREEN)),
            bounds=_SHARE,
            unit="percentunit",
        ),
    ]


def _map(
    title: str,
    column: str,
    stat: str,
    how: str,
    *,
    bounds: tuple[float | None, float | None] = (None, None),
    reverse: bool = False,
    table: str = "heads",
    **exact: str,
) -> LayerMap:
    """A column over layers and time, the given statistic of a layer's heads."""
    pick = "min" if stat == "min" else "max"
    return layer_map(
        title,
        f"{meaning(table, column)} {how}",
        per_layer(table, column, pick, stat=stat, **exact),
        unit="percentunit" if bounds == _SHARE else unit_of(table, column),
        bounds=bounds,
        reverse=reverse,
    )


def _layers() -> list[Any]:
    return [
        _map(
            "Lowest normalized entropy",
            "normalized_entropy",
            "min",
            "Of each layer the lowest head; a row that turns bright and stays so has collapsed.",
            bounds=_SHARE,
            reverse=True,
        ),
        _map("Mean entropy", "entropy", "mean", "Of each layer the mean over heads; dark layers look at few keys."),
        _map("Largest logit", "max_logit", "max", "Of each layer the largest head; a row that brightens runs away."),
        _map("Mean sink", "sink_mass", "mean", "Of each layer the mean over heads.", bounds=_SHARE),
        _map(
            "Best induction score",
            "induction_score",
            "max",
            "Of each layer the best head; a row that lights up at one moment is a circuit that forms.",
            bounds=_SHARE,
        ),
        _map(
            "Previous-token mass",
            "prev_token_mass",
            "max",
            "Of each layer the strongest head; it forms a layer below the induction heads, and before them.",
            bounds=_SHARE,
        ),
        _map("Local mass", "local_mass", "mean", "Of each layer the mean over heads.", bounds=_SHARE),
        _map("Log-sum-exp", "lse", "max", "Of each layer the largest head; it grows with the logits."),
        _map("Output norm", "output_norm", "max", "Of each layer the head that writes most into the stream."),
    ]


def _probing() -> list[Any]:
    return [
        _map(
            "Gini of received attention",
            "gini",
            "mean",
            "Of each layer the mean over heads.",
            bounds=_SHARE,
            table="key_mass",
        ),
        _map(
            "Attention to the heaviest tenth",
            "heavy_share",
            "mean",
            "Of each layer the mean over heads; near 100 % a cache of a tenth of the keys would do.",
            bounds=_SHARE,
            table="key_mass",
        ),
        _map(
            "Loss without a head",
            "effect",
            "max",
            "Of each layer the head that is missed most.",
            table="head_effects",
        ),
    ]


def _runs() -> list[Any]:
    return [
        lines(
            "Lowest normalized entropy",
            f"{meaning('heads', 'normalized_entropy')} The lowest head of each run.",
            Query(expr=per_run("heads", "normalized_entropy", "min", stat="min"), legend=_RUN),
            unit="percentunit",
            steps=((None, RED), (limits.ENTROPY_COLLAPSE, GREEN)),
            bounds=_SHARE,
        ),
        lines(
            "Largest logit",
            f"{meaning('heads', 'max_logit')} The largest head of each run.",
            Query(expr=per_run("heads", "max_logit", stat="max"), legend=_RUN),
            unit="suffix:nats",
            steps=((None, GREEN), (limits.LOGIT_BOUND, RED)),
            bounds=(0, 100),
        ),
        lines(
            "Best induction score",
            f"{meaning('heads', 'induction_score')} The best head of each run.",
            Query(expr=per_run("heads", "induction_score", stat="max"), legend=_RUN),
            unit="percentunit",
            bounds=_SHARE,
        ),
    ]
