"""The committed dashboards, as their tests read them, and how long the run is that they watch."""

from __future__ import annotations

import json

from lm_telemetry.exporters.grafana.stack import SOURCE

STEPS = 40


def boards():
    """Dashboards by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((SOURCE / "dashboards").glob("*.json"))}


def panels(board):
    """The panels of a dashboard that are no headings."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def queries():
    """PromQL of all panels."""
    return [target["expr"] for board in boards().values() for panel in panels(board) for target in panel["targets"]]
