"""The massive activation: the entry of largest magnitude, where it stands, and how far it is from the ordinary.

A few entries of the residual stream of a trained language model are thousands of times larger than the median, always
in the same channels and mostly at the first token; attention sinks hang on them (arXiv 2402.17762).
"""

from __future__ import annotations

import torch

COLUMNS = ("magnitude", "value", "token", "channel", "median")
"""magnitude: -1 if no real token has a finite entry; value: with its sign; median: of magnitudes, NaN if none."""


@torch.no_grad()
def massive_activation(
    x: torch.Tensor, *, rows: torch.Tensor, keep: torch.Tensor, real: torch.Tensor | None = None
) -> torch.Tensor:
    """The largest |x| among the finite entries of real tokens; nothing synchronises with the device.

    Args:
        x: (N, D), any floating dtype.
        rows: (n,) int64, tokens whose finite entries the median magnitude is taken over (the lower one of two).
        keep: (n,) bool, False leaves one of these out (a repetition).
        real: (N,) bool, False for padding; None if all are real.

    Returns:
        (5,) float64, `COLUMNS`. Of equal ones any may be named.
    """
    magnitude = x.abs()
    magnitude = torch.where(magnitude < torch.inf, magnitude, -1)  # NaN is not below, either
    largest = magnitude.amax(1)
    if real is not None:
        largest = torch.where(real, largest, -1)
    token = largest.argmax()
    channel = magnitude.index_select(0, token[None])[0].argmax()
    value = x.index_select(0, token[None])[0].index_select(0, channel[None])[0]
    sampled = magnitude.index_select(0, rows).float()
    median = torch.where(keep[:, None] & (sampled >= 0), sampled, torch.nan).nanmedian()
    return torch.stack([part.double() for part in (largest.amax(), value, token, channel, median)])
