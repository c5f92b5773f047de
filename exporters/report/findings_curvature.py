"""Findings about curvature: how near the edge of stability, catapults, and whether the estimates can be trusted.

The edge of stability is where full-batch training hovers, and no fault: what is said of it is a note. An estimate is
held against the threshold of its own operator (arXiv 2103.00065, 2207.14484), never another's.
"""

# ruff: noqa: S608 names of runs come quoted from `asking`, all else is our own

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_telemetry.exporters.report.asking import of
from lm_telemetry.exporters.report.model import Finding
from lm_telemetry.exporters.report.words import number, percent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_telemetry.exporters.report.asking import Source

OPERATORS = {
    "hessian": "Hessian",
    "preconditioned": "preconditioned Hessian",
    "gauss_newton": "Gauss-Newton matrix",
}


def sharpness_id(operator: str, estimator: str) -> str:
    """`id` of the figure of an estimate."""
    return f"sharpness-{operator}-{estimator}".replace("_", "-").replace("+", "p")


def curvature_findings(source: Source, run_id: str) -> Iterator[Finding]:
    """All of this module, of one run."""
    yield from _edge(source, run_id)
    yield from _catapult(source, run_id)
    yield from _convergence(source, run_id)


def _edge(source: Source, run_id: str) -> Iterator[Finding]:
    sql = f"FROM edge_onset WHERE {of(run_id)} AND scope = 'all' ORDER BY rank, operator, estimator"
    told = set()
    for row in source.rows(sql):
        figure = sharpness_id(row["operator"], row["estimator"])
        if figure in told:  # another rank's
            continue
        told.add(figure)
        yield _at_edge(run_id, row, figure, sql) if row["onset_step"] is not None else _below(run_id, row, figure, sql)


def _name(row: dict[str, Any]) -> str:
    """What was estimated, in a sentence."""
    if row["estimator"] == "critical":
        return "critical sharpness"
    how = "" if row["estimator"] == "lanczos" else f", {row['estimator']}"
    return f"sharpness of the {OPERATORS.get(row['operator'], row['operator'])}{how}"


def _at_edge(run_id: str, row: dict[str, Any], figure: str, sql: str) -> Finding:
    before = row["previous_step"]
    between = (
        f", after a last capture below it at step {before:,}" if before is not None else ", from the first capture"
    )
    plateau = ""
    if row["plateau_mean"] is not None:
        spread = f" ± {number(row['plateau_sd'])}" if row["plateau_sd"] is not None else ""
        plateau = f" Since then the ratio is {number(row['plateau_mean'])}{spread} (mean, standard deviation)."
    return Finding(
        level="note",
        title=f"The run came to the edge of stability ({_name(row)})",
        text=f"From step {row['onset_step']:,} the estimate stayed above 0.9 of its threshold,"
        f" {number(row['onset_threshold'])}{between}.{plateau} At the last capture it is"
        f" {number(row['last_ratio'])}. This is usual, and harmless while the loss falls; the learning rate, not the"
        " model, then bounds the sharpness.",
        run_id=run_id,
        since=row["onset_step"],
        figure=figure,
        sql=sql,
    )


def _below(run_id: str, row: dict[str, Any], figure: str, sql: str) -> Finding:
    """What never stayed at the edge; the last capture alone may be there, which is no sign of health."""
    is_near = row["last_ratio"] is not None and row["last_ratio"] > 0.9
    return Finding(
        level="note" if is_near else "ok",
        title=f"{'Near' if is_near else 'Below'} the edge of stability ({_name(row)})",
        text=f"In {row['captures']:,} captures the estimate did not stay above 0.9 of its threshold; at step"
        f" {row['last_step']:,} it is at {number(row['last_ratio'])} of it.",
        run_id=run_id,
        figure=figure,
        sql=sql,
    )


def _catapult(source: Source, run_id: str) -> Iterator[Finding]:
    sql = (
        f"FROM catapult WHERE {of(run_id)} AND scope = 'all' AND is_catapult ORDER BY rank, operator, estimator LIMIT 1"
    )
    for row in source.rows(sql):
        yield Finding(
            level="note",
            title="The run began with a catapult",
            text=f"The loss rose from {number(row['first_loss'])} to {number(row['peak_loss'])} nats at step"
            f" {row['peak_step']:,} and came back, while the largest eigenvalue fell to {percent(row['fall'])} of"
            f" what it was: the start was unstable ({number(row['ratio_before'])} of the threshold), and training"
            " moved on to a flatter place.",
            run_id=run_id,
            since=row["peak_step"],
            figure=sharpness_id(row["operator"], row["estimator"]),
            sql=sql,
        )


def _convergence(source: Source, run_id: str) -> Iterator[Finding]:
    sql = f"""SELECT operator, estimator, count(*) AS estimates, count(*) FILTER (NOT converged) AS short
FROM curvature
WHERE {of(run_id)} AND converged IS NOT NULL
GROUP BY operator, estimator
HAVING short > 0.1 * estimates
ORDER BY operator, estimator"""
    for row in source.rows(sql):
        yield Finding(
            level="note",
            title=f"Estimates of {_name(row)} did not all converge",
            text=f"{row['short']:,} of {row['estimates']:,} ended before their tolerance was met: read them with their"
            " residual, which the figure shows as the interval."
            + (" A larger `max_hvps` lets them go on." if "lanczos" in row["estimator"] else ""),
            run_id=run_id,
            figure=sharpness_id(row["operator"], row["estimator"]),
            sql=sql,
        )
