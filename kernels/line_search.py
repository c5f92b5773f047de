"""The critical step: how far one may go along a direction before the loss is higher than where one stands.

On a quadratic L(η) = L(0) - η g'u + η²/2 u'Hu along -u, the loss is back at L(0) at η_c = 2 g'u / u'Hu, so that
λ_c = 2/η_c = u'Hu / g'u is a sharpness found with forward passes alone (arXiv 2601.16979).

What is searched is the first crossing on a grid of doublings, refined by bisection in log η. A loss that rises and
falls again between two grid points hides an earlier crossing; a search from the last known η_c makes that unlikely.
NaN and infinity count as raised, since a step that overflows is surely too long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

Outcome = Literal["found", "never_raised", "no_descent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticalStep:
    """Where the loss is back at its value at 0.

    Attributes:
        outcome: `found`; `never_raised` if no step tried raised the loss; `no_descent` if no step tried lowered it
            by more than the resolution, so that there is no crossing but the one at 0.
        eta: η_c, the harmonic mean of the bracket, so that 2/η_c is the middle of the bracket of 2/η; None if none
            was found.
        bracket: (low, high), the loss being raised at `high` and not at `low`; None if none was found.
        forwards: losses evaluated, the one at 0 included if it was.
        converged: whether the bracket is as narrow as was asked for.
        loss: L(0).
    """

    outcome: Outcome
    eta: float | None
    bracket: tuple[float, float] | None
    forwards: int
    converged: bool
    loss: float

    @property
    def found(self) -> bool:
        """Whether there is a critical step."""
        return self.outcome == "found"

    @property
    def sharpness(self) -> float | None:
        """λ_c = 2/η_c."""
        return None if self.eta is None else 2 / self.eta

    @property
    def sharpness_error(self) -> float | None:
        """Half the width of the bracket in 2/η: the exact λ_c lies within it of `sharpness`."""
        return None if self.bracket is None else 1 / self.bracket[0] - 1 / self.bracket[1]


def critical_step(
    loss_at: Callable[[float], float],
    *,
    start: float,
    loss0: float | None = None,
    tolerance: float = 0.1,
    max_forwards: int = 24,
    resolution: float = 0.0,
) -> CriticalStep:
    """The smallest η > 0 at which the loss rises above L(0).

    Args:
        loss_at: η -> L(η), a float; NaN and infinity count as raised.
        start: where to look first, η > 0; the search doubles from there while the loss is not raised, and halves
            while it is.
        loss0: L(0) if it is known.
        tolerance: high/low - 1 of the final bracket, that is, the relative error of η.
        max_forwards: losses evaluated at most.
        resolution: noise of the loss relative to |L(0)|. While a bracket is looked for, a loss within it of L(0) is
            not raised, and no search succeeds without a loss below L(0) by more.

    Raises:
        ValueError: arguments that make no search, or L(0) not finite.
    """
    _check(start=start, tolerance=tolerance, max_forwards=max_forwards, resolution=resolution)
    forwards = 0
    if loss0 is None:
        loss0, forwards = loss_at(0.0), 1
    if not math.isfinite(loss0):
        raise ValueError(f"loss at 0: expected a finite number; got {loss0}")
    low, high = 0.0, math.inf
    noise = resolution * abs(loss0)
    descended = False
    eta = start
    while forwards < max_forwards:
        loss = loss_at(eta)
        forwards += 1
        descended = descended or loss < loss0 - noise
        bracketed = low > 0.0 and high < math.inf
        if loss <= (loss0 if bracketed else loss0 + noise):
            low = eta
            if high < math.inf and not descended:
                break  # halved down to where the loss is flat: it rises from 0 on, as far as can be told
        else:
            high = eta
        if high == math.inf:
            eta = 2 * low
        elif low == 0.0:
            eta = high / 2
        elif high <= low * (1 + tolerance):
            break
        else:
            eta = math.sqrt(low * high)
    if high == math.inf:
        return _missing("never_raised", forwards, loss0)
    if low == 0.0 or not descended:
        return _missing("no_descent", forwards, loss0)
    return CriticalStep(
        outcome="found",
        eta=2 * low * high / (low + high),
        bracket=(low, high),
        forwards=forwards,
        converged=high <= low * (1 + tolerance),
        loss=loss0,
    )


def _missing(outcome: Outcome, forwards: int, loss: float) -> CriticalStep:
    return CriticalStep(outcome=outcome, eta=None, bracket=None, forwards=forwards, converged=False, loss=loss)


def _check(*, start: float, tolerance: float, max_forwards: int, resolution: float) -> None:
    if not 0 < start < math.inf:
        raise ValueError(f"start: expected a positive finite step; got {start}")
    if not tolerance > 0:
        raise ValueError(f"tolerance: expected a positive relative error; got {tolerance}")
    if max_forwards < 3:
        raise ValueError(f"max_forwards: expected at least 3 (at 0, below and above); got {max_forwards}")
    if not 0 <= resolution < 1:
        raise ValueError(f"resolution: expected a relative difference of losses, at least 0; got {resolution}")
