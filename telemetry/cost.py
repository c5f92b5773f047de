"""What the agent costs the training thread, by name, nested work counted once."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

    from lm_telemetry.schedule import Schedule


class Meter:
    """Makes contexts that charge their time to a schedule.

    Attributes:
        seconds: time in outermost contexts since the last `reset`, which is what the training thread lost.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._inner: list[float] = []
        self.seconds = 0.0

    def reset(self) -> None:
        """Begin counting `seconds` anew."""
        self.seconds = 0.0

    def __call__(self, name: str) -> _Charge:
        """A context whose time is charged to `name`, less what contexts inside it charge to others."""
        return _Charge(self, name)

    def enter(self) -> None:
        """A context begins."""
        self._inner.append(0.0)

    def leave(self, name: str, elapsed: float) -> None:
        """A context ends after `elapsed` seconds."""
        self._schedule.charge(name, elapsed - self._inner.pop())
        if self._inner:
            self._inner[-1] += elapsed
        else:
            self.seconds += elapsed


class _Charge:
    __slots__ = ("_meter", "_name", "_start")

    def __init__(self, meter: Meter, name: str) -> None:
        self._meter = meter
        self._name = name

    def __enter__(self) -> Self:
        self._meter.enter()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._meter.leave(self._name, time.perf_counter() - self._start)
