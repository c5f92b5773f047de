"""One forward pass as the taps see it: which tokens are real, and which of them are sampled.

Sampling is deterministic (evenly spaced over the real tokens), so that it takes nothing from a random stream and two
runs sample the same positions. Padding, as a two-dimensional attention mask tells it, is never sampled. Nothing here
synchronises with the device: with a mask, positions come from a cumulative sum and a search, and a place that would be
drawn twice is marked not to be kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Sampled positions.

    Attributes:
        index: int64, `(n,)` for tokens and for queries that are the same in every sequence, else `(B, n)`.
        keep: bool of the shape of `index`, False where a position repeats another; None if all are kept.
    """

    index: Tensor
    keep: Tensor | None


@dataclass(slots=True)
class ForwardPass:
    """The arguments of one forward pass of the model, and samples drawn from it."""

    batch: Mapping[str, Any]
    is_encoder_decoder: bool = False
    _samples: dict[tuple[Any, ...], Sample] = field(default_factory=dict)

    def mask(self, stack: str, batch_size: int, length: int) -> Tensor | None:
        """Bool `(B, S)`, True at real tokens of the last `length` positions; None if the batch has no such mask."""
        name = "decoder_attention_mask" if self.is_encoder_decoder and stack == "decoder" else "attention_mask"
        given = self.batch.get(name)
        if not isinstance(given, Tensor) or given.dim() != 2:
            return None
        if given.numel() == batch_size * length:  # also where the model has flattened its tokens
            return given.reshape(batch_size, length) != 0
        if given.shape[0] != batch_size or given.shape[1] < length:
            return None
        return given[:, -length:] != 0

    def tokens(self, stack: str, batch_size: int, length: int, wanted: int | None, device: torch.device) -> Sample:
        """At most `wanted` token positions (all of them if None), as indices into the flattened `B * S` tokens."""
        key = ("tokens", stack, batch_size, length, wanted)
        if key not in self._samples:
            total = batch_size * length
            n = total if wanted is None else min(wanted, total)
            mask = self.mask(stack, batch_size, length)
            if mask is None:
                self._samples[key] = Sample(index=_spaced(n, total, device), keep=None)
            else:
                self._samples[key] = _spaced_among(mask.reshape(1, total), n).flat()
        return self._samples[key]

    def queries(self, stack: str, batch_size: int, length: int, wanted: int | None, device: torch.device) -> Sample:
        """At most `wanted` query positions in each sequence, the last one always among them."""
        key = ("queries", stack, batch_size, length, wanted)
        if key not in self._samples:
            n = length if wanted is None else min(wanted, length)
            mask = self.mask(stack, batch_size, length)
            if mask is None:
                last = torch.arange(1, n + 1, device=device)
                self._samples[key] = Sample(index=last * length // n - 1, keep=None)
            else:
                found = _spaced_among(mask, n, to_the_end=True)
                self._samples[key] = Sample(index=found.index, keep=found.keep)
        return self._samples[key]

    def first_token(self, stack: str, batch_size: int, length: int) -> Tensor | None:
        """Index of the first real token of each sequence, int64 `(B,)`; None where no mask says there is padding."""
        mask = self.mask(stack, batch_size, length)
        return None if mask is None else mask.to(torch.int8).argmax(dim=1)


@dataclass(frozen=True, slots=True)
class _Found:
    index: Tensor
    keep: Tensor

    def flat(self) -> Sample:
        index, keep = self.index.reshape(-1), self.keep.reshape(-1)
        if index.device.type == "cpu":  # on the host the choice can be made at once, and less is computed
            return Sample(index=index[keep], keep=None)
        return Sample(index=index, keep=keep)


def _spaced(n: int, total: int, device: torch.device) -> Tensor:
    return torch.arange(n, device=device) * total // max(n, 1)


def _spaced_among(mask: Tensor, n: int, *, to_the_end: bool = False) -> _Found:
    """In each row of `mask` `(R, T)`, `n` evenly spaced places among the True ones; doubles are not kept."""
    ranks = mask.cumsum(dim=1)
    total = ranks[:, -1:]
    k = torch.arange(n, device=mask.device)[None, :]
    wanted = (k + 1) * total // n if to_the_end else k * total // n + 1  # 1-based ranks among the real ones
    keep = (wanted >= 1) & (wanted <= total)
    keep[:, 1:] &= wanted[:, 1:] != wanted[:, :-1]
    index = torch.searchsorted(ranks, wanted.clamp(min=1).contiguous()).clamp_(max=mask.shape[1] - 1)
    return _Found(index, keep)
