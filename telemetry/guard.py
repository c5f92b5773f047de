"""The one place where errors of ours stop, so that none reaches the training loop.

Every way from the host program into the agent passes `Guard.__call__`. What is caught becomes an event, told once for
each place and kind of error and counted afterwards. With `strict`, errors pass through, for tests and debugging.
"""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

logger = logging.getLogger("lm_telemetry")


class Guard:
    """Makes contexts that no `Exception` leaves.

    Attributes:
        failures: how often each place has failed.
    """

    def __init__(self, event: Callable[..., None], *, strict: bool = False) -> None:
        self._event = event
        self._strict = strict
        self._told: set[tuple[str, str]] = set()
        self.failures: Counter[str] = Counter()

    def __call__(self, place: str) -> _Guarded:
        """A context for work at `place`, a few words that an event can name."""
        return _Guarded(self, place)

    def caught(self, place: str, error: Exception) -> bool:
        """Record an error. Whether it stops here."""
        self.failures[place] += 1
        key = (place, type(error).__name__)
        if key not in self._told:
            self._told.add(key)
            logger.warning("lm-telemetry: %s failed, training goes on: %s: %s", place, key[1], error)
            self._event(
                "error",
                "telemetry_error",
                f"{place}: {key[1]}: {error}. Training goes on; this measurement is missing",
                place=place,
                error=key[1],
                traceback="".join(traceback.format_exception(error))[-4000:],
            )
        return not self._strict


class _Guarded:
    __slots__ = ("_guard", "_place")

    def __init__(self, guard: Guard, place: str) -> None:
        self._guard = guard
        self._place = place

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        return isinstance(error, Exception) and self._guard.caught(self._place, error)


def note_failure(what: str, error: Any) -> None:
    """For places where not even an event can be written: the log."""
    logger.warning("lm-telemetry: %s: %s", what, error)
