"""The torch twin of the attention-row kernel: a block of rows at once, few passes over the scores.

Memory is that of a block of scores, so it grows with the number of keys and not with its square, however many rows.

Decisions:

- One batched product over a sequence's key-value heads, which lie side by side in a model's projections and need no
  copy; the query heads of a group are rows of it, so grouped keys are not expanded.
- What is linear in the probabilities (their sum, the mean distance, the local and the previous key's mass) is one small
  batched product with weights that the geometry holds.
- Hidden keys get a large negative logit, not -inf, so that nothing needs a masked copy. Where a visible logit turns out
  not to be finite the block is computed again with those rows set aside; on a GPU, where looking would synchronise,
  that second way is always taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lm_telemetry.kernels.attention_rows_geometry import HIDDEN, RowGeometry, rows_of

if TYPE_CHECKING:
    from collections.abc import Callable

_BLOCK = 1 << 18
"""Scores worked on at a time: 1 MiB in float32."""

_ROWS = 32
"""But at least so many rows of all heads of a sequence, so that the usual sample is one block and what follows from its
geometry is kept from layer to layer."""

_FLOOR = -80.0
"""Least s - max. A hidden key so keeps e^-80 = 2e-35 of the largest probability, which is lost beside anything; below
-87 the vectorised exp of CPUs is a hundred times slower."""


def row_statistics(
    query: torch.Tensor,
    key: torch.Tensor,
    geometry: RowGeometry,
    *,
    scale: float,
    bias: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    induction_key: torch.Tensor | None,
) -> torch.Tensor:
    """(B, Hq, n, 14) float32: `RAW_COLUMNS` of every sampled row; rows that do not count are 0, their max_logit -inf.

    Arguments as in `attention_rows.attention_rows_at`, checked there.
    """

    def reduce(scores: torch.Tensor, part: RowGeometry, block: _Block) -> torch.Tensor:
        slot = None if sinks is None else sinks.float()[:, None]
        target = None if induction_key is None else _of(induction_key, block.sequences)[:, block.rows]
        return _statistics(scores, part, block.sequences, slot, target)

    return _in_blocks(query, key, geometry, reduce, scale=scale, bias=bias, softcap=softcap)


def row_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    geometry: RowGeometry,
    *,
    scale: float,
    bias: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """(B, Hq, n) float32: log-sum-exp of every row, NaN where it is broken and -inf where no key is seen."""

    def reduce(scores: torch.Tensor, part: RowGeometry, block: _Block) -> torch.Tensor:
        scores, largest, broken = _masked(scores, part, block.sequences)
        lse = largest + scores.sub_(largest[..., None]).clamp_(min=_FLOOR).exp_().sum(-1).log()
        if sinks is not None:
            lse = torch.logaddexp(lse, torch.where(sinks.isfinite(), sinks, torch.nan).float()[:, None])
        if broken is not None:
            lse = torch.where(broken, torch.nan, lse)
        return torch.where(_of(part.n_visible, block.sequences) > 0, lse, -torch.inf)

    return _in_blocks(query, key, geometry, reduce, scale=scale, bias=bias, softcap=softcap)


@dataclass(frozen=True, slots=True)
class _Block:
    """Sequences and rows that are worked on at a time."""

    sequences: slice
    rows: slice


def _in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    geometry: RowGeometry,
    reduce: Callable[[torch.Tensor, RowGeometry, _Block], torch.Tensor],
    *,
    scale: float,
    bias: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """What `reduce(scores, geometry, block)` makes of the logits (B, Hq, n, Sk), put together along B and n."""
    (batch, heads), n = query.shape[:2], geometry.positions.shape[1]
    a_row = max(1, heads * geometry.n_keys)
    n_rows = min(n, max(_ROWS, _BLOCK // a_row))
    n_sequences = max(1, _BLOCK // (a_row * n_rows))
    done = []
    for r in range(0, n, n_rows):
        rows = slice(r, r + n_rows)
        part = geometry if n_rows == n else geometry.part(rows)
        for b in range(0, batch, n_sequences):
            sequences = slice(b, min(b + n_sequences, batch))
            scores = _scores(
                query[sequences],
                key[sequences],
                _of(part.positions, sequences),
                scale=scale,
                bias=None if bias is None else _of(bias, sequences),
                softcap=softcap,
            )
            done.append(reduce(scores, part, _Block(sequences, rows)))
    if len(done) == 1:
        return done[0]
    per = -(-batch // n_sequences)
    return torch.cat([torch.cat(done[i : i + per]) for i in range(0, len(done), per)], dim=2)


def _of(tensor: torch.Tensor, part: slice) -> torch.Tensor:
    """The part of a batch, of a tensor that may serve the whole batch."""
    return tensor if len(tensor) == 1 else tensor[part]


def _scores(
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float,
    bias: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """(B, Hq, n, Sk) float32 logits of the sampled rows, before any mask."""
    sampled = rows_of(query, positions)
    batch, heads, n, width = sampled.shape
    kv_heads, n_keys = key.shape[1:3]
    left = (sampled.float() * scale).reshape(batch, kv_heads, -1, width)
    scores = left.new_empty(*left.shape[:3], n_keys)
    for rows, keys, product in zip(left, key.float(), scores, strict=True):
        torch.bmm(rows, keys.transpose(1, 2), out=product)
    scores = scores.view(batch, heads, n, n_keys)
    if bias is not None:
        scores += rows_of(bias, positions)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    return scores


def _statistics(
    scores: torch.Tensor,
    geometry: RowGeometry,
    part: slice,
    slot: torch.Tensor | None,
    target: torch.Tensor | None,
) -> torch.Tensor:
    """(B, Hq, n, 14) from logits (B, Hq, n, Sk), which are overwritten."""
    scores, largest, broken = _masked(scores, geometry, part)
    reference = largest
    if slot is not None:
        whole = slot.isfinite()
        reference = torch.maximum(largest, torch.where(whole, slot, -torch.inf))
        broken = ~whole if broken is None else broken | ~whole
    shifted = scores.sub_(reference[..., None]).clamp_(min=_FLOOR)
    e = shifted.exp()
    u = shifted.mul_(e).sum(-1)
    squares = torch.linalg.vector_norm(e, dim=-1).square_()
    sums = _weighted(e, _of(geometry.weights, part))
    log_visible = _of(geometry.log_visible if slot is None else geometry.log_visible_and_slot, part)
    if slot is not None:
        fall = slot - reference
        mass = fall.exp()
        sums[0] += mass
        sums[4] += mass
        u, squares = u + mass * fall, squares + mass.square()
    total = sums[0]
    log_total = total.log()
    entropy = (log_total - u / total).clamp_(min=0)
    distance, local, previous, sink = (sums[1:] / total).unbind()
    one, none = torch.ones_like(total), torch.zeros_like(total)
    n_induction, induction = none, none
    if target is not None:
        seen = _sees(_of(geometry.visible, part), target)
        index = target.clamp(min=0)[:, None, :, None].expand(*total.shape, 1)
        n_induction = seen.to(total.dtype).expand_as(total)
        induction = e.gather(-1, index)[..., 0].div_(total).mul_(n_induction)
    columns = (
        one,
        entropy,
        entropy / log_visible,
        reference + log_total,
        largest,
        1 / total,
        total.square() / squares,
        sink,
        previous,
        local,
        distance,
        n_induction,
        induction,
        none,
    )
    counted = _of(geometry.counted, part)
    good = counted if broken is None else counted & ~broken
    rows = torch.where(good, torch.stack(columns), geometry.blank[:, None, None, None])
    if broken is not None:
        rows[-1] = counted & broken
    return rows.permute(1, 2, 3, 0)


def _sees(visible: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(1 or B, 1 or Hq, n) bool: whether each row may see its own entry of `target` (1 or B, n), which may be -1."""
    batch, index = max(len(target), len(visible)), target.clamp(min=0)[:, None, :, None]
    found = visible.expand(batch, -1, -1, -1).gather(-1, index.expand(batch, visible.shape[1], -1, 1))
    return found[..., 0] & (target >= 0)[:, None]


def _masked(
    scores: torch.Tensor, geometry: RowGeometry, part: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Logits with the mask added, the largest of each row, and which rows are broken; None for none."""
    scores += _of(geometry.added, part)
    largest = scores.amax(-1)
    if scores.device.type == "cpu" and _sane(scores, torch.where(_of(geometry.counted, part), largest, 0.0)):
        return scores, largest, None
    visible = _of(geometry.visible, part)
    usable = visible & scores.isfinite()
    broken = (visible & ~usable).any(-1)
    scores = torch.where(usable, scores, torch.finfo(scores.dtype).min)
    return scores, scores.amax(-1), broken


def _sane(scores: torch.Tensor, largest: torch.Tensor) -> bool:
    """Whether all scores are finite and the largest of each row that counts is far from `HIDDEN`."""
    return bool(largest.abs().max() < -HIDDEN / 10 and scores.sum().isfinite())


def _weighted(e: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sums over keys of e (B, Hq, n, Sk) times each of the geometry's weights (1 or B, n, 5, Sk): (5, B, Hq, n)."""
    batch, heads, n, n_keys = e.shape
    if len(weights) == 1:  # one product a row position, over all sequences and heads
        sums = torch.bmm(weights[0], e.view(batch * heads, n, n_keys).permute(1, 2, 0))
        return sums.view(n, -1, batch, heads).permute(1, 2, 3, 0).contiguous()
    each = [torch.bmm(w, of_sequence.permute(1, 2, 0)) for w, of_sequence in zip(weights, e, strict=True)]
    return torch.stack(each).permute(2, 0, 3, 1).contiguous()
