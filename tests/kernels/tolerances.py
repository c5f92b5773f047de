"""How far a kernel or twin may be from the float64 oracle, and why. One table for all of `tests/kernels`.

Inputs are the same on both sides (the oracle converts them exactly), so only the arithmetic differs.
"""

from __future__ import annotations

EPS = 2.0**-23
"""Spacing of float32 at 1."""

MOMENTS = {
    # column: (tolerance, what it is relative to)
    "count": (0.0, "itself"),  # counted, not computed
    "nonfinite": (0.0, "itself"),
    "zeros": (0.0, "itself"),
    "outliers": (0.0, "itself"),
    "absmax": (0.0, "itself"),  # one of the inputs
    "mean": (8 * EPS, "rms"),  # a float32 sum of one token, rounded a few times; tokens are merged in float64
    "m2": (16 * EPS, "itself"),  # positive terms
    "m3": (32 * EPS, "sqrt(m2 m4)"),  # signed terms; their magnitudes sum to at most that (Cauchy-Schwarz)
    "m4": (32 * EPS, "itself"),
}

OFFSET = 8e-6
"""Relative error of mean and deviation at mean 1000, deviation 1, where E[x^2] - E[x]^2 is wrong by a third."""

ROW = 5e-7
"""Absolute error of a mean mass or entropy at logits of ordinary size: four float32 roundings."""


def row_tolerance(magnitude: float) -> float:
    """For means of masses and entropies over rows; others are compared after division by their largest value.

    `magnitude` is the largest sum |q_d k_d| of a logit: float32 knows the logit, and log p, to EPS of that.
    """
    return max(ROW, EPS * magnitude)


def logit_tolerance(magnitude: float, terms: int) -> float:
    """For a logit, and for a log-sum-exp, which moves with the largest.

    Roundings of a float32 sum of `terms` products add up as a random walk, half an EPS each.
    """
    return max(ROW, EPS * magnitude * terms**0.5 / 2)
