"""What a law can be fitted to: points and bounds as they are given, checked and brought into shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lm_telemetry.errors import QueryError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[np.float64]
    Bounds = Mapping[str, tuple[float, float]]

_SAME = 1e-12
"""Relative spread below which all y are taken to be one."""
_TOGETHER = 1 - 1e-6
"""Correlation of log N and log D from which on they cannot be told apart."""


class FitError(QueryError):
    """A law cannot be fitted to what was given.

    Attributes:
        n: points that could be used.
    """

    def __init__(self, message: str, *, n: int) -> None:
        super().__init__(message)
        self.n = n


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Points that can be fitted.

    Attributes:
        logs: (n, J) logarithms of x_j.
        y: (n,) finite.
        weights: (n,) positive.
        dropped: points whose y was no finite number.
    """

    logs: Array
    y: Array
    weights: Array
    dropped: int


def checked(
    spent: Mapping[str, ArrayLike],
    measured: tuple[str, ArrayLike],
    weights: ArrayLike | None,
    *,
    free: int,
    positive: bool,
) -> Points:
    """The points, or a FitError that names what was expected of them and what came.

    Args:
        spent: x_j, by the name the caller knows them by.
        measured: name and values of y.
        weights: of the points; None if all count the same.
        free: parameters that are searched for.
        positive: whether y must be, since its logarithm is taken.
    """
    columns = {**spent, measured[0]: measured[1], **({} if weights is None else {"weights": weights})}
    arrays = {name: np.asarray(values, float) for name, values in columns.items()}
    if len({array.shape for array in arrays.values()}) > 1 or arrays[measured[0]].ndim != 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise FitError(f"expected vectors of one length; got {shapes}", n=0)
    y = arrays.pop(measured[0])
    usable = np.isfinite(y)
    kept, n = y[usable], int(usable.sum())
    for name, array in arrays.items():
        wrong = array[usable & ~((array > 0) & (array < np.inf))]
        if len(wrong):
            raise FitError(f"{name}: expected positive numbers; got {wrong[0]:g} and {len(wrong) - 1} more", n=n)
    if positive and (kept <= 0).any():
        raise FitError(f"{measured[0]}: logarithms are taken; got {kept.min():g}. Try log_residuals=False", n=n)
    dropped = len(y) - n
    if n <= free:
        raise FitError(
            f"expected more than {free} points, the number of free parameters, or nothing would be known of their"
            f" errors; got {n}" + (f", {dropped} more having no finite {measured[0]}" if dropped else ""),
            n=n,
        )
    logs = np.log(np.stack([arrays[name][usable] for name in spent], axis=-1))
    # A constant, a height and an exponent show at three places; with the constant given, at two.
    least = min(3, free)
    for name, column in zip(spent, logs.T, strict=True):
        if (places := len(np.unique(column))) < least:
            raise FitError(f"{name}: expected at least {least} different values; got {places}", n=n)
    if np.ptp(kept) <= _SAME * np.abs(kept).max():
        raise FitError(f"{measured[0]}: is {kept[0]:g} at all points; there is no power law in a constant", n=n)
    if len(spent) > 1 and abs(together := np.corrcoef(logs.T)[0, 1]) > _TOGETHER:
        raise FitError(
            f"{' and '.join(spent)} go along with one another (correlation of logarithms {together:.7f}): their parts"
            " cannot be told apart. Fit a power law in one of them, or vary them independently",
            n=n,
        )
    weight = arrays["weights"][usable] if weights is not None else np.ones(n)
    return Points(logs=logs, y=kept, weights=weight, dropped=dropped)


def checked_box(names: tuple[str, ...], bounds: Bounds, exponents: tuple[float, float]) -> tuple[Array, Array]:
    """The lowest and highest values (P,) of the parameters `names`, the given ones as they are given."""
    may_be_bound = tuple(name for name in names if not name.isupper() or name == "E")
    if unknown := sorted(bounds.keys() - set(may_be_bound)):
        raise FitError(f"bounds: expected some of {', '.join(may_be_bound)}; got {', '.join(unknown)}", n=0)
    box = np.array([bounds.get(name, (0.0, np.inf) if name.isupper() else exponents) for name in names], float)
    for name, (low, high) in zip(names, box, strict=True):
        ends = (-np.inf < low <= high) if name.isupper() else (0 < low <= high < np.inf)
        if not ends:
            what = "low <= high" if name.isupper() else "0 < low <= high"
            raise FitError(f"bounds: expected {what} for {name}; got ({low:g}, {high:g})", n=0)
    return box[:, 0], box[:, 1]
