"""Write the dashboards into `stack/dashboards`, where they are committed.

    python -m lm_telemetry.exporters.grafana.generate

To be run after a change of the catalogue or of a dashboard; a test compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from lm_telemetry.exporters.grafana import agent, attention, curvature, overview, representation

if TYPE_CHECKING:
    from grafana_foundation_sdk.models.dashboard import Dashboard

DASHBOARDS = {
    "overview": overview.dashboard,
    "curvature": curvature.dashboard,
    "attention": attention.dashboard,
    "representation": representation.dashboard,
    "agent": agent.dashboard,
}

DIRECTORY = Path(__file__).parent / "stack" / "dashboards"


def to_json(dashboard: Dashboard) -> str:
    """A dashboard as Grafana reads it."""
    return json.dumps(dashboard, cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def main() -> None:
    """Write them all."""
    for name, build in DASHBOARDS.items():
        (DIRECTORY / f"{name}.json").write_text(to_json(build()), encoding="utf-8")


if __name__ == "__main__":
    main()
