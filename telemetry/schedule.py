"""When each instrument fires: one object that everybody asks, so that a budget has one place to act.

An instrument is due on step 1 and on every multiple of its cadence, which depends on the step alone, so that all ranks
of a run agree without talking; and on the step after another instrument has asked for it (a cheap measure that sees
something worth an expensive one), but not more than `REQUESTS_PER_CADENCE` times within a cadence. What instruments
cost is charged here, by name, until `settle` hands it over for the table `overhead`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


REQUESTS_PER_CADENCE = 10
"""An instrument that is asked for again and again runs at most this often within its own cadence."""


@dataclass(slots=True)
class Schedule:
    """Cadences of the instruments and what they have cost.

    Attributes:
        cadences: steps between captures, by name of instrument.
        spent: seconds of the training thread charged since `settle`, by name.
        captures: captures made since then, by name of instrument.
    """

    cadences: Mapping[str, int]
    spent: dict[str, float] = field(default_factory=dict)
    captures: dict[str, int] = field(default_factory=dict)
    _requested: set[str] = field(default_factory=set)
    _last: dict[str, int] = field(default_factory=dict)

    def due(self, step: int) -> tuple[str, ...]:
        """Names of the instruments that fire on `step` (counted from 1), in the order they were given.

        To be asked once a step: it takes note of what fires.
        """
        requested, self._requested = self._requested, set()
        names = []
        for name, every in self.cadences.items():
            pause = max(1, every // REQUESTS_PER_CADENCE)
            asked = name in requested and step - self._last.get(name, -pause) >= pause
            if step == 1 or step % every == 0 or asked:
                names.append(name)
                self._last[name] = step
        return tuple(names)

    def request(self, name: str) -> None:
        """Ask that an instrument fire on the next step; nothing happens if it is not there."""
        if name in self.cadences:
            self._requested.add(name)

    def charge(self, name: str, seconds: float) -> None:
        """Add to what an instrument has cost."""
        self.spent[name] = self.spent.get(name, 0.0) + seconds

    def captured(self, name: str) -> None:
        """Count a capture."""
        self.captures[name] = self.captures.get(name, 0) + 1

    def settle(self) -> dict[str, list[Any]]:
        """Columns of `overhead`, a row for each name that was charged since the last call; from here it counts anew.

        What is charged to a name that is no instrument's has neither captures nor a cadence (None).
        """
        spent, self.spent = self.spent, {}
        captures, self.captures = self.captures, {}
        return {
            "instrument": list(spent),
            "seconds": list(spent.values()),
            "captures": [captures.get(name, 0) if name in self.cadences else None for name in spent],
            "every": [self.cadences.get(name) for name in spent],
        }
