"""lm-telemetry: the instrument panel for how language models learn and reason.

    from lm_telemetry import TelemetryCallback
    trainer = Trainer(..., callbacks=[TelemetryCallback()])

The names below are loaded when they are asked for, so that importing the package imports neither torch nor
transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_telemetry.callback import TelemetryCallback
    from lm_telemetry.curvature import Curvature
    from lm_telemetry.observation import observe
    from lm_telemetry.settings import Settings

_WHERE = {
    "Curvature": "lm_telemetry.curvature",
    "Settings": "lm_telemetry.settings",
    "TelemetryCallback": "lm_telemetry.callback",
    "observe": "lm_telemetry.observation",
}

__all__ = ["Curvature", "Settings", "TelemetryCallback", "observe"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
