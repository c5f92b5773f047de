"""Findings about the optimisation beside the loss: size of updates, batch against gradient noise, restarts."""

# ruff: noqa: S608 names of runs come quoted from `asking`, all else is our own

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lm_telemetry.exporters.report.asking import of, on_rank_0
from lm_telemetry.exporters.report.model import Finding, Level
from lm_telemetry.exporters.report.words import count, layer_name, listed, number

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_telemetry.exporters.report.asking import Source

_WHOLE = "ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING"


def training_findings(source: Source, run_id: str) -> Iterator[Finding]:
    """All of this module, of one run."""
    yield from _updates(source, run_id)
    yield from _batch(source, run_id)
    yield from _restarts(source, run_id)


def _updates(source: Source, run_id: str) -> Iterator[Finding]:
    sql = f"""WITH captures AS (
    SELECT *, last_value(flag) OVER (PARTITION BY rank, stack, layer, name ORDER BY step {_WHOLE}) AS now
    FROM update_ratios
    WHERE {of(run_id)} AND NOT (flag = 'still' AND learning_rate = 0)
),
changes AS (
    SELECT *, max(CASE WHEN flag <> now THEN step END) OVER (PARTITION BY rank, stack, layer, name) AS change
    FROM captures
)
SELECT
    now, rank, coalesce(stack, '') AS stack, layer, name, arg_max(update_ratio, step) AS ratio,
    min(step) FILTER (change IS NULL OR step > change) AS since
FROM changes
GROUP BY now, rank, stack, layer, name
ORDER BY since, rank, layer, name"""
    rows = source.rows(sql)
    if not rows:
        return
    figure = source.figure_id("update_ratio", run_id)
    for flag, level, what, advice in _PACES:
        held = [row for row in rows if row["now"] == flag]
        if not held:
            continue
        places = list(dict.fromkeys(layer_name(r["layer"], stack=r["stack"], name=r["name"]) for r in held))
        ratios = [row["ratio"] for row in held if row["ratio"] is not None and math.isfinite(row["ratio"])]
        extreme = f" (ratio {number(max(ratios) if flag == 'fast' else min(ratios))})" if ratios else ""
        yield Finding(
            level=level,
            title=f"{what} in {count(len(places), 'place')}",
            text=f"At the last capture: {listed(places)}{extreme}; the rule of thumb is 1e-3 of the weights a step,"
            f" and a decade on either side is usual. {advice}",
            run_id=run_id,
            since=min(row["since"] for row in held),
            figure=figure,
            sql=sql,
        )
    if all(row["now"] == "ok" for row in rows):
        yield Finding(
            level="ok",
            title="Updates are of a usual size",
            text="At the last capture each block moves by between 1e-4 and 1e-2 of its weights' norm a step.",
            run_id=run_id,
            figure=figure,
            sql=sql,
        )


_PACES: tuple[tuple[str, Level, str, str], ...] = (
    ("nonfinite", "critical", "Updates are not finite", "Weights are broken from there on: go back to a checkpoint."),
    ("still", "warning", "Weights do not move", "They may be frozen on purpose, or get no gradient."),
    ("fast", "warning", "Updates are large", "A lower learning rate, or a longer warmup, is what one tries first."),
    ("slow", "note", "Updates are small", "Warmup and the end of a schedule are slow by design."),
)
"""Flags of the view `update_ratios`: level, what holds, and what one does."""


def _batch(source: Source, run_id: str) -> Iterator[Finding]:
    sql = f"FROM critical_batch WHERE {of(run_id)} AND verdict IS NOT NULL ORDER BY step DESC LIMIT 1"
    for row in source.rows(sql):
        scale = number(row["noise_scale"]) + (
            f" ± {number(row['noise_scale_stderr'])}" if row["noise_scale_stderr"] is not None else ""
        )
        advice = {
            "small": "A larger batch would save steps at little cost in tokens, if the learning rate follows.",
            "large": "A smaller one would reach the same loss with fewer tokens.",
            "balanced": "Neither steps nor tokens are wasted much.",
        }[row["verdict"]]
        yield Finding(
            level="ok" if row["verdict"] == "balanced" else "note",
            title={"small": "The batch is small", "large": "The batch is large", "balanced": "The batch is balanced"}[
                row["verdict"]
            ]
            + " for the gradient's noise",
            text=f"It has {number(row['batch'])} sequences, the gradient noise scale is {scale} (mean of"
            f" {count(row['captures'], 'capture')} up to step {row['step']:,}). {advice}",
            run_id=run_id,
            figure="noise_scale",
            sql=sql,
        )


def _restarts(source: Source, run_id: str) -> Iterator[Finding]:
    sql = restarts_query(on_rank_0(run_id))
    rows = source.rows(sql)
    if rows:
        yield Finding(
            level="note",
            title=f"Taken up again {count(len(rows), 'time')}",
            text=f"Launches went on from step {listed([format(row['step'], ',') for row in rows])}. Steps taken twice"
            " are shown as the later launch took them.",
            run_id=run_id,
            since=rows[0]["step"],
            figure="loss",
            sql=sql,
        )


def restarts_query(where: str) -> str:
    """The query for the first step of each launch but a run's first."""
    return f"""SELECT run_id, attempt, min(step) AS step
FROM steps
WHERE {where} AND attempt > 0
GROUP BY run_id, attempt
ORDER BY run_id, attempt"""
