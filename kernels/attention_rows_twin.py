"""The torch twin of the attention-row kernel: sampled rows at once, O(n Sk) memory, few passes over the scores.

Decisions:

- One batched product over key-value heads; the query heads of a group are rows of it, so grouped keys are not expanded.
- What is linear in the probabilities (their sum, the mean distance, the local and the previous key's mass) is one small
  batched product with weights that the geometry holds.
- Hidden keys get a large negative logit, not -inf, so that nothing needs a masked copy. Where a visible logit turns out
  not to be finite the block is computed again with those rows set aside; on a GPU, where looking would synchronise,
  that second way is always taken.
"""

from __future__ import annotations

import torch

from lm_telemetry.kernels.attention_rows_geometry import HIDDEN, RowGeometry, rows_of

_BLOCK = 1 << 18
"""Scores worked on at a time, in whole sequences: 1 MiB in float32."""

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
) -> torch.Tensor:
    """(B, Hq, n, 12) float32: `RAW_COLUMNS` of every sampled row; rows that do not count are 0, their max_logit -inf.

    Arguments as in `attention_rows.attention_rows_at`, checked there.
    """
    batch, heads = query.shape[:2]
    step = max(1, _BLOCK // max(1, heads * geometry.positions.shape[1] * geometry.n_keys))
    blocks = []
    for start in range(0, batch, step):
        part = slice(start, min(start + step, batch))
        scores = _scores(
            query[part],
            key[part],
            _of(geometry.positions, part),
            scale=scale,
            bias=None if bias is None else _of(bias, part),
            softcap=softcap,
        )
        blocks.append(_statistics(scores, geometry, part))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


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
    left = (sampled.float() * scale).reshape(batch * kv_heads, -1, width)
    right = key.float().reshape(batch * kv_heads, n_keys, width)
    scores = torch.bmm(left, right.transpose(1, 2)).view(batch, heads, n, n_keys)
    if bias is not None:
        scores += rows_of(bias, positions)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    return scores


def _statistics(scores: torch.Tensor, geometry: RowGeometry, part: slice) -> torch.Tensor:
    """(B, Hq, n, 12) from logits (B, Hq, n, Sk), which are overwritten."""
    scores += _of(geometry.added, part)
    broken = None
    if scores.device.type != "cpu" or not _sane(scores, _of(geometry.counted, part)):
        visible = _of(geometry.visible, part)
        usable = visible & scores.isfinite()
        broken = (visible & ~usable).any(-1)
        scores = torch.where(usable, scores, torch.finfo(scores.dtype).min)
    largest = scores.amax(-1)
    shifted = scores.sub_(largest[..., None]).clamp_(min=_FLOOR)
    linear, u, squares = _sums(shifted, _of(geometry.weights, part))
    return _columns(largest, linear, u, squares, geometry=geometry, part=part, broken=broken)


def _sane(scores: torch.Tensor, counted: torch.Tensor) -> bool:
    """Whether all scores are finite and those of visible keys far from `HIDDEN`."""
    largest = torch.where(counted, scores.amax(-1), 0.0).abs().max()
    return bool(largest < -HIDDEN / 10 and scores.amin(-1).min() > 2 * HIDDEN)  # both are False of NaN


def _sums(shifted: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """With e = exp(shifted): e @ weights (B, Hq, n, 5), sum e * shifted and sum e^2 (B, Hq, n). Overwrites shifted."""
    batch, heads, n, n_keys = shifted.shape
    e = shifted.exp()
    u = shifted.mul_(e).sum(-1)
    squares = torch.linalg.vector_norm(e, dim=-1).square_()
    if len(weights) == 1:  # one product a row position, over all sequences and heads
        linear = torch.bmm(e.view(batch * heads, n, n_keys).transpose(0, 1), weights[0])
        linear = linear.view(n, batch, heads, -1).permute(1, 2, 0, 3)
    else:
        linear = torch.matmul(e.transpose(1, 2), weights).transpose(1, 2)
    return linear, u, squares


def _columns(
    largest: torch.Tensor,
    linear: torch.Tensor,
    u: torch.Tensor,
    squares: torch.Tensor,
    *,
    geometry: RowGeometry,
    part: slice,
    broken: torch.Tensor | None,
) -> torch.Tensor:
    """(B, Hq, n, 12): the definitions, given the sums; rows that do not count are blank."""
    total, distance, local, previous, sink = linear.unbind(-1)
    log_total = total.log()
    entropy = (log_total - u / total).clamp_(min=0)
    one, none = torch.ones_like(total), torch.zeros_like(total)
    columns = (
        one,
        entropy,
        entropy / _of(geometry.log_visible, part),
        largest + log_total,
        largest,
        1 / total,
        total.square() / squares,
        sink / total,
        previous / total,
        local / total,
        distance / total,
        none,
    )
    counted = _of(geometry.counted, part)
    rows = torch.stack(columns, dim=-1)
    if broken is None:
        return torch.where(counted[..., None], rows, geometry.blank)
    rows = torch.where((counted & ~broken)[..., None], rows, geometry.blank)
    rows[..., -1] = counted & broken
    return rows
