"""Extreme eigenvalues of a symmetric operator that is known only by its products with vectors.

Why Lanczos: per product it beats power iteration by far (7 against 13 for 1 % on a small Llama), and it tells the
algebraically largest eigenvalue from the one largest in magnitude, which on a language model at initialisation is
often a negative one. Why this variant:

* every new direction is orthogonalised twice against the whole basis, so that no ghost copies of converged
  eigenvalues appear; the basis costs (steps, P) numbers of memory;
* a Ritz pair (θ, y) counts as converged when min(r, r²/gap) ≤ tolerance·|θ| and r ≤ 2 tolerance·|θ|, with
  r = |Ay - θy| and gap the distance to the nearest other Ritz value (the residual bound and the quadratic one of Kato
  and Temple). The quadratic bound alone is fooled while two eigenvalues still share one Ritz pair: on Llama Hessians
  it was off by more than 2 % in 3 % of cold and 17 % of warm solves, with the second condition in none, for 1.8
  products more;
* a warm start mixes the kept Ritz vectors of the last solve with noise of the same norm. From the last top vector
  alone a solve looks converged at once, also after another eigenvalue has overtaken it; for the same reason fewer than
  two products are never accepted. An eigenvalue that comes from below the kept ones and jumps to the top has a share of
  only 1/√P in the start and may still be missed, in a tenth of constructed cases. Who knows a vector that leans
  towards such a newcomer (the gradient of a loss does) adds it to the start, and needs less noise;
* what a product has along older basis vectors than the previous one vanishes for a symmetric operator. It is computed
  anyway, and reported as `asymmetry`: a second derivative that is silently incomplete shows up there.

Left out: block Lanczos (of an exactly multiple eigenvalue one copy is seen, unless the Krylov space closes) and
restarts with a truncated basis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

KEPT_VECTORS = 3
"""Ritz vectors handed on for a warm start, if k does not ask for more."""
MINIMUM_STEPS = 2
"""A one-product Rayleigh quotient is off by up to 40 % right after an eigenvalue crossing."""
RESIDUAL_FACTOR = 2
"""Residual of a converged pair at most, in units of the tolerance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EigenPair:
    """One Ritz value.

    Attributes:
        value: the Ritz value θ, a lower bound of the largest eigenvalue for `which="largest"`.
        residual: r = |Ay - θy|; some eigenvalue lies within it of θ.
        converged: whether the residual and the error bound are within the tolerance.
    """

    value: float
    residual: float
    converged: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EigenResult:
    """What one solve found.

    Attributes:
        pairs: the k wanted pairs, most extreme first.
        vectors: orthonormal Ritz vectors (max(k, 3) or as many as the basis gave, P), most extreme first; the first k
            belong to `pairs`. Give them to the next solve as `start`.
        hvps: products with the operator that were spent.
        asymmetry: largest product component that symmetry forbids, relative to the largest Ritz magnitude; at the
            level of rounding for a symmetric operator.
    """

    pairs: tuple[EigenPair, ...]
    vectors: Tensor
    hvps: int
    asymmetry: float

    @property
    def value(self) -> float:
        """The most extreme eigenvalue."""
        return self.pairs[0].value

    @property
    def residual(self) -> float:
        """The residual of the most extreme pair."""
        return self.pairs[0].residual

    @property
    def converged(self) -> bool:
        """Whether all wanted pairs converged."""
        return all(pair.converged for pair in self.pairs)


def lanczos(
    matvec: Callable[[Tensor], Tensor],
    *,
    dimension: int,
    k: int = 1,
    which: Literal["largest", "smallest"] = "largest",
    start: Tensor | None = None,
    noise: float = 1.0,
    residual_factor: float = RESIDUAL_FACTOR,
    tolerance: float = 1e-2,
    max_steps: int = 40,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> EigenResult:
    """The k algebraically largest (or smallest) eigenvalues of a symmetric operator A.

    Args:
        matvec: v -> Av for v of shape (P,), unit norm; its argument must not be written to.
        dimension: P.
        k: eigenvalues wanted.
        which: `largest` or `smallest`, algebraically.
        start: warm start, one vector (P,) or several (m, P), whose sum begins: Ritz vectors of an earlier solve.
        noise: norm of the random vector mixed into a warm start, over that of the sum.
        residual_factor: residual of a converged pair at most, in units of the tolerance.
        tolerance: relative error at which a pair counts as converged (see the module).
        max_steps: products with A at most; what was found by then is returned with `converged=False`.
        generator: source of random vectors, on `device`; None seeds a new one with 0. The global one is never used.
        dtype: of the basis, float32 or float64. The projected problem is always solved in float64 on the host.
        device: where the vectors live.

    Raises:
        ValueError: arguments that make no problem, such as k above P or above max_steps.
        FloatingPointError: a product with A is not finite.
    """
    _check(dimension=dimension, k=k, which=which, tolerance=tolerance, max_steps=max_steps, start=start)
    sign = 1.0 if which == "largest" else -1.0
    if generator is None:
        generator = torch.Generator(device=device).manual_seed(0)
    space = Krylov(dimension=dimension, dtype=dtype, device=torch.device(device), generator=generator)
    space.residual_factor = residual_factor
    space.begin(start, noise=noise)
    limit = min(max_steps, dimension)
    while True:
        closed = space.extend(matvec, sign)
        ritz = space.solve(min(k, space.size), tolerance)
        if space.size == limit:
            break
        # A closed space is exact; but if it holds a wanted pair, another copy of that eigenvalue may lie outside.
        settled = ritz.settled and (not closed or k == 1 or not ritz.last_block_wanted)
        if settled and space.size >= max(k, MINIMUM_STEPS):
            break
        if closed:
            space.open_block()
    pairs = tuple(
        EigenPair(value=sign * value, residual=residual, converged=converged)
        for value, residual, converged in zip(ritz.values, ritz.residuals, ritz.converged, strict=True)
    )
    return EigenResult(
        pairs=pairs,
        vectors=space.ritz_vectors(ritz.coordinates[:, : max(k, KEPT_VECTORS)]),
        hvps=space.size,
        asymmetry=space.asymmetry / ritz.scale if ritz.scale > 0 else 0.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ritz:
    """Solution of the projected problem, in descending order."""

    values: list[float]
    residuals: list[float]
    converged: list[bool]
    settled: bool
    """The wanted pairs and the leading pair of the newest block have converged."""
    last_block_wanted: bool
    """The newest block holds one of the wanted pairs, so that another copy may still be hidden."""
    coordinates: Tensor
    scale: float


class Krylov:
    """An orthonormal basis, grown one product at a time, and the operator's tridiagonal image in it.

    Attributes:
        basis: the vectors so far, each (P,).
        diagonal: the image's diagonal.
        coupling: coupling[j] joins vectors j and j + 1; 0 where the space has closed, so that a new block begins.
    """

    def __init__(self, *, dimension: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> None:
        self.dimension, self.dtype, self.device, self.generator = dimension, dtype, device, generator
        self.basis: list[Tensor] = []
        self.diagonal: list[float] = []
        self.coupling: list[float] = []
        self.block_start = 0
        self.residual_factor: float = RESIDUAL_FACTOR
        self.asymmetry = 0.0
        self._next: Tensor | None = None

    @property
    def size(self) -> int:
        """Products spent, which is the number of basis vectors."""
        return len(self.diagonal)

    def begin(self, start: Tensor | None, *, noise: float = 1.0) -> None:
        """Set the first basis vector: the sum of `start`, mixed with noise; or noise alone."""
        if start is None:
            self._next = self._random()
            return
        first = start.to(device=self.device, dtype=self.dtype).reshape(-1, self.dimension).sum(0)
        norm = first.norm()
        if not bool(torch.isfinite(norm)) or float(norm) == 0.0:
            raise ValueError("start: expected finite vectors whose sum is not zero; pass start=None for a cold start")
        first = first.div_(norm)
        if noise > 0:
            first = first.add_(self._random(), alpha=noise)
            first = first.div_(first.norm())
        self._next = first

    def extend(self, matvec: Callable[[Tensor], Tensor], sign: float) -> bool:
        """Spend one product. True if the basis now spans an invariant subspace."""
        assert self._next is not None
        vector, self._next = self._next, None
        self.basis.append(vector)
        product = matvec(vector).to(self.dtype) * sign  # a new tensor, since an operator may hand back its argument
        size = product.norm()
        components = self._orthogonalise(product)
        beta = product.norm()
        # By symmetry the component along the previous vector is the coupling already known, and older ones vanish.
        known = torch.zeros_like(components)
        known[-2:-1] = self.coupling[-1] if self.coupling else 0.0
        known[-1] = components[-1]
        stray = (components - known).abs().amax()
        alpha, size_, beta_, stray_ = torch.stack([components[-1], size, beta, stray]).tolist()
        if not math.isfinite(size_):
            raise FloatingPointError(
                f"product {len(self.basis)} with the operator is not finite (norm {size_}); "
                "the loss or its derivatives overflow at this point"
            )
        self.asymmetry = max(self.asymmetry, stray_)
        self.diagonal.append(alpha)
        # Below this the rest of the product is rounding error of the subtraction that made it.
        closed = beta_ <= 10 * torch.finfo(self.dtype).eps * max(size_, *map(abs, self.diagonal), *self.coupling)
        self.coupling.append(0.0 if closed else beta_)
        if not closed:
            self._next = product.div_(beta)
        return bool(closed)

    def open_block(self) -> None:
        """Go on from a random vector orthogonal to the invariant subspace spanned so far."""
        vector = self._random()
        self._orthogonalise(vector)
        self._next = vector.div_(vector.norm())
        self.block_start = self.size

    def solve(self, k: int, tolerance: float) -> _Ritz:
        """Eigenpairs of the projected operator, with the error bounds of the top k."""
        m = self.size
        off = torch.tensor(self.coupling[:-1], dtype=torch.float64)
        projected = torch.diag(torch.tensor(self.diagonal, dtype=torch.float64))
        projected += torch.diag(off, 1) + torch.diag(off, -1)
        values, coordinates = torch.linalg.eigh(projected)
        values, coordinates = values.flip(0), coordinates.flip(1)
        residuals = (self.coupling[-1] * coordinates[-1]).abs().tolist()
        theta = values.tolist()
        scale = max(map(abs, theta))
        floor = torch.finfo(self.dtype).eps * scale

        def converged(i: int) -> bool:
            r = residuals[i]
            gap = min((abs(theta[i] - other) for j, other in enumerate(theta) if j != i), default=0.0)
            error = min(r, r * r / gap) if gap > 0 else r
            allowed = max(tolerance * abs(theta[i]), floor)
            return bool(error <= allowed and r <= self.residual_factor * allowed)

        verdicts = [converged(i) for i in range(k)]
        in_last_block = coordinates[self.block_start :].norm(dim=0) > math.sqrt(0.5)
        lead = int(in_last_block.nonzero()[0]) if bool(in_last_block.any()) else 0
        return _Ritz(
            values=theta[:k],
            residuals=residuals[:k],
            converged=[verdict or m == self.dimension for verdict in verdicts],
            settled=all(verdicts) and converged(lead),
            last_block_wanted=lead < k,
            coordinates=coordinates,
            scale=scale,
        )

    def ritz_vectors(self, coordinates: Tensor) -> Tensor:
        """(steps, m) coordinates -> (m, P) vectors."""
        vectors = torch.zeros(coordinates.shape[1], self.dimension, dtype=self.dtype, device=self.device)
        for vector, row in zip(self.basis, coordinates.to(self.dtype).to(self.device), strict=True):
            vectors.addr_(row, vector)
        return vectors

    def _random(self) -> Tensor:
        vector = torch.randn(self.dimension, generator=self.generator, dtype=self.dtype, device=self.device)
        return vector.div_(vector.norm())

    def _orthogonalise(self, vector: Tensor) -> Tensor:
        """Take the basis out of `vector`, in place and twice; what was taken out, per basis vector."""
        taken = torch.zeros(len(self.basis), dtype=self.dtype, device=self.device)
        for _ in range(2):
            for i, known in enumerate(self.basis):
                component = known @ vector
                taken[i] += component
                vector.addcmul_(known, component, value=-1)
        return taken


def _check(*, dimension: int, k: int, which: str, tolerance: float, max_steps: int, start: Tensor | None) -> None:
    if dimension < 1:
        raise ValueError(f"dimension: expected at least 1; got {dimension}")
    if not 1 <= k <= dimension:
        raise ValueError(f"k: expected 1 to {dimension}, the dimension of the operator; got {k}")
    if max_steps < min(max(k, MINIMUM_STEPS), dimension):
        raise ValueError(
            f"max_steps: expected at least {max(k, MINIMUM_STEPS)} for k = {k}; got {max_steps}; "
            "one product alone gives a Rayleigh quotient, not an eigenvalue"
        )
    if which not in {"largest", "smallest"}:
        raise ValueError(f"which: expected 'largest' or 'smallest'; got {which!r}")
    if not tolerance > 0:
        raise ValueError(f"tolerance: expected a positive relative error; got {tolerance}")
    if start is not None and start.shape[-1] != dimension:
        raise ValueError(f"start: expected vectors of {dimension} entries; got shape {tuple(start.shape)}")
