"""One forward pass as the taps see it: which tokens are real, which of them are sampled, and how far it has come.

Sampling is deterministic (evenly spaced over the real tokens), so that it takes nothing from a random stream and two
runs sample the same positions. Padding, as an attention mask tells it, is never sampled. Nothing here synchronises with
the device: with a mask, positions come from a cumulative sum and a search, and a place that would be drawn twice is
marked not to be kept.

The mask of a batch speaks of text: of the queries and of what was cached before them. The tokens of a vision or audio
tower are not its subject, even where their number happens to fit. `generate` with a static cache replaces the mask by
four-dimensional ones, one for each kind of layer; there a token is real if it may see any key.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lm_telemetry.kernels.attention_rows_geometry import hiding_bound

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")


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
    _made: dict[tuple[Any, ...], tuple[Any, Any]] = field(default_factory=dict)

    def mask(self, stack: str, batch_size: int, length: int) -> Tensor | None:
        """Bool `(B, S)`, True at real tokens of the last `length` positions; None if the batch has no such mask."""
        given = self.given_mask(stack)
        if given is None:
            return None
        if given.dim() == 4:
            return _sees_any(given) if given.shape[0] == batch_size and given.shape[2] == length else None
        if given.numel() == batch_size * length:  # also where the model has flattened its tokens
            return given.reshape(batch_size, length) != 0
        if given.shape[0] != batch_size or given.shape[1] < length or not _caches(stack):
            return None
        return given[:, -length:] != 0

    def given_mask(self, stack: str) -> Tensor | None:
        """The batch's mask for a stack, two- or four-dimensional; of several, the one that hides least."""
        if _is_of_another_sense(stack):
            return None
        given = self.batch.get(self._name("attention_mask", stack))
        if isinstance(given, dict):  # one for each kind of layer
            masks = [m for m in given.values() if isinstance(m, Tensor)]
            given = given.get("full_attention", max(masks, key=lambda m: m.shape[-1], default=None))
        if not isinstance(given, Tensor):
            return None
        rows_of_keys = given.dim() == 4 and (given.dtype == torch.bool or given.is_floating_point())
        return given if given.dim() == 2 or rows_of_keys else None

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

    def token_ids(self, stack: str, batch_size: int, n_keys: int) -> Tensor | None:
        """Ids `(B, S)` of the tokens that a stack's `n_keys` keys come from; None where the batch has not all."""
        if _is_of_another_sense(stack):
            return None
        given = self.batch.get(self._name("input_ids", stack))
        return given if isinstance(given, Tensor) and given.shape == (batch_size, n_keys) else None

    def n_tokens(self, stack: str) -> int | Tensor | None:
        """How many tokens a stack has seen, cached ones and those of this pass; None where no cache tells.

        Right once the first layer has put its keys into the cache. A static cache counts on the device, in a tensor
        without axes.
        """
        count = getattr(self.batch.get("past_key_values"), "get_seq_length", None)
        return count() if callable(count) and _caches(stack) else None

    def first_token(self, stack: str, batch_size: int, n_keys: int) -> Tensor | None:
        """Index among `n_keys` keys of each sequence's first real token, int64 `(1 or B,)`; None for 0.

        Negative where the token has left the keys, as from a cache as long as a sliding window. To be asked while
        attention is computed, see `n_tokens`.
        """
        given, seen = self.given_mask(stack), self.n_tokens(stack)
        if given is not None and given.shape[0] == batch_size and given.dim() == 4 and given.shape[2] == n_keys:
            return _first(_sees_any(given))
        if given is None or given.dim() == 4 or (isinstance(seen, int) and seen > given.shape[1]):
            return self._first_by_count(given, seen, n_keys)
        if given.numel() == batch_size * n_keys:
            return _first(given.reshape(batch_size, n_keys) != 0)
        if given.shape[0] != batch_size or not _caches(stack):
            return None
        return _first(given != 0) - _beyond(given.shape[1], n_keys)

    def _first_by_count(self, mask: Tensor | None, seen: int | Tensor | None, n_keys: int) -> Tensor | None:
        """The same where there is no mask, or one that speaks of a window: positions count the real tokens."""
        positions = self.batch.get("position_ids")
        if seen is None or (mask is None and isinstance(seen, int) and seen <= n_keys):
            return None
        if isinstance(positions, Tensor) and positions.dim() == 2:
            first = seen - 1 - positions[:, -1]
        elif mask is None:
            device = next(value.device for value in self.batch.values() if isinstance(value, Tensor))
            first = torch.zeros(1, dtype=torch.int64, device=device)
        else:
            first = _first(sees(mask[:, 0, -1]) if mask.dim() == 4 else mask != 0)
        return first - _beyond(seen, n_keys)

    def once(self, name: tuple[Any, ...], parts: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What `make` gives, made once a pass for a name and the same objects `parts`."""
        key = (*name, *map(id, parts))
        if key not in self._made:
            self._made[key] = (parts, make())  # holding the parts keeps their ids from being used again
        made: T = self._made[key][1]
        return made

    def _name(self, what: str, stack: str) -> str:
        return f"decoder_{what}" if self.is_encoder_decoder and stack == "decoder" else what


def sees(mask: Tensor) -> Tensor:
    """Bool of the shape of a bool or additive mask: which keys may be attended to."""
    return mask if mask.dtype == torch.bool else mask > hiding_bound(mask.dtype)


def _sees_any(mask: Tensor) -> Tensor:
    """Bool `(B, Sq)`: which queries of a mask `(B, H, Sq, Sk)` see any key. Nothing of its size is made."""
    rows = mask[:, 0]
    return rows.any(-1) if rows.dtype == torch.bool else sees(rows.amax(-1))


def _first(flags: Tensor) -> Tensor:
    return flags.to(torch.int8).argmax(dim=-1)


def _beyond(n_tokens: int | Tensor | None, n_keys: int) -> int | Tensor:
    """How many of the tokens have no key any more."""
    if isinstance(n_tokens, Tensor):
        return (n_tokens - n_keys).clamp(min=0)
    return max(n_tokens - n_keys, 0) if n_tokens is not None else 0


def _caches(stack: str) -> bool:
    """Whether a stack may keep keys between passes."""
    return "encoder" not in stack and not _is_of_another_sense(stack)


def _is_of_another_sense(stack: str) -> bool:
    return any(sense in stack for sense in ("vision", "visual", "audio"))


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
