"""All findings of a run, worst first.

Each asks one view, whose thresholds it names. What was not captured gives no finding at all: the report lists it as
missing, never as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_telemetry.exporters.report.findings_attention import attention_findings
from lm_telemetry.exporters.report.findings_curvature import curvature_findings
from lm_telemetry.exporters.report.findings_layers import layer_findings
from lm_telemetry.exporters.report.findings_loss import loss_findings
from lm_telemetry.exporters.report.findings_telemetry import telemetry_findings
from lm_telemetry.exporters.report.findings_training import training_findings

if TYPE_CHECKING:
    from lm_telemetry.exporters.report.asking import Source
    from lm_telemetry.exporters.report.findings_loss import Course
    from lm_telemetry.exporters.report.model import Finding

WORST_FIRST = ("critical", "warning", "note", "ok")


def findings(source: Source, run_id: str, course: Course | None) -> tuple[Finding, ...]:
    """What is well with a run and what is not, worst first; among equals, what began first.

    Args:
        source: the store.
        run_id: the run.
        course: how its loss went; None if it has none.
    """
    found = [
        *(loss_findings(source, run_id, course) if course is not None else ()),
        *training_findings(source, run_id),
        *layer_findings(source, run_id),
        *attention_findings(source, run_id),
        *curvature_findings(source, run_id),
        *telemetry_findings(source, run_id),
    ]
    return tuple(sorted(found, key=rank_of))


def rank_of(finding: Finding) -> tuple[int, float]:
    """Where a finding stands: by level, then by when it began."""
    return WORST_FIRST.index(finding.level), float("inf") if finding.since is None else finding.since
