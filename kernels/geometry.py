"""The geometry of a representation, read from the Gram matrix of its tokens alone (see `gram`).

What a rotation of the channels does not change is in the Gram matrix, and that is all that is asked here: how many
directions the tokens fill, whether they all point one way, and whether two representations of the same tokens (of two
layers, two steps, two models) arrange them alike.

Every function takes the float64 matrix of the tokens that are used, on any device; `centred` says that the mean was
subtracted. What does not exist (the rank of nothing, a similarity with a constant) is None.

Left out: null distributions. Of n unrelated tokens the expected debiased CKA is 0 and the expected overlap k/(n - 1),
and only what stands out of these means anything (arXiv 2602.14486).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

LEAST_TOKENS = 4
"""Fewest tokens of a debiased similarity: n - 3 divides in it."""

_TIE = 1e-12
"""What a place further on in the sequence takes off a cosine: far above its rounding, far below what means anything."""


def singular_values(gram: Tensor) -> Tensor:
    """Singular values of the (n, D) tokens, largest first, those that are 0 to rounding left out; (r,) float64."""
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram).flip(0)
    noise = len(gram) * torch.finfo(gram.dtype).eps * eigenvalues[:1].clamp(min=0)
    return eigenvalues[eigenvalues > noise].sqrt()


def participation_ratio(centred: Tensor) -> float | None:
    """tr(C)^2 / tr(C^2) of the token covariance C: r if r directions have equal variance and the rest none.

    C and the centred Gram matrix have the same spectrum, so this is tr(G)^2 / |G|_F^2. Of n Gaussian tokens of D equal
    and independent channels it is about (n - 1) D / (n + D), not D.
    """
    spread = float(centred.square().sum())
    return float(centred.trace()) ** 2 / spread if spread > 0 else None


def effective_rank(singular: Tensor) -> float | None:
    """exp(-sum p log p) with p = sigma / sum sigma (Roy & Vetterli 2007); RankMe (2210.02885) if not centred."""
    if not len(singular):
        return None
    p = singular / singular.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))


def stable_rank(singular: Tensor) -> float | None:
    """|X|_F^2 / |X|_2^2 = sum sigma^2 / max sigma^2."""
    return float((singular / singular[0]).square().sum()) if len(singular) else None


def anisotropy(gram: Tensor) -> float | None:
    """Mean cosine similarity of distinct tokens (1909.00512): (|sum x^|^2 - n) / (n (n - 1)); tokens of 0 left out."""
    cosines, n = _cosines(gram), int((gram.diagonal() > 0).sum())
    return (float(cosines.sum()) - n) / (n * (n - 1)) if n > 1 else None


def u_centred(gram: Tensor) -> Tensor:
    """The U-centred Gram matrix (Szekely & Rizzo 2014), whose off-diagonal entries are free of what a token adds alone.

    With r_i = sum_(k != i) G_ik, s = sum r_i and n tokens,

        A_ij = G_ij - (r_i + r_j) / (n - 2) + s / ((n - 1) (n - 2)),  A_ii = 0.

    sum A B / (n (n - 3)) is the unbiased HSIC of the two representations. Centring the tokens changes nothing.

    Raises:
        ValueError: there are fewer than `LEAST_TOKENS` tokens.
    """
    n = len(gram)
    if n < LEAST_TOKENS:
        raise ValueError(f"u_centred: expected at least {LEAST_TOKENS} tokens; got {n}")
    off = gram - torch.diag(gram.diagonal())
    r = off.sum(1)
    centred = off - (r[:, None] + r[None, :]) / (n - 2) + r.sum() / ((n - 1) * (n - 2))
    return centred.fill_diagonal_(0)


def sketch(gram: Tensor) -> Tensor:
    """The U-centred Gram matrix above its diagonal, which is 0, row by row; (n (n - 1) / 2,) float32.

    The cosine of the angle between two sketches is the debiased CKA of the two representations.
    """
    n = len(gram)
    i, j = torch.triu_indices(n, n, offset=1, device=gram.device)
    return u_centred(gram)[i, j].float()


def debiased_cka(a: Tensor, b: Tensor) -> float | None:
    """Debiased linear CKA (1905.00414) of two sketches of the same tokens, in [-1, 1].

    It is 1 for representations that are equal up to rotation, scale and a common vector. It is the unbiased HSIC
    over the geometric mean of each with itself. Not debiased, unrelated Gaussian ones would come to about D / (n + D).
    """
    a, b = a.double(), b.double()
    norm = float(a.norm()) * float(b.norm())
    return float(a @ b) / norm if norm > 0 else None


def nearest_neighbours(gram: Tensor, k: int) -> Tensor:
    """The k nearest of each token's fellows by cosine, (n, min(k, n - 1)) int32 indices of tokens, nearest first.

    Of tied ones (the same word twice, as the embedding has it) the first in the sequence is nearer, so that a tie is
    not settled by rounding, each time in another way.
    """
    n = len(gram)
    place = torch.arange(n, dtype=gram.dtype, device=gram.device)
    nearness = (_cosines(gram) - _TIE * place).fill_diagonal_(-torch.inf)
    return nearness.topk(min(k, max(n - 1, 0)), dim=1).indices.int()


def neighbour_overlap(a: Tensor, b: Tensor) -> float | None:
    """Mutual k-NN (2405.07987): mean share of a token's neighbours in `a` (n, k) that are in `b` (n, k), too."""
    shared = (a[:, :, None] == b[:, None, :]).any(-1)
    return float(shared.double().mean()) if shared.numel() else None


def _cosines(gram: Tensor) -> Tensor:
    """(n, n) cosine similarities; 0 of and with tokens of length 0."""
    length = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(length > 0, 1 / length, 0)
    return gram * inverse[:, None] * inverse[None, :]
