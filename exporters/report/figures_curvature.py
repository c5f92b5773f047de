"""Figures of curvature: estimates against their thresholds, blocks by step, spectral densities."""

# ruff: noqa: S608 names of runs come quoted from `asking`, all else is our own

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lm_telemetry.exporters.report import thinning
from lm_telemetry.exporters.report.figures_training import FEW, STEP, by_run
from lm_telemetry.exporters.report.findings_curvature import OPERATORS, sharpness_id
from lm_telemetry.exporters.report.heatmaps import Measure, heatmaps
from lm_telemetry.exporters.report.model import Axis, Figure, Line, Lines

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_telemetry.exporters.report.asking import Source
    from lm_telemetry.exporters.report.model import Array, Scale

WIDE = 50
"""Largest over smallest value from which on an axis is logarithmic."""

_TITLES = {
    "lanczos": "Sharpness of the {operator}",
    "critical": "Critical sharpness",
    "directional": "Curvature along directions",
    "hutchinson": "Trace of the {operator}",
    "hutch++": "Trace of the {operator} (Hutch++)",
}

_CAPTIONS = {
    "lanczos": "The largest eigenvalue on the frozen probe, with its residual as the interval.",
    "critical": "2 over the smallest step along the update that raises the loss on the probe (arXiv 2601.16979), with"
    " half its bracket as the interval.",
    "directional": "Curvature along the update and along the gradient, on the frozen probe.",
    "hutchinson": "Sum of all eigenvalues, with two standard errors.",
    "hutch++": "Sum of all eigenvalues, with two standard errors.",
}

_EDGE = " Above its threshold, dashed, the optimizer's linearised dynamics are unstable; training may hover about it."

_BLOCKS = Measure(
    stem="block_sharpness",
    section="Curvature",
    title="Sharpness by block",
    caption="Largest eigenvalue of each block's own diagonal block of the Hessian: where in the model curvature sits.",
    axis=Axis(label="largest eigenvalue", scale="log"),
    cells="""SELECT
    step, regexp_extract(scope, '^(.*)[.][0-9]+$', 1) AS stack,
    coalesce(TRY_CAST(regexp_extract(scope, '[.]([0-9]+)$', 1) AS INTEGER), -1) AS layer,
    CASE WHEN regexp_matches(scope, '[.][0-9]+$') THEN 'resid' ELSE scope END AS site, value
FROM curvature
WHERE {run} AND estimator = 'block_lanczos' AND value IS NOT NULL""",
    what="sharpness by block was",
    how="instrument `block_sharpness`",
)


def curvature_figures(source: Source) -> Iterator[Figure | str]:
    """Figures, and a sentence for each that cannot be made."""
    kinds = source.rows(f"""SELECT operator, estimator, list(DISTINCT run_id) AS runs
FROM curvature WHERE {source.where} AND estimator <> 'block_lanczos' AND value IS NOT NULL
GROUP BY operator, estimator
ORDER BY estimator NOT IN ('lanczos', 'critical'), estimator, operator""")
    for kind in kinds:
        yield from _estimates(source, kind["operator"], kind["estimator"])
    captured = {run_id for kind in kinds for run_id in kind["runs"]}
    yield from source.absent(captured, "curvature was", "instruments `sharpness` and `critical_sharpness`")
    yield from heatmaps(source, _BLOCKS)
    yield from _spectra(source)


def _estimates(source: Source, operator: str, estimator: str) -> Iterator[Figure]:
    points = f"""SELECT run_id, scope, step, value, threshold, coalesce(2 * stderr, residual) AS spread
FROM curvature
WHERE {source.where} AND operator = '{operator}' AND estimator = '{estimator}' AND coalesce(index, 0) = 0"""
    sql = thinning.line(points, "value", columns=["threshold", "spread"], series=["run_id", "scope"])
    lines: list[Line] = []
    for run, rows in by_run(source, source.columns(sql)):
        for scope in dict.fromkeys(rows["scope"]):
            chosen = {name: column[rows["scope"] == scope] for name, column in rows.items()}
            lines += _line(run, chosen, scope)
    if not lines:
        return
    words = OPERATORS.get(operator, operator)
    edge = _EDGE if any(line.role == "threshold" for line in lines) else ""
    yield Figure(
        id=sharpness_id(operator, estimator),
        section="Curvature",
        title=_TITLES.get(estimator, f"{estimator} of the {{operator}}").format(operator=words),
        caption=_CAPTIONS.get(estimator, "Estimates of curvature on the frozen probe.") + edge,
        body=Lines(x=STEP, y=Axis(label="curvature", scale=_scale(lines)), lines=tuple(lines)),
        sql=sql,
    )


def _line(run: int, rows: dict[str, Array], scope: str) -> Iterator[Line]:
    name, bound = ("estimate", "threshold") if scope == "all" else (scope, f"threshold of {scope}")
    value, spread = rows["value"], rows["spread"]
    interval: dict[str, Any] = {}
    if np.isfinite(spread).any():
        interval = {"low": value - spread, "high": value + spread}
    yield Line(name=name, run=run, x=rows["step"], y=value, points=len(value) <= FEW, **interval)
    if np.isfinite(rows["threshold"]).any():
        yield Line(name=bound, run=run, x=rows["step"], y=rows["threshold"], role="threshold")


def _scale(lines: list[Line]) -> Scale:
    """Logarithmic where all is positive and spans much: a threshold is very large while the learning rate warms up."""
    values = np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
    is_wide = values.size > 0 and values.min() > 0 and values.max() > WIDE * values.min()
    return "log" if is_wide else "linear"


def _spectra(source: Source) -> Iterator[Figure | str]:
    kinds = source.rows(f"""SELECT operator, scope, list(DISTINCT run_id) AS runs
FROM spectra WHERE {source.where} GROUP BY operator, scope ORDER BY operator, scope""")
    for kind in kinds:
        yield from _densities(source, kind["operator"], kind["scope"])
    yield from source.absent({r for kind in kinds for r in kind["runs"]}, "spectra were", "instrument `spectrum`")


def _densities(source: Source, operator: str, scope: str) -> Iterator[Figure]:
    place, n = "row_number() OVER (PARTITION BY run_id ORDER BY step)", "count(*) OVER (PARTITION BY run_id)"
    wanted = f"{place} = {n}" if source.is_comparison else f"{place} IN (1, ({n} + 1) // 2, {n})"
    sql = f"""WITH chosen AS (
    SELECT run_id, step, grid, density, density_stderr
    FROM spectra
    WHERE {source.where} AND operator = '{operator}' AND scope = '{scope.replace("'", "''")}'
    QUALIFY {wanted}
),
points AS (
    SELECT
        run_id, step, list_max(density) AS peak, unnest(grid) AS eigenvalue, unnest(density) AS density,
        2 * unnest(density_stderr) AS spread
    FROM chosen
)
SELECT run_id, step, eigenvalue, CASE WHEN density > 1e-6 * peak THEN density END AS density, spread
FROM points
ORDER BY run_id, step, eigenvalue"""
    lines = []
    for run, rows in by_run(source, source.columns(sql)):
        for step in np.unique(rows["step"]):
            now = {name: column[rows["step"] == step] for name, column in rows.items()}
            low, high = now["density"] - now["spread"], now["density"] + now["spread"]
            name = f"step {step:,.0f}"
            lines.append(Line(name=name, run=run, x=now["eigenvalue"], y=now["density"], low=low, high=high))
    which = "the last capture of each run" if source.is_comparison else "the first, middle and last capture"
    about = "" if scope == "all" else f" ({scope})"
    yield Figure(
        id=f"spectrum-{operator}-{scope}".replace("_", "-").replace(".", "-"),
        section="Curvature",
        title=f"Spectrum of the {OPERATORS.get(operator, operator)}{about}",
        caption=f"Density of eigenvalues by stochastic Lanczos quadrature, of {which}, with two standard errors: a bulk"
        " near 0 and, to the right, the few large ones that bound the learning rate. Below a millionth of the peak"
        " nothing is drawn.",
        body=Lines(x=Axis(label="eigenvalue"), y=Axis(label="density", scale="log"), lines=tuple(lines)),
        sql=sql,
    )
