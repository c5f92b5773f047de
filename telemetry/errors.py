"""What can go wrong, by whose hand it is mended.

Every message says what was expected, what came, and what to do. Offending values are attributes, so that a caller
can act on them without reading prose. None of these reaches a training loop after attachment unless ``strict`` is
set: the agent turns them into rows of the ``events`` table.
"""

from __future__ import annotations

from typing import Any


class TelemetryError(Exception):
    """Base of all errors of this project."""


class SettingsError(TelemetryError, ValueError):
    """A setting cannot be used as given.

    Attributes:
        setting: name of the setting.
        value: what was given.
    """

    def __init__(self, message: str, *, setting: str, value: Any = None) -> None:
        super().__init__(message)
        self.setting = setting
        self.value = value


class StoreError(TelemetryError):
    """The store on disk cannot be written or read.

    Attributes:
        path: the file or directory concerned.
    """

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class ModelError(TelemetryError):
    """The model is not one that can be observed (no parameters, no layers where some are needed)."""


class ProbeError(TelemetryError):
    """The probe cannot be evaluated: no labels, a loss that is not finite, nothing trainable."""


class QueryError(TelemetryError):
    """A query cannot be answered: bad SQL, an unknown view, DuckDB missing."""
