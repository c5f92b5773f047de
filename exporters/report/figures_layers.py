"""Figures of activations and representations: heatmaps of the residual stream, layer x step."""

# ruff: noqa: S608 names of runs come quoted from `asking`, all else is our own

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_telemetry.exporters.report.heatmaps import Measure, heatmaps
from lm_telemetry.exporters.report.model import Axis

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_telemetry.exporters.report.asking import Source
    from lm_telemetry.exporters.report.model import Figure

_STREAM = "site IN ('embed', 'resid', 'final')"
_LAYERS = f"SELECT step, stack, layer, site, {{value}} AS value FROM layers WHERE {{{{run}}}} AND {_STREAM}"
_DRIFT = (
    f"SELECT step, stack, layer, site, {{value}} AS value FROM representation_drift WHERE {{{{run}}}} AND {_STREAM}"
)

MEASURES = (
    Measure(
        stem="rms",
        section="Representation",
        title="RMS of the residual stream",
        caption="Root mean square of what leaves each block (and of `embed`, which enters the first, and `final`)."
        " It grows with depth; growth over training that goes on is a warning.",
        axis=Axis(label="RMS", scale="log"),
        cells=_LAYERS.format(value="rms"),
        what="activations were",
        how="instrument `activations`",
    ),
    Measure(
        stem="absmax",
        section="Representation",
        title="Largest activation over RMS",
        caption="Largest magnitude among the sampled tokens over the RMS of the same place. Above 100 one speaks of"
        " massive activations (arXiv 2402.17762); they stand on few fixed channels and tokens.",
        axis=Axis(label="largest over RMS", scale="log"),
        cells=_LAYERS.format(value="absmax / nullif(rms, 0)"),
        fold="max",
        what="activations were",
        how="instrument `activations`",
    ),
    Measure(
        stem="kurtosis",
        section="Representation",
        title="Kurtosis of the residual stream",
        caption="How heavy the tails of the activations are: 3 for a Gaussian. Rows far above have outlier channels.",
        axis=Axis(label="kurtosis", scale="log"),
        cells=_LAYERS.format(value="kurtosis"),
        what="activations were",
        how="instrument `activations`",
    ),
    Measure(
        stem="effective_rank",
        section="Representation",
        title="Effective rank of the representation",
        caption="Directions that the tokens of the frozen probe fill: exp of the entropy of the singular values. A fall"
        " over training, or with depth, is a loss of rank.",
        axis=Axis(label="effective rank"),
        cells=_DRIFT.format(value="effective_rank"),
        what="representations were",
        how="instrument `representation`",
    ),
    Measure(
        stem="participation_ratio",
        section="Representation",
        title="Participation ratio of the representation",
        caption="Directions that the tokens fill, by variance: tr(C)^2 / tr(C^2). A single massive activation brings it"
        " to about 1.",
        axis=Axis(label="participation ratio", scale="log"),
        cells=_DRIFT.format(value="participation_ratio"),
        what="representations were",
        how="instrument `representation`",
    ),
    Measure(
        stem="drift",
        section="Representation",
        title="Similarity to the first capture",
        caption="Debiased CKA (arXiv 1905.00414) of each layer's representation of the probe with that of the launch's"
        " first capture: it falls from 1 while features form, and stays where a layer has settled.",
        axis=Axis(label="CKA with the first capture"),
        cells=_DRIFT.format(value="cka_first"),
        what="similarities of representations were",
        how="instrument `representation`",
    ),
)


def layer_figures(source: Source) -> Iterator[Figure | str]:
    """Figures, and a sentence for each that cannot be made."""
    for measure in MEASURES:
        yield from heatmaps(source, measure)
