"""The trace of a symmetric operator that is known only by its products with vectors.

Two unbiased estimators over random signs z (Rademacher), for which E[z'Az] = tr A:

* `hutchinson`: the mean of z'Az. Its variance a probe is 2(|A|_F² - Σ A_ii²), the least of all such distributions of
  independent entries, and nothing at all for a diagonal A;
* `hutch_pp` (Hutch++, arXiv 2010.09649): with Q an orthonormal basis of AS for random signs S, tr A is tr Q'AQ, which
  is computed exactly, plus the trace of (I - QQ')A(I - QQ'), which is left to Hutchinson. If the spectrum decays fast,
  what made the variance is then out of it, and the error falls as 1/n where Hutchinson's falls as 1/√n. It holds n/3
  vectors of length P in memory; Hutchinson holds one.

Which one: a language model's Hessian has too long a bulk for Hutch++. On a Llama of 106,816 parameters after 40 AdamW
steps (trace 14,950, top eigenvalue 181) the standard deviations at 9, 18 and 36 products were 1.9, 1.7 and 1.2 % for
Hutchinson, 3.8, 2.5 and 1.5 % for Hutch++.

For few probes an interval of 95 % is `stderr` times Student's t of probes - 1 degrees of freedom. Where one direction
dominates what is probed, samples are skewed and it is too short: 91 % with 4 probes on eigenvalues 1/i².
Left out: antithetic or orthogonalised probes, and control variates between captures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceEstimate:
    """An estimated trace.

    Attributes:
        value: the estimate, unbiased.
        stderr: its standard error, from the scatter of the probes; None with one probe. For Hutch++ the scatter is that
            of the remainder: given the sketch the rest is exact, so that this too is the error of the whole.
        probes: random vectors whose scatter was taken: for Hutch++ those of the remainder.
        hvps: products with the operator that were spent.
    """

    value: float
    stderr: float | None
    probes: int
    hvps: int


def hutchinson(
    matvec: Callable[[Tensor], Tensor],
    *,
    dimension: int,
    probes: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TraceEstimate:
    """Trace of A as the mean of z'Az over `probes` vectors of random signs.

    Args:
        matvec: v -> Av for v of shape (P,); its argument must not be written to.
        dimension: P.
        probes: products with A to spend, one a vector.
        generator: source of random signs, on `device`; None takes `own_generator(0)`. The global one is never used.
        dtype: of the vectors, float32 or float64. Sums over probes are taken in float64 on the host.
        device: where the vectors live.

    Raises:
        ValueError: no dimension, or no probe.
        FloatingPointError: a product with A is not finite.
    """
    _check(dimension=dimension, probes=probes, least=1)
    generator = generator or own_generator(0, device)
    samples: list[float] = []
    for _ in range(probes):
        signs = random_signs(dimension, generator, dtype, device)
        samples.append(_finite(float(signs @ matvec(signs).to(dtype)), len(samples) + 1))
    mean, stderr = _mean(samples)
    return TraceEstimate(value=mean, stderr=stderr, probes=probes, hvps=probes)


def hutch_pp(
    matvec: Callable[[Tensor], Tensor],
    *,
    dimension: int,
    probes: int,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TraceEstimate:
    """Trace of A by Hutch++: a third of the products finds a subspace, a third its trace, a third the remainder's.

    An A of rank at most probes // 3 is met exactly, to rounding.

    Args:
        matvec: v -> Av for v of shape (P,); its argument must not be written to.
        dimension: P.
        probes: products with A to spend at most, at least 3; fewer are spent if A has too small a rank for the sketch.
        generator: source of random signs, on `device`; None takes `own_generator(0)`. The global one is never used.
        dtype: of the vectors, float32 or float64. Sums over probes are taken in float64 on the host.
        device: where the vectors live.

    Raises:
        ValueError: no dimension, or fewer than 3 probes.
        FloatingPointError: a product with A is not finite.
    """
    _check(dimension=dimension, probes=probes, least=3)
    generator = generator or own_generator(0, device)
    spent = 0

    def product(vector: Tensor) -> Tensor:
        nonlocal spent
        spent += 1
        return matvec(vector).to(dtype)

    sketch = min(probes // 3, dimension)
    remainder = probes - 2 * sketch
    basis: list[Tensor] = []
    for _ in range(sketch):
        # A copy, since an operator may hand back its argument or a tensor of its own.
        image = product(random_signs(dimension, generator, dtype, device)).clone()
        size = _finite(float(image.norm()), spent)
        _project_out(basis, image)
        left = float(image.norm())
        # Below this what is left is rounding error, and the image of A is spanned already.
        if left > 10 * torch.finfo(dtype).eps * size:
            basis.append(image.div_(left))
    exact = math.fsum(_finite(float(q @ product(q)), spent) for q in basis)
    samples: list[float] = []
    for _ in range(remainder):
        signs = random_signs(dimension, generator, dtype, device)
        _project_out(basis, signs)
        samples.append(_finite(float(signs @ product(signs)), spent))
    rest, stderr = _mean(samples)
    return TraceEstimate(value=exact + rest, stderr=stderr, probes=remainder, hvps=spent)


def own_generator(number: int, device: torch.device | str) -> torch.Generator:
    """A generator whose stream depends on `number`, and is shared with nobody.

    Weights are drawn by generators with small seeds. Signs from the stream that made the weights are correlated with
    them, and an estimate would be biased: by 12 % of the second moment in a case that was met.
    """
    # A multiplicative hash (Knuth) into seeds that nobody types.
    return torch.Generator(device=device).manual_seed((number + 1) * 0x9E3779B97F4A7C15 % 2**63)


def random_signs(dimension: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """(P,) independent entries of 1 and -1, of length √P."""
    signs = torch.empty(dimension, dtype=dtype, device=device)
    return signs.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def _project_out(basis: list[Tensor], vector: Tensor) -> None:
    """Take the span of an orthonormal basis out of `vector`, in place, twice for the sake of rounding."""
    for _ in range(2):
        for known in basis:
            vector.addcmul_(known, known @ vector, value=-1)


def _mean(samples: list[float]) -> tuple[float, float | None]:
    n = len(samples)
    mean = math.fsum(samples) / n
    if n == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in samples) / (n - 1) / n)


def _finite(value: float, product: int) -> float:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"product {product} with the operator is not finite ({value}); the loss or its derivatives overflow at "
            "this point"
        )
    return value


def _check(*, dimension: int, probes: int, least: int) -> None:
    if dimension < 1:
        raise ValueError(f"dimension: expected at least 1; got {dimension}")
    if probes < least:
        raise ValueError(f"probes: expected at least {least}; got {probes}")
