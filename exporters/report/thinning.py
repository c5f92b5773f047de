"""Queries that keep few of many points, without losing the one that matters.

A line keeps, of each of `BUCKETS` stretches with equally many points, the lowest, the highest finite one, and the first
that is not finite (else the first): a single step that spikes survives, and so does a gap. A heatmap has one column for
each capture, or one for several in a row, which holds their mean or an extreme.
"""

# ruff: noqa: S608 names of runs come quoted from `asking`, all else is our own

from __future__ import annotations

from textwrap import indent
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

BUCKETS = 400
POINTS = 3 * BUCKETS
"""Points that a line has at most."""

Fold = Literal["avg", "max", "min"]
FOLDS: dict[Fold, str] = {"avg": "mean", "max": "largest", "min": "smallest"}


def line(points: str, y: str, *, columns: Sequence[str] = (), series: Sequence[str] = ("run_id",)) -> str:
    """The query for the points of each series that are drawn.

    Args:
        points: SELECT with a `step`, and the columns of all that follow.
        y: the column whose extremes are kept; points without it are not drawn.
        columns: what else is wanted of a point.
        series: columns that tell one line from another.
    """
    keys = ", ".join(series)
    bucket = f"row_number() OVER (PARTITION BY {keys}, bucket ORDER BY"
    return f"""WITH points AS (
    SELECT *, ntile({BUCKETS}) OVER (PARTITION BY {keys} ORDER BY step) AS bucket
    FROM (
{indent(points.strip(), " " * 8)}
    )
    WHERE {y} IS NOT NULL
)
SELECT {", ".join([*series, "step", y, *columns])}
FROM points
QUALIFY 1 IN (
    {bucket} {y}, step),
    {bucket} isfinite({y}) DESC, {y} DESC, step),
    {bucket} isfinite({y}), step)
)
ORDER BY {keys}, step"""


def heatmap(cells: str, rows: Sequence[str], *, fold: Fold, columns: int) -> str:
    """The query for the cells of a heatmap: `step` of the column's first capture, the row's keys, and `value`.

    Args:
        cells: SELECT with `step`, the columns of `rows`, and `value`, of one run.
        rows: columns that tell one row from another.
        fold: how captures that share a column become one value; those that are not finite are left out.
        columns: the most there may be.
    """
    return f"""WITH cells AS (
{indent(cells.strip(), " " * 4)}
),
captures AS (
    SELECT step AS capture, min(step) OVER (PARTITION BY place) AS step
    FROM (SELECT step, ntile({columns}) OVER (ORDER BY step) AS place FROM (SELECT DISTINCT step FROM cells))
)
SELECT captures.step, {", ".join(rows)}, {fold}(value) FILTER (WHERE isfinite(value)) AS value
FROM cells JOIN captures ON capture = cells.step
GROUP BY ALL
ORDER BY ALL"""
