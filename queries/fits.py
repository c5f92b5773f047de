"""Scaling laws: loss as a constant and powers of what was spent, with intervals, and a word where a bound decided.

    >>> import numpy as np
    >>> tokens = np.geomspace(1e6, 1e9, 12)
    >>> fit = power_law(tokens, 2.0 + 50 * tokens**-0.3)
    >>> round(fit.E.value, 3), round(fit.a.value, 3), fit.a.at_bound
    (2.0, 0.3, None)

SQL can do this on a grid of E, and a grid that stops short answers as confidently as one that does not (an exponent of
.244 for .34, at an R^2 of .998). Hence, of every parameter: an interval from the bootstrap, the standard error of
Gauss-Newton beside it as a witness, and whether it lies on the bound of its search. How the minimum is found and data
are drawn anew is in `variable_projection`; of runs in a store, the points are read in `fit_runs`.

Intervals say what independent residuals around the law would do. They know nothing of a law that is wrong, and a law
extrapolated is a guess: look at the residuals first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lm_telemetry.queries import variable_projection as vp
from lm_telemetry.queries.fit_checks import FitError, checked, checked_box

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import ArrayLike

    from lm_telemetry.queries.fit_checks import Array, Bounds

    AtBound = Literal["low", "high"] | None

EXPONENTS = (0.01, 3.0)
"""Where exponents are searched for unless told: a loss has .05 to .5 in the size of the model and of its data."""
LEVEL = 0.95
"""Of the intervals."""
_NAMES = {1: ("E", "A", "a"), 2: ("E", "A", "B", "a", "b")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A value and the 2.5th and 97.5th percentile of its bootstrap; NaN without one."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate(Interval):
    """A parameter of a law.

    Attributes:
        stderr: standard deviation over the bootstrap.
        gauss_newton_stderr: the same from the curvature of the objective, sqrt of the diagonal of s^2 (J'WJ)^-1; NaN on
            a bound. Where the two differ much, the parameter is barely determined.
        at_bound: the bound of the search that it lies on. Nothing was estimated then but that it is no further inside,
            and the other parameters are what they are given that. None as well for a parameter that was given.
        bound_share: share of the bootstrap's samples on a bound; an interval with many of them is cut off there.
    """

    stderr: float
    gauss_newton_stderr: float
    at_bound: Literal["low", "high"] | None
    bound_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A law at some points: values and the 95 % interval of the law, not of a further measurement."""

    value: Array
    low: Array
    high: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What both laws have.

    Attributes:
        E: the irreducible part, in units of y.
        A, a: height at x = 1 and exponent of the first term. `a` is NaN where A is 0.
        n: points that were used.
        dropped: points left out because their y is not a finite number.
        residual: root mean square (weighted) of y - f, or of log y - log f.
        r_squared: 1 - that squared over the variance of y, or of log y. It is close to 1 for wrong laws as well.
        converged: whether the search came to rest.
        draws: samples of the bootstrap whose search came to rest, on which the intervals are based.
    """

    E: Estimate
    A: Estimate
    a: Estimate
    n: int
    dropped: int
    residual: float
    r_squared: float
    converged: bool
    draws: int
    _theta: Array = field(repr=False)
    _samples: Array = field(repr=False)
    _origin: Array = field(repr=False)

    @property
    def at_bound(self) -> tuple[str, ...]:
        """Names of the parameters that lie on a bound of their search."""
        estimates = {name: getattr(self, name) for name in _NAMES[len(self._origin)]}
        return tuple(name for name, estimate in estimates.items() if estimate.at_bound)

    def _band(self, *x: ArrayLike) -> Band:
        points = np.stack(np.broadcast_arrays(*(np.asarray(values, float) for values in x)), axis=-1)
        logs = np.log(points.reshape(-1, len(x))) - self._origin
        shape = points.shape[:-1]
        low, high = _percentiles(vp.law(self._samples, logs))
        value = vp.law(self._theta[None], logs)[0]
        return Band(value=value.reshape(shape), low=low.reshape(shape), high=high.reshape(shape))


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerLaw(Fit):
    """y = E + A x^-a."""

    def predict(self, x: ArrayLike) -> Band:
        """The law at x, positive, of any shape."""
        return self._band(x)


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """The cheapest way to a loss: parameters and tokens, and the loss in nats, for a compute budget."""

    n_parameters: Interval
    n_tokens: Interval
    loss: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Chinchilla(Fit):
    """L = E + A N^-a + B D^-b, N parameters and D tokens (2203.15556)."""

    B: Estimate
    b: Estimate

    def predict(self, n_parameters: ArrayLike, n_tokens: ArrayLike) -> Band:
        """The loss of models of N parameters after D tokens; the two are broadcast."""
        return self._band(n_parameters, n_tokens)

    @property
    def n_exponent(self) -> Interval:
        """The compute-optimal N grows as compute to this power, b / (a + b)."""
        return _interval(*(p[:, 4] / (p[:, 3] + p[:, 4]) for p in self._both()))

    @property
    def d_exponent(self) -> Interval:
        """The compute-optimal D grows as compute to this power, a / (a + b)."""
        return _interval(*(p[:, 3] / (p[:, 3] + p[:, 4]) for p in self._both()))

    def optimum(self, compute: float, *, flops: float = 6.0) -> Optimum:
        """The N and D of least loss at compute = flops N D: N = G (C / flops)^(b/(a+b)), G = (aA / bB)^(1/(a+b)).

        NaN where a term is 0: then one of the two is of no use.
        """
        (n, d, loss), (ns, ds, losses) = (self._optima(p, compute / flops) for p in self._both())
        return Optimum(n_parameters=_interval(n, ns), n_tokens=_interval(d, ds), loss=_interval(loss, losses))

    def _both(self) -> tuple[Array, Array]:
        """The fit and its samples, exponents of terms that are 0 as NaN."""
        return _identified(self._theta[None]), _identified(self._samples)

    def _optima(self, theta: Array, product: float) -> tuple[Array, Array, Array]:
        _, A, B, a, b = theta.T
        # The heights are those at the smallest N and D; so are n and d in units of these.
        budget = np.log(product) - self._origin.sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            n = (np.log(a * A / (b * B)) + b * budget) / (a + b)
        loss = theta[:, 0] + A * np.exp(-a * n) + B * np.exp(-b * (budget - n))
        return np.exp(n + self._origin[0]), np.exp(budget - n + self._origin[1]), loss


def power_law(
    x: ArrayLike,
    y: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    bounds: Bounds | None = None,
    log_residuals: bool = False,
    huber: float | None = None,
    bootstrap: int = 400,
    seed: int = 0,
) -> PowerLaw:
    """Fit y = E + A x^-a, A >= 0, by variable projection.

    Args:
        x: (n,) positive.
        y: (n,); points that are not finite are left out and counted.
        weights: (n,) positive; inverse variances of the residuals, up to a factor.
        bounds: (low, high) for "E" (default: 0 and no end) or "a" (default: `EXPONENTS`); a parameter whose bounds are
            equal is given.
        log_residuals: take log y - log f for the residual, and not y - f.
        huber: residual beyond which the loss grows linearly; None for squares. With 1e-3 and log residuals, the loss
            of Chinchilla; below the noise it is least absolute deviations, and takes more points (2404.10102).
        bootstrap: samples drawn for the intervals; 0 for none.
        seed: of those.

    Raises:
        FitError: too few points or different x, an x that is not positive, y all the same, a bound that is none.
    """
    how = _How(log_residuals=log_residuals, huber=huber, bootstrap=bootstrap, seed=seed)
    return PowerLaw(**_fit({"x": x}, ("y", y), weights, bounds=bounds, how=how))


def chinchilla(
    n_parameters: ArrayLike,
    n_tokens: ArrayLike,
    loss: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    bounds: Bounds | None = None,
    log_residuals: bool = True,
    huber: float | None = None,
    bootstrap: int = 400,
    seed: int = 0,
) -> Chinchilla:
    """Fit L = E + A N^-a + B D^-b, A and B >= 0, by variable projection (2603.22339): a, b on a grid, E, A, B inside.

    The arguments are those of `power_law`, with bounds for "E", "a" and "b". All five parameters come from the losses
    themselves; parabolas through runs of equal compute are biased even without noise (2603.22339).

    Raises:
        FitError: as `power_law` does; and where N and D go along with one another, so that nobody can tell them apart.
    """
    points = {"n_parameters": n_parameters, "n_tokens": n_tokens}
    how = _How(log_residuals=log_residuals, huber=huber, bootstrap=bootstrap, seed=seed)
    return Chinchilla(**_fit(points, ("loss", loss), weights, bounds=bounds, how=how))


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """The arguments that both laws have beside points and bounds."""

    log_residuals: bool
    huber: float | None
    bootstrap: int
    seed: int


def _fit(
    points: Mapping[str, ArrayLike],
    measured: tuple[str, ArrayLike],
    weights: ArrayLike | None,
    *,
    bounds: Bounds | None,
    how: _How,
) -> dict[str, Any]:
    """The fields of a fit."""
    low, high = checked_box(_NAMES[len(points)], bounds or {}, EXPONENTS)
    data = checked(points, measured, weights, free=int((low < high).sum()), positive=how.log_residuals)
    # In units of its mean size, so that neither units nor magnitude matter to the search.
    unit = float(np.mean(np.abs(data.y)))
    y, scale = data.y / unit, np.where(np.arange(len(low)) <= len(points), unit, 1.0)
    threshold = np.inf if how.huber is None else how.huber / (1 if how.log_residuals else unit)
    if not threshold > 0:
        raise FitError(f"huber: expected a positive number, or None for squares; got {how.huber}", n=len(y))
    problem = vp.Problem(
        logs=data.logs - data.logs.min(0),
        weights=data.weights,
        low=low / scale,
        high=high / scale,
        log=how.log_residuals,
        huber=threshold,
    )
    found, rested = vp.refine(problem, vp.start(problem, y)[None], y[None])
    theta = found[0]
    samples = vp.resample(problem, theta, y, how.bootstrap, np.random.default_rng(how.seed))
    origin = data.logs.min(0)
    r = vp.residuals(problem, found, y[None])[0]
    errors = vp.covariance(problem, theta, y)[0]
    of = np.log(y) if how.log_residuals else y
    spread = np.average((of - np.average(of, weights=data.weights)) ** 2, weights=data.weights)
    mean_square = np.average(r**2, weights=data.weights)
    return _estimates(problem, theta, samples, errors=errors, origin=origin, scale=scale) | {
        "n": len(y),
        "dropped": data.dropped,
        "residual": float(np.sqrt(mean_square)) * (1.0 if how.log_residuals else unit),
        "r_squared": float(1 - mean_square / spread),
        "converged": bool(rested[0]),
        "draws": len(samples),
        "_theta": theta * scale,
        "_samples": samples * scale,
        "_origin": origin,
    }


def _estimates(
    problem: vp.Problem, theta: Array, samples: Array, *, errors: Array, origin: Array, scale: Array
) -> dict[str, Estimate]:
    """The parameters as a user knows them, with A at x = 1."""
    terms = problem.terms
    values, drawn = (_at_one(_identified(p) * scale, origin) for p in (theta[None], samples))
    # d(A e^(a c)) = e^(a c) (dA + A c da)
    turn = np.diag(scale)
    for j in range(terms):
        turn[1 + j, 1 + j] *= np.exp(theta[1 + terms + j] * origin[j])
        turn[1 + j, 1 + terms + j] = turn[1 + j, 1 + j] * theta[1 + j] * origin[j]
    with np.errstate(invalid="ignore"):
        stderr = np.sqrt(np.einsum("pq,qr,pr->p", turn, errors, turn))
    free, given = vp.free(problem, theta), problem.low == problem.high
    estimates = {}
    for i, name in enumerate(_NAMES[terms]):
        on_low, on_high = (p[:, i] for p in (samples <= problem.low, samples >= problem.high))
        at: AtBound = "low" if theta[i] <= problem.low[i] else "high" if theta[i] >= problem.high[i] else None
        estimates[name] = Estimate(
            **_fields(values[:, i], drawn[:, i]),
            stderr=_or_nan(np.std, drawn[:, i]),
            gauss_newton_stderr=float(stderr[i]) if free[i] else 0.0 if given[i] else np.nan,
            at_bound=None if given[i] or np.isnan(values[0, i]) else at,
            bound_share=0.0 if given[i] else _or_nan(np.mean, (on_low | on_high).astype(float)),
        )
    return estimates


def _identified(theta: Array) -> Array:
    """A copy with NaN for the exponents of terms that are 0."""
    terms = theta.shape[1] // 2
    theta = theta.copy()
    theta[:, 1 + terms :][theta[:, 1 : 1 + terms] <= 0] = np.nan
    return theta


def _at_one(theta: Array, origin: Array) -> Array:
    """With the heights at x = 1, from those at the smallest x."""
    terms = len(origin)
    grown = np.exp(np.nan_to_num(theta[:, 1 + terms :]) * origin)
    return np.concatenate([theta[:, :1], theta[:, 1 : 1 + terms] * grown, theta[:, 1 + terms :]], axis=1)


def _interval(value: Array, samples: Array) -> Interval:
    return Interval(**_fields(value, samples))


def _fields(value: Array, samples: Array) -> dict[str, float]:
    low, high = _percentiles(samples[:, None])
    return {"value": float(value[0]), "low": float(low[0]), "high": float(high[0])}


def _percentiles(samples: Array) -> tuple[Array, Array]:
    """Of (draws, m): the ends of the intervals, each (m,); NaN where there are no samples."""
    ends = np.full((2, samples.shape[1]), np.nan)
    told = ~np.isnan(samples).all(0)
    if told.any():
        ends[:, told] = np.nanquantile(samples[:, told], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return ends[0], ends[1]


def _or_nan(statistic: Callable[[Array], np.floating], samples: Array) -> float:
    """A statistic of the samples that are numbers; NaN if there are none."""
    samples = samples[~np.isnan(samples)]
    return float(statistic(samples)) if len(samples) else np.nan
