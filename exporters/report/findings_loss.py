"""Findings about the loss and the gradient: whether the loss falls, spikes, rises, or is lost.

The worst rank decides. Thresholds are those of the view `spikes`, except for a loss that rises slowly, which no view
judges: it has risen if the mean of its last 20 steps is above the lowest mean of 20 by a tenth of what was gained, and
by six standard errors; and it diverges if more than half of the gain is lost.
"""

# ruff: noqa: S608 names of runs come quoted from `asking`, all else is our own

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_telemetry.exporters.report.asking import of
from lm_telemetry.exporters.report.model import Finding, Level
from lm_telemetry.exporters.report.words import count, number, percent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_telemetry.exporters.report.asking import Source

WINDOW = 20
"""Steps whose mean is compared, as in the view `training`."""

JUDGED = 100
"""Steps from which on it is said whether a loss rises."""

_COURSE = """WITH losses AS (
    SELECT
        rank, step, loss, smoothed_loss,
        row_number() OVER (PARTITION BY rank ORDER BY step) AS place,
        row_number() OVER (PARTITION BY rank ORDER BY step DESC) AS from_last,
        greatest(1, least({window}, count(*) OVER (PARTITION BY rank) // 4)) AS width
    FROM training
    WHERE {run} AND loss IS NOT NULL
)
SELECT
    rank, count(*) AS steps, max(step) AS last_step, count(*) FILTER (NOT isfinite(loss)) AS n_nonfinite,
    avg(loss) FILTER (isfinite(loss) AND place <= width) AS first_loss,
    avg(loss) FILTER (isfinite(loss) AND from_last <= width) AS last_loss,
    stddev_samp(loss) FILTER (isfinite(loss) AND from_last <= width) / sqrt(any_value(width)) AS stderr,
    min(smoothed_loss) FILTER (isfinite(smoothed_loss) AND place >= width) AS lowest,
    arg_min(step, smoothed_loss) FILTER (isfinite(smoothed_loss) AND place >= width) AS lowest_step,
    coalesce(max(step) FILTER (isfinite(loss)), 0) AS last_finite_step
FROM losses
GROUP BY rank
ORDER BY rank"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How the loss went, on the rank where it went worst."""

    rank: int
    steps: int
    last_step: int
    first_loss: float | None
    last_loss: float | None
    is_lost: bool
    """whether the last loss is no number"""
    lowest_step: int | None
    lost_gain: float
    """share of the way down that was lost again since the lowest smoothed loss; 0 if that is within the noise"""
    sql: str


def read_course(source: Source, run_id: str) -> Course | None:
    """How the loss went; None if the run has none."""
    sql = _COURSE.format(run=of(run_id), window=WINDOW)
    courses = [_course(row, sql) for row in source.rows(sql)]
    return max(courses, key=lambda c: (c.is_lost, c.lost_gain), default=None)


def _course(row: dict[str, Any], sql: str) -> Course:
    first, last, lowest = row["first_loss"], row["last_loss"], row["lowest"]
    lost = 0.0
    if row["steps"] >= JUDGED and None not in (first, last, lowest):
        rise, gain = last - lowest, max(first - lowest, 0.0)
        if rise > 0.1 * gain and rise > 6 * (row["stderr"] or 0.0):
            lost = rise / gain if gain > 0 else math.inf
    return Course(
        rank=row["rank"],
        steps=row["steps"],
        last_step=row["last_step"],
        first_loss=first,
        last_loss=last,
        is_lost=row["last_finite_step"] < row["last_step"],
        lowest_step=row["lowest_step"],
        lost_gain=lost,
        sql=sql,
    )


def loss_findings(source: Source, run_id: str, course: Course) -> Iterator[Finding]:
    """All of this module, of one run; `course` from `read_course`."""
    yield from _loss(source, run_id, course)
    yield from _grad_norm(source, run_id)


def _loss(source: Source, run_id: str, found: Course) -> Iterator[Finding]:
    sql = f"FROM spikes WHERE {of(run_id)} ORDER BY step"
    spikes = source.rows(sql)
    finite = [spike for spike in spikes if not spike["n_nonfinite"]]
    broken = [spike for spike in spikes if spike["n_nonfinite"]]
    if found.is_lost:
        first = min((s for s in broken if s["last_step"] == found.last_step), key=lambda s: (s["step"], s["rank"]))
        since, where = first["step"], f" (rank {first['rank']})" if first["rank"] else ""
        yield Finding(
            level="critical",
            title="The loss is not a number",
            text=f"The loss is NaN or infinite from step {since:,} to the last step, {found.last_step:,}{where}."
            " Go back to a checkpoint before it; look at gradients, attention logits and activations just before that"
            " step, lower the learning rate or clip, and check for an overflow of float16.",
            run_id=run_id,
            since=since,
            figure="loss",
            sql=sql,
        )
    elif broken:
        steps = sum(spike["n_nonfinite"] for spike in broken)
        yield Finding(
            level="warning",
            title=f"The loss was not a number at {count(steps, 'step')}, and came back",
            text=f"First at step {broken[0]['step']:,}, last at step {broken[-1]['last_step']:,}. A loss scaler that"
            " skips overflows does this now and then; otherwise a batch may be broken.",
            run_id=run_id,
            since=broken[0]["step"],
            figure="loss",
            sql=sql,
        )
    if found.lost_gain:
        yield _risen(run_id, found, finite)
    if finite:
        yield _spiked(run_id, finite, sql)
    elif not broken and found.steps >= JUDGED:
        yield Finding(
            level="ok",
            title="No loss spike",
            text=f"No loss of {count(found.steps, 'step')} is 6 standard deviations above the 100 before it.",
            run_id=run_id,
            figure="loss",
            sql=sql,
        )
    if found.steps < JUDGED:
        yield Finding(
            level="note",
            title=f"{count(found.steps, 'step')}: too few to judge the loss",
            text=f"Whether a loss rises or spikes is told from {JUDGED} steps on.",
            run_id=run_id,
            figure="loss",
            sql=found.sql,
        )


def _risen(run_id: str, found: Course, spikes: list[dict[str, Any]]) -> Finding:
    """The loss has gone up and stayed there: since a spike that it did not come back from, or since its lowest."""
    lowest = found.lowest_step or 0
    jumps = [
        s["step"]
        for s in spikes
        if s["rank"] == found.rank and s["step"] > lowest and not _is_back(s) and s["loss_after"] is not None
    ]
    since = min(jumps, default=lowest)
    level: Level = "critical" if found.lost_gain > 0.5 else "warning"
    share = "all of what it had gained" if found.lost_gain >= 1 else f"{percent(found.lost_gain)} of what it had gained"
    rank = f" (rank {found.rank})" if found.rank else ""
    return Finding(
        level=level,
        title="The loss is diverging" if level == "critical" else "The loss has risen",
        text=f"Its mean over the last steps is {number(found.last_loss)} nats; since step {since:,} it has lost {share}"
        f"{rank}. Go back to a checkpoint before it with a lower learning rate, or stricter clipping; if the data"
        " changed there, look at the data first.",
        run_id=run_id,
        since=since,
        figure="loss",
        sql=found.sql,
    )


def _is_back(spike: dict[str, Any]) -> bool:
    after = spike["loss_after"]
    return after is not None and after <= spike["baseline"] + 6 * spike["baseline_sd"]


def _spiked(run_id: str, spikes: list[dict[str, Any]], sql: str) -> Finding:
    worst = max(spikes, key=lambda s: s["sigmas"] or 0.0)
    back = all(map(_is_back, spikes))
    ranks = len({spike["rank"] for spike in spikes})
    moved = []
    if (worst["grad_norm_ratio"] or 0) > 2:
        moved.append(f"the gradient norm was {number(worst['grad_norm_ratio'])} times its usual")
    if (worst["edge_ratio"] or 0) > 0.9:
        moved.append(f"curvature was at {number(worst['edge_ratio'])} of its threshold")
    beside = f" There, {' and '.join(moved)}." if moved else ""
    return Finding(
        level="note" if back else "warning",
        title=f"{count(len(spikes), 'loss spike')}" + (", all recovered" if back else ", not all recovered"),
        text=f"The largest, at step {worst['step']:,}, went to {number(worst['peak_loss'])} nats from"
        f" {number(worst['baseline'])}, {number(worst['sigmas'])} standard deviations (6 count as a spike).{beside}"
        + (f" Counted on {ranks} ranks." if ranks > 1 else "")
        + " Spikes that keep coming ask for a lower learning rate, stricter clipping, or a look at those batches.",
        run_id=run_id,
        since=min(spike["step"] for spike in spikes),
        figure="loss",
        sql=sql,
    )


def _grad_norm(source: Source, run_id: str) -> Iterator[Finding]:
    sql = f"""SELECT
    count(*) FILTER (NOT isfinite(grad_norm)) AS broken, min(step) FILTER (NOT isfinite(grad_norm)) AS since,
    max(step) FILTER (NOT isfinite(grad_norm)) AS until, count(*) AS steps
FROM steps
WHERE {of(run_id)} AND grad_norm IS NOT NULL"""
    (row,) = source.rows(sql)
    if row["broken"]:
        yield Finding(
            level="warning",
            title=f"The gradient was not finite at {count(row['broken'], 'step')}",
            text=f"Of {row['steps']:,} gradient norms, the first NaN or infinite one is of step {row['since']:,}, the"
            f" last of step {row['until']:,}. A few with a float16 loss scaler are usual: it skips those steps.",
            run_id=run_id,
            since=row["since"],
            figure="grad_norm",
            sql=sql,
        )
