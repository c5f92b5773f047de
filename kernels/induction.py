"""Where an induction head would look: the key just after the previous occurrence of the query's token (2209.11895).

Found by sorting tokens, so that neither memory nor time grows with the square of the length.
"""

from __future__ import annotations

import torch


@torch.no_grad()
def induction_keys(
    tokens: torch.Tensor,
    own: torch.Tensor,
    *,
    segments: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """The induction key of sampled queries: j + 1, where j < a is the last key with the token of the query's own key a.

    There is none where the token has not occurred before in its sequence, and none where the previous occurrence is the
    key just before: the key after it is then the query's own, and to look at oneself is not to look back. O(S) memory
    and O(S log S) time in each sequence; nothing synchronises with the device.

    Args:
        tokens: (B, S) integers, one token a key.
        own: (1 or B, n) int64, the key of each query's own token, as in `RowGeometry.own`.
        segments: (1 or B, S) integers, equal within each of the sequences packed into a row; None where it holds one.
        real: (B, S) bool, False at padding, which never occurs and has no induction key; None where there is none.

    Returns:
        (B, n) int64, -1 where there is none.

    Raises:
        ValueError: tokens are not two-dimensional integers.
    """
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise ValueError(f"induction_keys: expected tokens (B, S), integers; got {tuple(tokens.shape)}, {tokens.dtype}")
    batch, length = tokens.shape
    if real is not None:
        tokens = 2 * tokens.long() + ~real  # padding is equal only to padding
    tokens, order = tokens.sort(dim=1, stable=True)
    before = torch.where(tokens[:, 1:] == tokens[:, :-1], order[:, :-1], -1)
    before = torch.nn.functional.pad(before, (1, 0), value=-1)
    previous = torch.empty_like(order).scatter_(1, order, before)

    own = own.expand(batch, -1)
    found = previous.gather(1, own)
    exists = (found >= 0) & (found + 1 < own)
    if segments is not None:
        # A previous occurrence in another segment lies before all of the query's own.
        segments = segments.expand(batch, length)
        exists &= segments.gather(1, found.clamp(min=0)) == segments.gather(1, own)
    if real is not None:
        exists &= real.gather(1, own)
    return torch.where(exists, found + 1, -1)
