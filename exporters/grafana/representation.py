"""The dashboard `representation`: do layers die, explode, or collapse into few directions, and do they still move?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_telemetry.exporters.grafana import limits, verdicts
from lm_telemetry.exporters.grafana.board import Section, board
from lm_telemetry.exporters.grafana.panels import GREEN, ORANGE, RED, layer_map, lines, verdict
from lm_telemetry.exporters.grafana.promql import (
    RUNS,
    UPDATE_RATIO,
    Query,
    meaning,
    per_layer,
    per_run,
    unit_of,
    where,
)

if TYPE_CHECKING:
    from grafana_foundation_sdk.builders.heatmap import Panel as LayerMap
    from grafana_foundation_sdk.models.dashboard import Dashboard

_SHARE: tuple[float, float] = (0, 1)


def dashboard() -> Dashboard:
    """Built anew."""
    return board(
        "representation",
        "Representation: do layers die, explode or collapse?",
        "Activations at the chosen site, the geometry of the frozen probe's representation there, and the weights:"
        " layers from the bottom up, time to the right, the value as colour. -1 is the embedding.",
        [
            Section(title="Where it stands", panels=_verdicts()),
            Section(title="Activations at $site: $run_id", panels=_activations(), each_run=True),
            Section(title="Geometry at $site: $run_id", panels=_geometry(), each_run=True),
            Section(title="Weights and updates: $run_id", panels=_weights(), each_run=True),
            Section(title="Runs compared", panels=_runs()),
        ],
        layers="lm_telemetry_layers_rms",
        sites=True,
    )


def _verdicts() -> list[Any]:
    return [
        verdicts.nonfinite(),
        verdict(
            "Smallest RMS",
            f"The quietest place of the model; below {limits.DEAD_RMS:g} it is dead.",
            f"min(lm_telemetry_layers_rms{RUNS})",
            steps=((None, RED), (limits.DEAD_RMS, GREEN)),
            bounds=(0, 1),
            unit="sci",
            decimals=1,
        ),
        verdict(
            "Most exact zeros",
            f"The largest share of exact zeros at any place; above {limits.DEAD_ZEROS:.1%} it is dead.",
            f"max(lm_telemetry_layers_zero_fraction{RUNS})",
            steps=((None, GREEN), (0.9, ORANGE), (limits.DEAD_ZEROS, RED)),
            bounds=_SHARE,
            unit="percentunit",
        ),
        verdict(
            "Lowest effective rank",
            "Directions that the probe's tokens fill in the narrowest place of the model. Compare it with itself: its"
            " size depends on width and tokens.",
            f"min(lm_telemetry_representations_effective_rank{RUNS})",
            steps=((None, ORANGE), (2, GREEN)),
            bounds=(1, 100),
            decimals=1,
        ),
        verdict(
            "Highest anisotropy",
            f"Mean cosine similarity of distinct tokens where it is highest; above {limits.ANISOTROPY} they point one"
            " way. A massive activation alone can do that.",
            f"max(lm_telemetry_representations_anisotropy{RUNS})",
            steps=((None, GREEN), (limits.ANISOTROPY, ORANGE), (0.95, RED)),
            bounds=(-1, 1),
            decimals=2,
        ),
        verdicts.update_ratio(),
    ]


def _map(
    title: str,
    table: str,
    column: str,
    how: str,
    *,
    pick: str = "max",
    bounds: tuple[float | None, float | None] = (None, None),
    scheme: str = "Viridis",
    reverse: bool = False,
) -> LayerMap:
    """A column at the chosen site over layers and time."""
    return layer_map(
        title,
        f"{meaning(table, column)} {how}",
        per_layer(table, column, pick, "site"),
        unit="percentunit" if bounds == _SHARE else unit_of(table, column),
        bounds=bounds,
        scheme=scheme,
        reverse=reverse,
    )


def _activations() -> list[Any]:
    return [
        _map("RMS", "layers", "rms", "It grows with depth; a row that leaves the others explodes or dies."),
        _map("Largest magnitude", "layers", "absmax", "One bright row for good is a massive activation."),
        _map("Kurtosis", "layers", "kurtosis", "High values are few channels that carry much: hard to quantise."),
        _map("Exact zeros", "layers", "zero_fraction", "Near 100 % the place is dead.", bounds=_SHARE),
        _map("Outliers", "layers", "outlier_fraction", "They come in sudden steps, in many layers at once."),
        _map("Non-finite entries", "layers", "nonfinite", "The lowest bright row is where it began.", scheme="Reds"),
        _map("Mean", "layers", "mean", "Drift away from 0 is a bias that all tokens share."),
        _map("Standard deviation", "layers", "std", "Where it is far below the RMS, the mean carries the layer."),
    ]


def _geometry() -> list[Any]:
    table = "representations"
    return [
        _map(
            "Effective rank", table, "effective_rank", "A row that darkens collapses into few directions.", pick="min"
        ),
        _map("Participation ratio", table, "participation_ratio", "Weighs large directions more.", pick="min"),
        _map("RankMe", table, "rankme", "Counts a mean that all tokens share as a direction.", pick="min"),
        _map("Stable rank", table, "stable_rank", "1 where one direction carries everything.", pick="min"),
        _map(
            "Anisotropy",
            table,
            "anisotropy",
            "Near 1 all tokens point one way.",
            bounds=(-1, 1),
            scheme="RdBu",
            reverse=True,
        ),
        _map("Massive activation", table, "massive_value", "It keeps its sign, channel and token."),
        _map("CKA with the last capture", table, "cka_previous", "Dark columns are moments of change.", bounds=_SHARE),
        _map("CKA with the first capture", table, "cka_first", "Dark rows have moved far.", bounds=_SHARE, pick="min"),
    ]


def _weights() -> list[Any]:
    def of_blocks(column: str, **exact: str) -> str:
        name = f"lm_telemetry_params_{column}"
        return f'{name}{where("stack", "layer", **exact)} unless {name}{{layer="other"}}'

    def weights(title: str, column: str, how: str, **exact: str) -> LayerMap:
        return layer_map(title, f"{meaning('params', column)} {how}", f"max by (layer) ({of_blocks(column, **exact)})")

    ratio = " / ".join(f"max by (run_id, rank, layer) ({of_blocks(name)})" for name in ("update_norm", "norm"))
    return [
        weights("Weight norm", "norm", "All tensors of a block as one vector."),
        weights("Gradient norm", "grad_norm", "Rows that fade upwards or downwards are vanishing gradients."),
        weights("Update norm", "update_norm", "All tensors of a block as one vector."),
        layer_map(
            "Update ratio of blocks",
            f"Update norm over weight norm. About 1e-3 is usual; above {limits.UPDATE_FAST} is fast, below 1e-4 slow.",
            f"max by (layer) ({ratio})",
            unit="sci",
        ),
        weights("Update ratio of the fastest tensor", "update_ratio", "Of each block the fastest.", stat="max"),
    ]


def _runs() -> list[Any]:
    return [
        lines(
            "Update ratio",
            "Update norm over weight norm, of the layer where it is largest and of the one where it is smallest, also"
            f" outside the blocks. About 1e-3 is usual; above {limits.UPDATE_FAST} is fast, below 1e-4 slow.",
            Query(expr=f"max by (run_id, rank) ({UPDATE_RATIO})", legend="largest {{run_id}} r{{rank}}"),
            Query(expr=f"min by (run_id, rank) ({UPDATE_RATIO})", legend="smallest {{run_id}} r{{rank}}"),
            unit="sci",
            log=True,
            steps=((None, GREEN), (limits.UPDATE_FAST, RED)),
            bounds=(1e-6, 1),
        ),
        lines(
            "Lowest effective rank",
            f"{meaning('representations', 'effective_rank')} The narrowest place of each run.",
            Query(expr=per_run("representations", "effective_rank", "min"), legend="{{run_id}} r{{rank}}"),
        ),
        lines(
            "Lowest CKA with the last capture",
            f"{meaning('representations', 'cka_previous')} The place of each run that moves most.",
            Query(expr=per_run("representations", "cka_previous", "min"), legend="{{run_id}} r{{rank}}"),
            unit="percentunit",
            bounds=_SHARE,
        ),
    ]
