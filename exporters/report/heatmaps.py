"""Heatmaps of layer x step: one for each run, of any quantity that each layer has at each capture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lm_telemetry.exporters.report import thinning
from lm_telemetry.exporters.report.asking import on_rank_0
from lm_telemetry.exporters.report.model import Axis, Figure, Heatmap
from lm_telemetry.exporters.report.words import layer_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_telemetry.exporters.report.asking import Source
    from lm_telemetry.exporters.report.model import Array

_ROWS = ("stack", "layer", "site")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A quantity of layers."""

    stem: str
    """`id` of the figure, of one run"""
    section: str
    title: str
    caption: str
    axis: Axis
    cells: str
    """SELECT of step, stack, layer, site and value; `{run}` is where the run's condition goes"""
    fold: thinning.Fold = "avg"
    """how captures that share a column become one value"""
    middle: float | None = None
    what: str
    """what is missing where it was not captured, with its verb: `spectra were`"""
    how: str
    """what would capture it"""


def heatmaps(source: Source, measure: Measure) -> Iterator[Figure | str]:
    """One figure for each run, and a sentence for the runs that have none."""
    captured = set()
    for run, run_id in enumerate(source.run_ids):
        cells = measure.cells.format(run=on_rank_0(run_id))
        sql = thinning.heatmap(cells, _ROWS, fold=measure.fold, columns=source.columns_shown)
        found = source.columns(sql)
        if not np.isfinite(found["value"]).any():
            continue
        captured.add(run_id)
        columns, rows, values = _matrix(found)
        shared = f" Where captures share a column, their {thinning.FOLDS[measure.fold]} value is shown."
        is_full = len(columns) == source.columns_shown
        yield Figure(
            id=source.figure_id(measure.stem, run_id),
            section=measure.section,
            title=measure.title,
            caption=measure.caption + (shared if is_full else ""),
            body=Heatmap(
                x=Axis(label="step"),
                y=Axis(label="layer"),
                z=measure.axis,
                columns=columns,
                rows=rows,
                values=values,
                run=run,
                middle=measure.middle,
            ),
            sql=sql,
        )
    yield from source.absent(captured, measure.what, measure.how)


def _matrix(found: dict[str, Array]) -> tuple[Array, tuple[str, ...], Array]:
    """Steps (C,), names (R,), and values (R, C), from rows in any order; what is not there is NaN."""
    places = list(zip(found["stack"], found["layer"], found["site"], strict=True))
    order = sorted(set(places))
    steps, column = np.unique(found["step"], return_inverse=True)
    at = {place: i for i, place in enumerate(order)}
    values = np.full((len(order), len(steps)), np.nan)
    values[[at[place] for place in places], column] = found["value"]
    stacks = {stack for stack, *_ in order}
    names = tuple(
        layer_name(int(layer), site, stack if len(stacks) > 1 else "").removeprefix("layer ")
        for stack, layer, site in order
    )
    return steps, names, values
