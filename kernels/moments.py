"""Moments of activations: one pass over the entries, merged exactly over tokens, blocks and devices.

    mean = (1/n) sum x        m_k = sum (x - mean)^k, k = 2, 3, 4

Decisions:

- Never E[x^2] - E[x]^2: at mean 1000 and deviation 1 that is wrong by a third in float32. Each token (or tile) keeps
  sums of powers about its own centre c, and these are shifted to the common mean in float64 by the binomial formulas,
  which are exact (Chan, Golub & LeVeque 1983; Pebay 2008).
- Non-finite entries are counted and left out, so one NaN does not hide what the rest of a layer does.
- An outlier is an entry beyond `OUTLIER_RMS` times the RMS of its own token (2208.07339 uses a fixed 6; activations
  are not normalised alike in all models).
- Results are raw sums (`RAW_COLUMNS`). What may not exist (the kurtosis of a constant) is decided on the host, by
  `finish`, which masks it instead of inventing a number.

Left out: quantiles, and anything per channel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lm_telemetry.kernels.dispatch import choose, launching_on

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

RAW_COLUMNS = ("count", "nonfinite", "mean", "m2", "m3", "m4", "absmax", "zeros", "outliers")
"""count: finite entries, over which all but `nonfinite` are; m2..m4: sums of powers of deviations from the mean."""

OUTLIER_RMS = 6.0
"""How many times the RMS of its token an entry must exceed to be an outlier."""

MAX_WIDTH = 8_192
"""Widest token the kernel takes: a token's RMS is needed for its outliers, so a program holds a token in registers, and
twice this width spills some on Hopper. Wider ones go to the twin."""

_BLOCK = 131_072
"""Entries the twin works on at a time: 512 KiB in float32, so that a block and what is made of it stay in L2 cache."""

_SMALLEST = 1e-6
"""Sites whose largest entry is below this are summed in float64: a fourth power of less is no normal float32."""


@torch.no_grad()
def moments(
    x: torch.Tensor,
    *,
    out: torch.Tensor,
    rows: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Raw moments of the entries of `x`, or of some of its rows, written into `out`.

    On the Triton path nothing synchronises with the device.

    Args:
        x: (N, D), any floating dtype, entries of a row adjacent; rows may lie apart.
        out: (9,) float64 on the same device, the row of a buffer; receives `RAW_COLUMNS`.
        rows: (n,) int64, the rows to take; None takes all.
        keep: (n,) bool, False leaves a taken row out (padding); None keeps all.

    Returns:
        `out`.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"moments: expected x of shape (N, D) and floating dtype; got {tuple(x.shape)}, {x.dtype}")
    if out.shape != (len(RAW_COLUMNS),) or out.dtype != torch.float64:
        raise ValueError(f"moments: expected out of shape (9,) and float64; got {tuple(out.shape)}, {out.dtype}")
    n = len(x) if rows is None else len(rows)
    if keep is not None and keep.shape != (n,):
        raise ValueError(f"moments: expected keep of shape ({n},), one flag a taken row; got {tuple(keep.shape)}")
    if choose(x, refusal=_refusal(x)).path == "triton":
        from lm_telemetry.kernels.moments_kernel import launch

        with launching_on(x):
            return launch(x, out, rows, keep, OUTLIER_RMS)
    if rows is not None:
        x = x.index_select(0, rows)
    if x.device.type == "cpu":
        return out.copy_(stacked_moments((x if keep is None else x[keep])[None])[0])
    kept = torch.ones(n, dtype=torch.bool, device=x.device) if keep is None else keep
    return out.copy_(_masked_moments(x[None], kept[None])[0])


@torch.no_grad()
def stacked_moments(x: torch.Tensor) -> torch.Tensor:
    """Raw moments of each of G stacked sites; the vectorised twin.

    Sums within a token are in float32, about the token's mean; tokens are merged in float64. A site that float32 cannot
    hold (non-finite entries, or powers beyond its range) is summed again in float64 with those entries left out.

    Args:
        x: (G, N, D), any floating dtype: G sites of N tokens of D channels.

    Returns:
        (G, 9) float64, `RAW_COLUMNS`; a site without finite entries is zero but for `nonfinite`.

    Raises:
        ValueError: `x` has another number of axes, or no floating dtype.
    """
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"moments: expected a stack of shape (G, N, D), floating; got {tuple(x.shape)}, {x.dtype}")
    everything = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if x.device.type != "cpu" or x.dtype == torch.float64 or x.numel() == 0:
        return _masked_moments(x, everything)
    raw = _unmasked_moments(x)
    unsure = ~(raw.isfinite().all(1) & ((raw[:, 6] >= _SMALLEST) | (raw[:, 6] == 0)))
    if unsure.any():
        raw[unsure] = _masked_moments(x[unsure], everything[unsure])
    return raw


def finish(raw: NDArray[np.float64]) -> dict[str, np.ma.MaskedArray[Any, Any]]:
    """The columns of the `layers` table from raw moments; numpy only.

    Args:
        raw: (..., 9) float64, `RAW_COLUMNS`.

    Returns:
        mean, std, rms, absmax, kurtosis, zero_fraction, outlier_fraction, nonfinite, each (...). Masked where there
        was nothing to measure: all where no entry was finite, kurtosis where the variance is 0, nonfinite where no
        entry was seen at all.
    """
    count, nonfinite, mean, m2, _, m4, absmax, zeros, outliers = np.moveaxis(np.asarray(raw, np.float64), -1, 0)
    empty = count == 0
    n = np.where(empty, 1.0, count)
    variance = m2 / n
    constant = empty | (variance == 0)
    squared = np.where(constant, 1.0, variance) ** 2
    return {
        "mean": np.ma.array(mean, mask=empty),
        "std": np.ma.array(np.sqrt(variance), mask=empty),
        "rms": np.ma.array(np.sqrt(variance + mean**2), mask=empty),
        "absmax": np.ma.array(absmax, mask=empty),
        "kurtosis": np.ma.array(m4 / n / squared, mask=constant),
        "zero_fraction": np.ma.array(zeros / n, mask=empty),
        "outlier_fraction": np.ma.array(outliers / n, mask=empty),
        "nonfinite": np.ma.array(nonfinite.astype(np.int64), mask=empty & (nonfinite == 0)),
    }


def _refusal(x: torch.Tensor) -> str | None:
    if x.shape[1] > MAX_WIDTH:
        return f"tokens of {x.shape[1]} entries are wider than the kernel's {MAX_WIDTH}"
    if x.shape[1] > 1 and x.stride(1) != 1:
        return "the entries of a row are not adjacent"
    return None


def _unmasked_moments(x: torch.Tensor) -> torch.Tensor:
    """(G, 9) of a stack (G, N, D) whose entries all count.

    Comparisons are written into float buffers, since torch's CPU kernels produce and count booleans several times more
    slowly than they compare and sum floats.
    """
    G, N, D = x.shape
    step = max(1, _BLOCK // D)
    deviations, powers = x.new_empty(2, min(step, G * N), D, dtype=torch.float32)
    per_token = x.new_empty(8, G * N, dtype=torch.float32)
    for here, into in zip(torch.split(x.reshape(G * N, D), step), torch.split(per_token, step, 1), strict=True):
        centre, s1, s2, s3, s4, zeros, outliers, largest = into
        here = here.float()  # noqa: PLW2901  -- the same entries, in the dtype of the sums
        deviation, power = deviations[: len(here)], powers[: len(here)]
        torch.mean(here, -1, out=centre)
        torch.sub(here, centre[:, None], out=deviation)
        torch.sum(deviation, -1, out=s1)
        torch.mul(deviation, deviation, out=power)
        torch.sum(power, -1, out=s2)
        torch.sum(deviation.mul_(power), -1, out=s3)
        torch.sum(power.mul_(power), -1, out=s4)
        torch.sum(torch.eq(here, 0, out=power), -1, out=zeros)
        magnitude = torch.abs(here, out=deviation)
        torch.amax(magnitude, -1, out=largest)
        mean_square = (2 * centre * s1).add_(s2).div_(D).addcmul_(centre, centre)
        bound = mean_square.sqrt_().mul_(OUTLIER_RMS)
        beyond = largest > bound  # few tokens have an outlier, and the others need not be searched
        outliers.zero_()[beyond] = (magnitude[beyond] > bound[beyond, None]).sum(-1, dtype=torch.float32)
    centre, s1, s2, s3, s4, zeros, outliers, largest = per_token.double().view(8, G, N)
    mean, m2, m3, m4 = _merge(torch.full_like(s1, D), centre, (s1, s2, s3, s4))
    count = torch.full_like(mean, N * D)
    nothing = torch.zeros_like(mean)
    return torch.stack((count, nothing, mean, m2, m3, m4, largest.amax(1), zeros.sum(1), outliers.sum(1)), -1)


def _masked_moments(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """(G, 9) of the finite entries of the kept tokens of a stack (G, N, D), kept (G, N); in float64, no branches."""
    used = kept[..., None].expand_as(x)
    finite = used & x.isfinite()
    count = finite.sum(-1, dtype=torch.float64)
    entries = torch.where(finite, x, 0).double()
    per_token = count.clamp(min=1)
    centre = entries.sum(-1) / per_token
    deviation = torch.where(finite, entries - centre[..., None], 0)
    powers = [deviation, deviation**2, deviation**3, deviation**4]
    mean, m2, m3, m4 = _merge(count, centre, [power.sum(-1) for power in powers])
    magnitude = entries.abs()
    bound = OUTLIER_RMS * (entries.square().sum(-1) / per_token).sqrt()
    return torch.stack(
        (
            count.sum(1),
            (used & ~finite).sum((1, 2)).double(),
            mean,
            m2,
            m3,
            m4,
            _largest(magnitude.flatten(1)),
            (finite & (entries == 0)).sum((1, 2)).double(),
            (magnitude > bound[..., None]).sum((1, 2)).double(),
        ),
        dim=-1,
    )


def _largest(magnitude: torch.Tensor) -> torch.Tensor:
    """Largest of each row, 0 of an empty one."""
    return magnitude.amax(1) if magnitude.shape[1] else magnitude.new_zeros(len(magnitude))


def _merge(
    count: torch.Tensor, centre: torch.Tensor, sums: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and m2..m4 over the last axis, from float64 sums s1..s4 of powers of deviations from each token's centre.

    With d = mean - centre, sum (x - mean)^k is the binomial sum over the token's (x - centre) - d.
    """
    s1, s2, s3, s4 = sums
    total = count.sum(-1).clamp(min=1)
    mean = (count * centre + s1).sum(-1) / total
    d = mean[..., None] - centre
    m2 = s2 - 2 * d * s1 + count * d**2
    m3 = s3 - 3 * d * s2 + 3 * d**2 * s1 - count * d**3
    m4 = s4 - 4 * d * s3 + 6 * d**2 * s2 - 4 * d**3 * s1 + count * d**4
    return mean, m2.sum(-1), m3.sum(-1), m4.sum(-1)
