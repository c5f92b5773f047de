"""Gram matrices of a few sampled tokens: what ranks, similarities and neighbourhoods of a representation are read from.

    G_ij = x_i . x_j        centred: (x_i - m) . (x_j - m) with m the mean of the tokens that are used

Decisions:

- Sums are in float64, whatever the inputs are. A singular value is the square root of an eigenvalue of G, so a rounding
  of 1e-7 of the largest eigenvalue would stand as a singular value of 3e-4 of the largest, and n of these fill the
  spectrum of a collapsed representation (rank 1 would read as 1.09, rank 4 as 4.13, for 256 tokens). At these sizes it
  costs nothing: half a GFLOP for 256 tokens of 4,096 channels, on tensor cores where the GPU has them for float64.
- The mean is subtracted before the product. A massive activation shared by all tokens makes |m| a thousand times the
  spread, and its square would swallow it afterwards.
- A token with a NaN or infinite entry is set aside and flagged: its row and column are 0, and the rest is as if it
  were not there.

Left out: more than `MAX_TOKENS` tokens. Every statistic of a Gram matrix depends on how many there are, so captures
must sample equally many, and the eigen-solve grows with the cube.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lm_telemetry.kernels.dispatch import choose, launching_on

MAX_TOKENS = 512
"""Most tokens of one Gram matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gram:
    """A Gram matrix, and which tokens it is of.

    Attributes:
        matrix: (n, n) float64, symmetric; rows and columns of tokens that are not used are 0.
        used: (n,) bool, True for tokens that were kept and are finite.
    """

    matrix: torch.Tensor
    used: torch.Tensor


@torch.no_grad()
def gram(
    x: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    center: bool,
) -> Gram:
    """Gram matrix of the tokens of `x`, or of some of them. Nothing synchronises with the device.

    Args:
        x: (N, D), any floating dtype.
        rows: (n,) int64, the tokens to take; None takes all.
        keep: (n,) bool, False leaves a taken token out (padding, a repetition); None keeps all.
        center: whether the mean of the used tokens is subtracted.

    Raises:
        ValueError: a shape or dtype is not as above, or n is above `MAX_TOKENS`.
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"gram: expected x of shape (N, D) and floating dtype; got {tuple(x.shape)}, {x.dtype}")
    n = len(x) if rows is None else len(rows)
    if n > MAX_TOKENS:
        raise ValueError(f"gram: expected at most {MAX_TOKENS} tokens; got {n}: sample fewer with `rows`")
    if keep is not None and keep.shape != (n,):
        raise ValueError(f"gram: expected keep of shape ({n},), one flag a taken token; got {tuple(keep.shape)}")
    if n and choose(x).path == "triton":
        from lm_telemetry.kernels.gram_kernel import launch

        with launching_on(x):
            return Gram(**launch(x, rows, keep, center=center))
    return _twin(x if rows is None else x.index_select(0, rows), keep, center=center)


def _twin(tokens: torch.Tensor, keep: torch.Tensor | None, *, center: bool) -> Gram:
    used = tokens.abs().amax(1) < torch.inf  # NaN is not below, either
    if keep is not None:
        used &= keep
    tokens = torch.where(used[:, None], tokens, 0).double()
    if center:
        mean = tokens.sum(0) / used.sum().clamp(min=1)
        tokens = torch.where(used[:, None], tokens - mean, 0)
    lower = (tokens @ tokens.T).tril()  # a matrix product need not be symmetric to the last bit
    return Gram(matrix=lower + lower.tril(-1).T, used=used)
