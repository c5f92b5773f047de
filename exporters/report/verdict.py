"""The whole of a report in a sentence or two, for a colleague to pass on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_telemetry.exporters.report.words import count, listed, number

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_telemetry.exporters.report.findings_loss import Course
    from lm_telemetry.exporters.report.model import Finding


def verdict(found: Mapping[str, Sequence[Finding]], courses: Mapping[str, Course | None]) -> str:
    """How the runs are.

    Args:
        found: the findings of each run, worst first.
        courses: how the loss of each run went; None where there is none.
    """
    said = {run_id: _of_run(found[run_id], courses[run_id]) for run_id in found}
    if len(said) == 1:
        return next(iter(said.values()))
    well = sum(not any(f.level in {"critical", "warning"} for f in of_run) for of_run in found.values())
    losses = {r: c.last_loss for r, c in courses.items() if c and not c.is_lost and c.last_loss is not None}
    best = min(losses, key=lambda run_id: losses[run_id], default=None)
    lowest = "" if best is None else f"; {best} has the lowest loss, {number(losses[best])} nats"
    return " ".join(
        [f"{well} of {len(said)} runs are healthy{lowest}.", *(f"{r}: {words}" for r, words in said.items())]
    )


def _of_run(found: Sequence[Finding], course: Course | None) -> str:
    critical = [finding for finding in found if finding.level == "critical"]
    warnings = [finding for finding in found if finding.level == "warning"]
    checks = sum(finding.level == "ok" for finding in found)
    went = _loss(course)
    if critical:
        more = len(critical) + len(warnings) - 1
        others = f" {count(more, 'more finding')} ask{'s' if more == 1 else ''} for a look." if more else ""
        return f"Not healthy: {_clause(critical[0])}; {went}.{others}"
    if warnings:
        return f"Needs a look: {listed([_clause(finding) for finding in warnings])}; {went}."
    return f"Healthy in {count(checks, 'check')}: {went}." if checks else f"Too little was captured to judge: {went}."


def _loss(course: Course | None) -> str:
    if course is None:
        return "no training step was captured"
    steps = count(course.steps, "step")
    if course.first_loss is None:
        return f"the loss was no number in {steps}"
    if course.is_lost or course.last_loss is None:
        return f"the loss was {number(course.first_loss)} nats at first, and no number at the end of {steps}"
    if course.steps == 1:
        return f"the loss was {number(course.first_loss)} nats at its one step"
    way = "fell" if course.last_loss < course.first_loss else "went"
    return f"the loss {way} from {number(course.first_loss)} to {number(course.last_loss)} nats over {steps}"


def _clause(finding: Finding) -> str:
    """A title inside a sentence; a word like NaN stays as it is."""
    title = finding.title
    words = title if title.split(" ", 1)[0] == "NaN" else title[:1].lower() + title[1:]
    return words if finding.since is None else f"{words} since step {finding.since:,}"
