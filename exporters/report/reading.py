"""Making a report of runs in a store.

    >>> with connect("telemetry-store") as connection:  # doctest: +SKIP
    ...     report = read(connection, ["llama-20261124-063012-9f3c"], store_name="telemetry-store")

Decisions:

- Curves and maps are of rank 0, findings of the worst rank.
- Every figure and finding carries the query that was run, so that a reader can go on from there.
- Heatmaps share a number of cells, however many runs and layers there are, so that the file stays small.
- What a run has not captured is said in `missing`; it is never counted as well.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from lm_telemetry.errors import QueryError
from lm_telemetry.exporters.report.asking import Source, of
from lm_telemetry.exporters.report.facts import facts
from lm_telemetry.exporters.report.figures_attention import attention_figures
from lm_telemetry.exporters.report.figures_curvature import curvature_figures
from lm_telemetry.exporters.report.figures_layers import layer_figures
from lm_telemetry.exporters.report.figures_pathways import pathway_figures
from lm_telemetry.exporters.report.figures_telemetry import telemetry_figures
from lm_telemetry.exporters.report.figures_training import training_figures
from lm_telemetry.exporters.report.findings import findings, rank_of
from lm_telemetry.exporters.report.findings_loss import read_course
from lm_telemetry.exporters.report.model import Figure, Report
from lm_telemetry.exporters.report.verdict import verdict
from lm_telemetry.meant import require_runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_telemetry.queries import Connection

MOST_RUNS = 8
MOST_COLUMNS, LEAST_COLUMNS = 200, 25
CELLS = 6400
"""Cells of a heatmap, over all runs."""

_FIGURES = (
    training_figures,
    curvature_figures,
    attention_figures,
    pathway_figures,
    layer_figures,
    telemetry_figures,
)


def read(connection: Connection, run_ids: Sequence[str], *, store_name: str) -> Report:
    """The report of one run, or of up to 8 side by side.

    Args:
        connection: from `lm_telemetry.queries.connect`.
        run_ids: names of the runs, in the order in which they are shown; one that is named twice is shown once.
        store_name: what the store is called in the report.

    Raises:
        QueryError: no run or more than 8 are asked for.
        StoreError: the store has no such run.
    """
    names = tuple(dict.fromkeys(run_ids))
    connection.refresh()
    _require(connection, names)
    source = Source(connection=connection, run_ids=names, columns_shown=_columns_shown(connection, names))
    now = datetime.now(UTC)
    courses = {run_id: read_course(source, run_id) for run_id in names}
    found = {run_id: findings(source, run_id, courses[run_id]) for run_id in names}
    made = [item for figures in _FIGURES for item in figures(source)]
    shown = tuple(item for item in made if isinstance(item, Figure))
    known = {figure.id for figure in shown}
    return Report(
        runs=tuple(facts(source, run_id, now) for run_id in names),
        verdict=verdict(found, courses),
        findings=tuple(
            finding if finding.figure in known else replace(finding, figure=None)
            for finding in sorted((f for of_run in found.values() for f in of_run), key=rank_of)
        ),
        figures=shown,
        written=now.isoformat(timespec="seconds"),
        store=store_name,
        missing=tuple(dict.fromkeys(item for item in made if isinstance(item, str))),
    )


def _require(connection: Connection, names: tuple[str, ...]) -> None:
    if not 1 <= len(names) <= MOST_RUNS:
        raise QueryError(f"a report is of 1 to {MOST_RUNS} runs; got {len(names)}: name those to be compared")
    require_runs(connection, names)


def _columns_shown(connection: Connection, names: tuple[str, ...]) -> int:
    """Columns of a heatmap, so that those of all runs together have about `CELLS` cells."""
    whose = " OR ".join(map(of, names))
    (deepest,) = connection.execute(f"SELECT max(n_layers) FROM raw.runs WHERE {whose}").fetchone()  # noqa: S608 quoted
    rows = max(deepest or 0, CELLS // MOST_COLUMNS)
    return max(LEAST_COLUMNS, CELLS // rows // len(names))
