"""Figures of the optimisation: loss, learning rate, gradient, speed, noise scale, updates."""

# ruff: noqa: S608 names of runs come quoted from `asking`, all else is our own

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_telemetry.exporters.report import thinning
from lm_telemetry.exporters.report.asking import on_rank_0
from lm_telemetry.exporters.report.findings_training import restarts_query
from lm_telemetry.exporters.report.heatmaps import Measure, heatmaps
from lm_telemetry.exporters.report.model import Axis, Band, Figure, Level, Line, Lines, Mark

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_telemetry.exporters.report.asking import Source
    from lm_telemetry.exporters.report.model import Array

STEP = Axis(label="step")

FEW = 60
"""Points up to which each is marked."""

MARKS = 60
"""Spikes of a run that are marked, the largest."""

_REGIMES: dict[str, Level] = {
    "below": "ok",
    "progressive sharpening": "note",
    "edge of stability": "warning",
    "catapult": "critical",
}

_UPDATES = Measure(
    stem="update_ratio",
    section="Training",
    title="Size of updates by block",
    caption="Logarithm of |change of the weights| over |weights|, of each block as a whole: 0 is the rule of thumb of"
    " 1e-3 a step, +1 ten times as much.",
    axis=Axis(label="log10(update ratio / 1e-3)"),
    cells="SELECT step, stack, layer, 'resid' AS site, decades AS value FROM update_ratios"
    " WHERE {run} AND layer IS NOT NULL AND decades IS NOT NULL",
    middle=0.0,
    what="update norms were",
    how="instrument `parameters`",
)


def training_figures(source: Source) -> Iterator[Figure | str]:
    """Figures, and a sentence for each that cannot be made."""
    yield from _loss(source)
    for column, y, title, caption in _CURVES:
        yield from _curve(source, column, y, title, caption)
    yield from _noise_scale(source)
    yield from heatmaps(source, _UPDATES)


def by_run(source: Source, found: dict[str, Array]) -> Iterator[tuple[int, dict[str, Array]]]:
    """The index of each run that an answer has rows of, and these rows."""
    for index, run_id in enumerate(source.run_ids):
        chosen = found["run_id"] == run_id
        if chosen.any():
            yield index, {name: column[chosen] for name, column in found.items()}


def _loss(source: Source) -> Iterator[Figure | str]:
    points = f"SELECT run_id, step, loss, smoothed_loss FROM training WHERE {source.where}"
    sql = thinning.line(points, "loss", columns=["smoothed_loss"])
    lines = []
    for run, rows in by_run(source, source.columns(sql)):
        few = len(rows["step"]) <= FEW
        lines.append(Line(name="loss", run=run, x=rows["step"], y=rows["loss"], role="raw", points=few))
        lines.append(Line(name="mean of 20 steps", run=run, x=rows["step"], y=rows["smoothed_loss"]))
    yield from source.absent({source.run_ids[line.run] for line in lines}, "loss was", "no training step")
    if not lines:
        return
    bands, marks = tuple(_bands(source)), (*_spikes(source), *_restarts(source))
    caption = "Training loss of each step on rank 0, faint, and its mean over 20 steps. Marks are spikes (6 standard"
    caption += " deviations above the 100 steps before) and steps from which a later launch went on."
    if bands:
        caption += " Bands are regimes of curvature, from the view `regimes`."
    yield Figure(
        id="loss",
        section="Training",
        title="Training loss",
        caption=caption,
        body=Lines(x=STEP, y=Axis(label="loss", unit="nats"), lines=tuple(lines), bands=bands, marks=marks),
        sql=sql,
    )


def _bands(source: Source) -> Iterator[Band]:
    """Regimes of a single run, of the estimate that has the most captures; bands of several would hide each other."""
    if source.is_comparison:
        return
    found = source.columns(f"""WITH estimates AS (
    SELECT operator, estimator FROM regimes WHERE {source.where} AND scope = 'all'
    GROUP BY ALL ORDER BY count(*) DESC, operator, estimator LIMIT 1
)
SELECT step, regime FROM regimes JOIN estimates USING (operator, estimator)
WHERE {source.where} AND scope = 'all' ORDER BY step""")
    steps, regimes = found["step"], found["regime"]
    begins = [i for i in range(len(steps)) if i == 0 or regimes[i] != regimes[i - 1]]
    for begin, end in pairwise([*begins, len(steps) - 1]):
        label = str(regimes[begin])
        yield Band(run=0, start=float(steps[begin]), end=float(steps[end]), label=label, level=_REGIMES[label])


def _spikes(source: Source) -> Iterator[Mark]:
    for run, run_id in enumerate(source.run_ids):
        sql = f"""SELECT step, n_nonfinite, sigmas FROM spikes WHERE {on_rank_0(run_id)}
ORDER BY n_nonfinite > 0 DESC, sigmas DESC LIMIT {MARKS}"""
        for row in sorted(source.rows(sql), key=lambda row: row["step"]):
            if row["n_nonfinite"]:
                yield Mark(run=run, x=row["step"], label="loss is not a number", level="critical")
            else:
                yield Mark(run=run, x=row["step"], label=f"spike of {row['sigmas']:.3g} sd", level="warning")


def _restarts(source: Source) -> Iterator[Mark]:
    for row in source.rows(restarts_query(source.where)):
        run = source.run_ids.index(row["run_id"])
        yield Mark(run=run, x=row["step"], label=f"launch {row['attempt'] + 1}", level="note")


_CURVES = (
    (
        "learning_rate",
        Axis(label="learning rate"),
        "Learning rate",
        "Learning rate of the first parameter group, as used in each step.",
    ),
    (
        "grad_norm",
        Axis(label="gradient norm", scale="log"),
        "Gradient norm",
        (
            "L2 norm of the whole gradient before clipping. A rise that goes on comes before a divergence; single peaks"
            " are what clipping is for."
        ),
    ),
    (
        "tokens_per_second",
        Axis(label="tokens per second", unit="tokens/s"),
        "Speed",
        "Tokens of each step on rank 0 over its wall time. Dips are evaluation, checkpoints, or a slow data loader.",
    ),
)
"""Columns of the view `training`: axis, title, caption."""


def _curve(source: Source, column: str, y: Axis, title: str, caption: str) -> Iterator[Figure | str]:
    sql = thinning.line(f"SELECT run_id, step, {column} FROM training WHERE {source.where}", column)
    lines = [
        Line(name=y.label, run=run, x=rows["step"], y=rows[column], points=len(rows["step"]) <= FEW)
        for run, rows in by_run(source, source.columns(sql))
    ]
    yield from source.absent({source.run_ids[line.run] for line in lines}, f"{y.label} was", "no training step has one")
    if lines:
        if not any((line.y > 0).any() for line in lines):
            y = replace(y, scale="linear")
        body = Lines(x=STEP, y=y, lines=tuple(lines))
        yield Figure(id=column, section="Training", title=title, caption=caption, body=body, sql=sql)


def _noise_scale(source: Source) -> Iterator[Figure | str]:
    points = f"""SELECT run_id, step, noise_scale, noise_scale_stderr, batch
FROM critical_batch WHERE {source.of_runs}"""
    sql = thinning.line(points, "noise_scale", columns=["noise_scale_stderr", "batch"])
    lines: list[Line] = []
    for run, rows in by_run(source, source.columns(sql)):
        spread = 2 * rows["noise_scale_stderr"]
        interval: dict[str, Any] = {}
        if np.isfinite(spread).any():
            interval = {"low": rows["noise_scale"] - spread, "high": rows["noise_scale"] + spread}
        lines.append(Line(name="noise scale", run=run, x=rows["step"], y=rows["noise_scale"], **interval))
        if np.isfinite(rows["batch"]).any():
            lines.append(Line(name="batch", run=run, x=rows["step"], y=rows["batch"], role="threshold"))
    how = "instrument `gradient_noise`, which needs several ranks or accumulated batches"
    yield from source.absent({source.run_ids[line.run] for line in lines}, "gradient noise scale was", how)
    if lines:
        yield Figure(
            id="noise_scale",
            section="Training",
            title="Gradient noise scale",
            caption="The batch beyond which larger batches gain little (arXiv 1812.06162), a mean of up to 100 captures"
            " with two standard errors, and the batch that was used, dashed. A batch far below it saves tokens, one far"
            " above it wastes them.",
            body=Lines(x=STEP, y=Axis(label="sequences", scale="log"), lines=tuple(lines)),
            sql=sql,
        )
