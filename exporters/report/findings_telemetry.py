"""Findings about the telemetry itself: what it cost, and what the agent had to tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_telemetry.exporters.report.asking import of
from lm_telemetry.exporters.report.model import Finding, Level
from lm_telemetry.exporters.report.words import count, listed, percent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_telemetry.exporters.report.asking import Source

_LEVELS: tuple[tuple[str, Level], ...] = (("error", "warning"), ("warning", "note"))
"""Of an event's severity."""


def telemetry_findings(source: Source, run_id: str) -> Iterator[Finding]:
    """All of this module, of one run."""
    yield from _cost(source, run_id)
    yield from _events(source, run_id)


def _cost(source: Source, run_id: str) -> Iterator[Finding]:
    sql = f"FROM cost WHERE {of(run_id)} AND share IS NOT NULL ORDER BY part <> 'all', share DESC"
    rows = source.rows(sql)
    if not rows or rows[0]["part"] != "all":
        return
    worst, budget = rows[0], rows[0]["max_overhead"]
    parts = {
        row["part"]: percent(row["share"]) for row in rows if row["part"] != "all" and row["rank"] == worst["rank"]
    }
    most = f" Most of it: {listed([f'{part} {share}' for part, share in parts.items()])}." if parts else ""
    rank = f" on rank {worst['rank']}" if worst["rank"] else ""
    allowed = f"; {percent(budget)} were allowed" if budget is not None else ""
    yield Finding(
        level="warning" if worst["is_over"] else "ok",
        title="Telemetry took more than its budget"
        if worst["is_over"]
        else "Telemetry kept to its budget"
        if budget is not None
        else "What telemetry took",
        text=f"{percent(worst['share'])} of the training time{rank}{allowed}.{most}"
        + (" Raise `every` of the dearest, or `max_overhead`." if worst["is_over"] else ""),
        run_id=run_id,
        figure="cost",
        sql=sql,
    )


def _events(source: Source, run_id: str) -> Iterator[Finding]:
    sql = f"FROM events_summary WHERE {of(run_id)} AND severity <> 'info'"
    rows = source.rows(sql)
    for severity, level in _LEVELS:
        told = [row for row in rows if row["severity"] == severity]
        if told:
            kinds = [f"`{row['kind']}` ({row['events']:,})" for row in told]
            yield Finding(
                level=level,
                title=f"The agent told of {count(sum(row['events'] for row in told), severity)}",
                text=f"{listed(kinds)}. The last: {told[0]['message']}",
                run_id=run_id,
                since=min(row["first_step"] for row in told),
                sql=sql,
            )
    if not rows:
        yield Finding(
            level="ok",
            title="The agent had nothing to complain of",
            text="There is no error and no warning among the events.",
            run_id=run_id,
            sql=sql,
        )
