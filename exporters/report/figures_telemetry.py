"""The figure of what telemetry cost, by instrument, against the budget."""

# ruff: noqa: S608 names of runs come quoted from `asking`, all else is our own

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lm_telemetry.exporters.report.model import Axis, Bars, Figure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_telemetry.exporters.report.asking import Source


def telemetry_figures(source: Source) -> Iterator[Figure | str]:
    """The figure, and a sentence for the runs that are not in it."""
    sql = f"""SELECT run_id, part, 100 * share AS percent, 100 * max_overhead AS budget
FROM cost
WHERE {source.where} AND share IS NOT NULL
ORDER BY part <> 'all', max(share) OVER (PARTITION BY part) DESC, part, run_id"""
    found = source.columns(sql)
    yield from source.absent(set(found["run_id"]), "cost was", "no step with a time")
    if not len(found["part"]):
        return
    names = list(dict.fromkeys(found["part"]))
    values = np.full((len(source.run_ids), len(names)), np.nan)
    for run_id, part, share in zip(found["run_id"], found["part"], found["percent"], strict=True):
        values[source.run_ids.index(run_id), names.index(part)] = share
    budgets = set(found["budget"][np.isfinite(found["budget"])])
    yield Figure(
        id="cost",
        section="Telemetry",
        title="What telemetry took",
        caption="Share of the training time that the agent took on the training thread of rank 0: in all, and by"
        " instrument (`shadow`, `snapshot` and `agent` are what instruments share)."
        + (" The line is the budget, which all of it together is held to." if len(budgets) == 1 else ""),
        body=Bars(
            x=Axis(label="share of the training time", unit="%"),
            names=tuple(names),
            values=values,
            limit=budgets.pop() if len(budgets) == 1 else None,
        ),
        sql=sql,
    )
