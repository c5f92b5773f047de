"""Least squares for sums of power laws, y = E + sum over j of A_j x_j^-a_j, inside a box; many data sets at once.

For given exponents the law is linear in (E, A_j): what is left is a search over the exponents alone (variable
projection), which is small enough to be exhaustive and does not get caught between basins as a descent in all
parameters does. Decisions:

- `start` takes a grid of exponents, with the best (E, A_j) inside their bounds for each point of it. There are at most
  three of them, so that the bounded problem is solved exactly, by trying which ones rest on which bound.
- `refine` goes on from the best point of the grid in all parameters (Levenberg-Marquardt, projected on the box), since
  the grid's residuals may be those of logarithms, or of Huber's loss, which are not linear in anything. The parameters
  that end on a bound lie on it to the last bit.
- A_j is the height of its term at the smallest x_j, so that no power overflows; `fits` turns it into the usual one.
- The bootstrap (`resample`) keeps x and draws y anew: the law, plus residuals of random signs (wild bootstrap), each
  divided by 1 - its leverage (HC3), or a curve through few points would look better known than it is. On planted laws
  (8 to 30 points, 100 to 200 data sets each) its 95 % intervals held the truth in 91 to 97 %. Drawing whole points gave
  90 to 99 %, in intervals up to twice as wide where there are a dozen points for five parameters; random weights of
  points, 74 to 89 %.

Left out: more than one minimum of a resampled data set. All of them are searched from the fit of the data themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Flags = NDArray[np.bool_]

GRID = {1: 200, 2: 32}
"""Values of an exponent that are tried, by the number of terms."""
_ITERATIONS = 300
_TOLERANCE = 1e-13
"""Relative fall of the objective below which it has come to rest."""
_AT_ONCE = 2**20
"""Points times data sets, or times exponents, that are held in memory together."""
_TINY = 1e-300


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A law and how it is held to data.

    Attributes:
        logs: (n, J), log(x_j / smallest x_j).
        weights: (n,), inverse variances of the residuals up to a factor.
        low, high: (1 + 2J,), the box of (E, A_1.., a_1..); equal where a parameter is given.
        log: whether residuals are log y - log f, rather than y - f.
        huber: where Huber's loss turns from square to linear, in units of the residual; infinite for squares alone.
    """

    logs: Array
    weights: Array
    low: Array
    high: Array
    log: bool
    huber: float

    @property
    def terms(self) -> int:
        """J, the number of power laws."""
        return len(self.low) // 2


def law(theta: Array, logs: Array) -> Array:
    """The law f for parameters (B, 1 + 2J) at points (n, J); (B, n)."""
    terms = logs.shape[1]
    powers = np.exp(-theta[:, None, 1 + terms :] * logs)
    return np.asarray(theta[:, :1] + (theta[:, None, 1 : 1 + terms] * powers).sum(-1))


def residuals(problem: Problem, theta: Array, y: Array) -> Array:
    """(B, n) residuals of data (B, n)."""
    f = law(theta, problem.logs)
    return np.log(y / np.maximum(f, _TINY)) if problem.log else y - f


def objective(problem: Problem, r: Array) -> Array:
    """(B,) weighted sums of r^2, or of Huber's loss times two: r^2 up to d, and d (2 |r| - d) from there."""
    d = problem.huber
    size = np.abs(r)
    inside = np.minimum(size, d)
    losses = inside * (2 * size - inside)
    return np.asarray(losses @ problem.weights)


def slopes(problem: Problem, theta: Array) -> Array:
    """(B, n, 1 + 2J) derivatives of f, or of log f."""
    terms = problem.terms
    powers = np.exp(-theta[:, None, 1 + terms :] * problem.logs)
    by_exponent = -theta[:, None, 1 : 1 + terms] * powers * problem.logs
    matrix = np.concatenate([np.ones((*powers.shape[:2], 1)), powers, by_exponent], axis=-1)
    if problem.log:
        matrix /= np.maximum(law(theta, problem.logs), _TINY)[:, :, None]
    return matrix


def start(problem: Problem, y: Array) -> Array:
    """(1 + 2J,) the best point of the grid of exponents, by squares of y - f (relative ones if residuals are logs)."""
    terms = problem.terms
    axes = [
        np.geomspace(low, high, GRID[terms]) if high > low else np.array([low])
        for low, high in zip(problem.low[1 + terms :], problem.high[1 + terms :], strict=True)
    ]
    exponents = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=-1)
    weights = problem.weights / y**2 if problem.log else problem.weights
    grams, moments = [], []
    for some in np.array_split(exponents, -(-len(exponents) * len(y) // _AT_ONCE)):
        powers = np.exp(-some[:, None, :] * problem.logs)
        design = np.concatenate([np.ones((*powers.shape[:2], 1)), powers], axis=-1)
        weighted = (design * weights[:, None]).swapaxes(1, 2)
        grams.append(weighted @ design)
        moments.append(weighted @ y)
    box = problem.low[: 1 + terms], problem.high[: 1 + terms]
    heights, cost = _bounded(np.concatenate(grams), np.concatenate(moments), *box)
    best = int(np.argmin(cost))
    return np.concatenate([heights[best], exponents[best]])


def _bounded(grams: Array, moments: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """Least squares inside a box for G designs X, from X'WX (G, K, K) and X'Wy (G, K).

    Returns:
        Coefficients (G, K) and objectives (G,), these up to y'Wy.
    """
    best, least = np.zeros_like(moments), np.full(len(moments), np.inf)
    states = [
        ("low",) if lo == hi else ("free", "low", "high") if np.isfinite(hi) else ("free", "low")
        for lo, hi in zip(low, high, strict=True)
    ]
    for state in product(*states):
        loose = np.array([s == "free" for s in state])
        tried = np.broadcast_to(np.where([s == "high" for s in state], high, low), moments.shape).copy()
        tried[:, loose] = 0
        if loose.any():
            right = (moments - np.einsum("gkl,gl->gk", grams, tried))[:, loose]
            inverse = np.linalg.pinv(grams[:, loose][:, :, loose], hermitian=True)
            tried[:, loose] = np.einsum("gkl,gl->gk", inverse, right)
        cost = np.einsum("gk,gkl,gl->g", tried, grams, tried) - 2 * (moments * tried).sum(-1)
        cost[((tried < low) | (tried > high)).any(-1)] = np.inf
        better = cost < least
        best[better], least[better] = tried[better], cost[better]
    return best, least


def refine(problem: Problem, theta: Array, y: Array) -> tuple[Array, Flags]:
    """The nearest minimum for each of B data sets (B, n) from its parameters (B, P): (B, P), and which came to rest."""
    theta = np.clip(theta, problem.low, problem.high)
    rested = np.zeros(len(theta), bool)
    damping = np.full(len(theta), 1e-3)
    cost = objective(problem, residuals(problem, theta, y))
    for _ in range(_ITERATIONS):
        going = np.flatnonzero(~rested)
        if not len(going):
            break
        here, data = theta[going], y[going]
        ahead = np.clip(here + _step(problem, here, data, damping[going]), problem.low, problem.high)
        there = objective(problem, residuals(problem, ahead, data))
        gain = cost[going] - there
        better = gain > 0
        # An objective at the level of rounding has nothing to give, whatever its relative changes.
        floor = _TOLERANCE * (cost[going] + np.finfo(float).eps ** 2 * (problem.weights * data**2).sum(-1))
        rested[going] = (better & (gain <= floor)) | (~better & (damping[going] > 1e6)) | (cost[going] <= floor)
        moved = going[better]
        theta[moved], cost[moved] = ahead[better], there[better]
        damping[going] = np.clip(damping[going] * np.where(better, 0.2, 5.0), 1e-12, 1e8)
    return theta, rested


def _step(problem: Problem, theta: Array, y: Array, damping: Array) -> Array:
    """Damped Gauss-Newton steps of the parameters that do not press against their bounds."""
    r, matrix = residuals(problem, theta, y), slopes(problem, theta)
    omega = problem.weights * np.minimum(1, problem.huber / np.maximum(np.abs(r), _TINY))
    weighted = matrix * omega[:, :, None]
    gradient = np.einsum("bnp,bn->bp", weighted, r)
    hessian = np.einsum("bnp,bnq->bpq", weighted, matrix)
    held = ((theta <= problem.low) & (gradient <= 0)) | ((theta >= problem.high) & (gradient >= 0))
    diagonal = np.einsum("bpp->bp", hessian).copy()
    held |= diagonal <= 0
    scale = np.where(held, 1.0, np.sqrt(np.where(held, 1.0, diagonal)))
    hessian /= scale[:, :, None] * scale[:, None, :]
    hessian[held[:, :, None] | held[:, None, :]] = 0
    places = np.arange(theta.shape[1])
    hessian[:, places, places] = 1 + damping[:, None]
    right = np.where(held, 0.0, gradient / scale)
    return np.asarray(np.linalg.solve(hessian, right[:, :, None])[:, :, 0] / scale)


def free(problem: Problem, theta: Array) -> Flags:
    """(P,) which parameters of (P,) are neither on a bound, nor the exponent of a term that is zero."""
    inside = (theta > problem.low) & (theta < problem.high)
    inside[1 + problem.terms :] &= theta[1 : 1 + problem.terms] > 0
    return inside


def covariance(problem: Problem, theta: Array, y: Array) -> tuple[Array, Array]:
    """Gauss-Newton covariance (P, P) of a fit and the leverages (n,); zero rows where a parameter is not free.

    s^2 (J'WJ)^-1 with s^2 = sum w psi(r)^2 / (n - p) / (mean psi')^2; psi(r) = r for squares. NaN where that cannot be
    told: no more points than parameters, no residual on the square part of Huber's loss.
    """
    r = residuals(problem, theta[None], y[None])[0]
    loose = free(problem, theta)
    matrix = slopes(problem, theta[None])[0][:, loose] * np.sqrt(problem.weights)[:, None]
    size = np.linalg.norm(matrix, axis=0)
    u, singular, v = np.linalg.svd(matrix / size, full_matrices=False)
    known = singular > singular.max(initial=0) * 1e-14
    leverages = np.minimum((u[:, known] ** 2).sum(-1), 1.0)
    psi = np.clip(r, -problem.huber, problem.huber)
    square = np.mean(np.abs(r) <= problem.huber)
    spare = len(y) - loose.sum()
    full = np.zeros((len(theta), len(theta)))
    inverse = (v.T / singular**2) @ v / np.outer(size, size) if known.all() else np.full((loose.sum(),) * 2, np.inf)
    variance = problem.weights @ psi**2 / spare / square**2 if spare > 0 and square > 0 else np.nan
    full[np.ix_(loose, loose)] = inverse * variance
    return full, leverages


def resample(problem: Problem, theta: Array, y: Array, draws: int, rng: np.random.Generator) -> Array:
    """Parameters (draws, P) of data drawn anew; samples whose search did not come to rest are left out."""
    _, leverages = covariance(problem, theta, y)
    r = residuals(problem, theta[None], y[None])[0] / np.maximum(1 - leverages, 0.05)
    f = law(theta[None], problem.logs)
    kept = []
    for count in map(len, np.array_split(np.empty(draws), max(1, -(-draws * len(y) // _AT_ONCE)))):
        shift = rng.choice(np.array([-1.0, 1.0]), size=(count, len(y))) * r
        again = f * np.exp(shift) if problem.log else f + shift
        found, rested = refine(problem, np.repeat(theta[None], count, axis=0), again)
        kept.append(found[rested])
    return np.concatenate(kept)
