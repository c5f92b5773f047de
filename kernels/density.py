"""The density of eigenvalues of a symmetric operator that is known only by its products with vectors.

Stochastic Lanczos quadrature (arXiv 1901.10159; Golub & Meurant, Matrices, Moments and Quadrature): m steps of Lanczos
from a random unit vector v give the Gauss quadrature Σ w_i f(θ_i) of v'f(A)v, with nodes θ_i the Ritz values and
weights w_i the squared first entries of the tridiagonal matrix's eigenvectors; it is exact for polynomials of degree up
to 2m - 1. As E[v'f(A)v] = tr f(A) / P, the mean over vectors is a quadrature of the spectral density. Vectors are
random signs over √P, which scatter less than those uniform on the sphere (by the diagonal of f(A), see `trace`).

* The basis is orthogonalised in full, with the code of `lanczos`: without it, ghost copies would shift the weights.
* A Krylov space that closes early (a degenerate spectrum, few dimensions) has given its vector's measure exactly, with
  fewer nodes.
* For plotting the nodes are broadened by Gaussians. What the grid holds is the mean density over each of its cells,
  from differences of the normal distribution function, so that it sums to 1 at any width, also below the spacing.

Not resolved: structure finer than about the span of the spectrum over m, where nodes lie between eigenvalues. Atoms
(a bulk at 0, an outlier) do carry their true weight, within `density_stderr`. Memory: m vectors of length P.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lm_telemetry.kernels.lanczos import Krylov
from lm_telemetry.kernels.trace import own_generator, random_signs

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SHARE_OF_SPAN = 0.01
"""Standard deviation of the broadening Gaussian if none is given, in units of the span of the nodes."""
LEAST_WIDTH = 3e-4
"""The same at least, in units of the largest magnitude: a spectrum of one value has no span, and float32 no finer."""
PADDING = 5.0
"""How far the grid reaches beyond the outermost nodes, in standard deviations: 3e-7 of a node's weight is beyond it."""
LEAST_POINTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralDensity:
    """An estimated spectral density.

    Attributes:
        grid: evenly spaced points, float64 (grid_points,), on the host like all tensors here.
        density: mean density in the cell around each point, non-negative; its sum times the spacing is 1.
        density_stderr: its standard error over vectors (a broadening is not an error to it); None with one vector.
        nodes: Ritz values, (probes, m) in ascending order, m the most that any vector gave.
        weights: their weights, (probes, m), each row summing to 1; 0 where a vector gave fewer nodes.
        width: standard deviation of the broadening Gaussian.
        probes: random vectors.
        hvps: products with the operator that were spent.
    """

    grid: Tensor
    density: Tensor
    density_stderr: Tensor | None
    nodes: Tensor
    weights: Tensor
    width: float
    probes: int
    hvps: int


def spectral_density(
    matvec: Callable[[Tensor], Tensor],
    *,
    dimension: int,
    probes: int,
    steps: int,
    generator: torch.Generator | None = None,
    grid_points: int = 200,
    width: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> SpectralDensity:
    """Density of the eigenvalues of A by stochastic Lanczos quadrature.

    Args:
        matvec: v -> Av for v of shape (P,), unit norm; its argument must not be written to.
        dimension: P.
        probes: vectors of random signs.
        steps: Lanczos steps from each, fewer where the Krylov space closes; at most probes · steps products.
        generator: source of the vectors, on `device`; None takes `own_generator(0)`. The global one is never used.
        grid_points: points of the grid, which spans the nodes and their broadening.
        width: standard deviation of the broadening, in units of the eigenvalues; None takes 1 % of the span.
        dtype: of the basis, float32 or float64. Quadratures are computed in float64 on the host.
        device: where the vectors live.

    Raises:
        ValueError: no dimension, vector or step; too few points; a width that is not positive.
        FloatingPointError: a product with A is not finite.
    """
    _check(dimension=dimension, probes=probes, steps=steps, grid_points=grid_points, width=width)
    generator = generator or own_generator(0, device)
    quadratures = [
        _quadrature(matvec, dimension=dimension, steps=steps, generator=generator, dtype=dtype, device=device)
        for _ in range(probes)
    ]
    longest = max(len(nodes) for nodes, _ in quadratures)
    nodes = torch.stack([torch.cat([n, n[-1:].expand(longest - len(n))]) for n, _ in quadratures])
    weights = torch.stack([torch.nn.functional.pad(w, (0, longest - len(w))) for _, w in quadratures])
    low, high = float(nodes.min()), float(nodes.max())
    if width is None:
        width = max(SHARE_OF_SPAN * (high - low), LEAST_WIDTH * (max(abs(low), abs(high)) or 1.0))
    # One cell more on either side, so that an outermost node lies inside whatever the width.
    spacing = (high - low + 2 * PADDING * width) / (grid_points - 3)
    first = low - PADDING * width - spacing
    grid = first + spacing * torch.arange(grid_points, dtype=torch.float64)
    each = torch.stack([_broadened(grid, spacing, n, w, width) for n, w in zip(nodes, weights, strict=True)])
    return SpectralDensity(
        grid=grid,
        density=each.mean(0),
        density_stderr=each.std(0) / math.sqrt(probes) if probes > 1 else None,
        nodes=nodes,
        weights=weights,
        width=width,
        probes=probes,
        hvps=sum(len(n) for n, _ in quadratures),
    )


def _quadrature(
    matvec: Callable[[Tensor], Tensor],
    *,
    dimension: int,
    steps: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Gauss nodes and weights of one random vector's spectral measure, each (m,) in float64, nodes ascending."""
    space = Krylov(dimension=dimension, dtype=dtype, device=torch.device(device), generator=generator)
    space.begin(random_signs(dimension, generator, dtype, device), noise=0.0)
    closed = False
    while not closed and space.size < min(steps, dimension):
        closed = space.extend(matvec, 1.0)
    off = torch.tensor(space.coupling[:-1], dtype=torch.float64)
    projected = torch.diag(torch.tensor(space.diagonal, dtype=torch.float64))
    nodes, vectors = torch.linalg.eigh(projected + torch.diag(off, 1) + torch.diag(off, -1))
    weights = vectors[0].square()
    return nodes, weights / weights.sum()


def _broadened(grid: Tensor, spacing: float, nodes: Tensor, weights: Tensor, width: float) -> Tensor:
    """Mean over each cell of Σ w_i N(θ_i, width²), (grid_points,), with the little that lies outside given back."""
    edges = torch.cat([grid - spacing / 2, grid[-1:] + spacing / 2])
    below = torch.special.ndtr((edges[:, None] - nodes) / width) @ weights
    share = below.diff()
    density: Tensor = share / (share.sum() * spacing)
    return density


def _check(*, dimension: int, probes: int, steps: int, grid_points: int, width: float | None) -> None:
    for name, value, least in (
        ("dimension", dimension, 1),
        ("probes", probes, 1),
        ("steps", steps, 1),
        ("grid_points", grid_points, LEAST_POINTS),
    ):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}; got {value}")
    if width is not None and not 0 < width < math.inf:
        raise ValueError(f"width: expected a positive standard deviation, or None; got {width}")
