"""When each instrument fires: one object that everybody asks, so that a budget has one place to act.

An instrument is due on step 1 and on every multiple of its cadence. The answer depends on the step alone, so that all
ranks of a run agree without talking. What instruments cost is charged here, by name, and can be read back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(slots=True)
class Schedule:
    """Cadences of the instruments and what they have cost.

    Attributes:
        cadences: steps between captures, by name of instrument.
        spent: seconds of the training thread charged so far, by name.
        captures: captures made so far, by name.
    """

    cadences: Mapping[str, int]
    spent: dict[str, float] = field(default_factory=dict)
    captures: dict[str, int] = field(default_factory=dict)

    def due(self, step: int) -> tuple[str, ...]:
        """Names of the instruments that fire on `step` (counted from 1), in the order they were given."""
        return tuple(name for name, every in self.cadences.items() if step == 1 or step % every == 0)

    def charge(self, name: str, seconds: float) -> None:
        """Add to what an instrument has cost."""
        self.spent[name] = self.spent.get(name, 0.0) + seconds

    def captured(self, name: str) -> None:
        """Count a capture."""
        self.captures[name] = self.captures.get(name, 0) + 1
