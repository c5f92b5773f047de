"""The torch twin of the attention-column kernel, and who sees whom: blocks of queries, so memory is O(Sk).

Decisions:

- A block of queries times the keys that causality and the window leave it is one batched product over key-value heads;
  grouped keys are not expanded. Small sequences are taken several at a time.
- Hidden keys are multiplied by 0 after the exponential, which CPUs do many times faster than they select. Where that
  leaves something that is not finite (a hidden key may hold NaN) they are selected after all; on a GPU, where looking
  would synchronise, always.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lm_telemetry.kernels.attention_rows_geometry import hiding_bound

_BLOCK = 1 << 19
"""Scores worked on at a time: 2 MiB in float32."""

_FEWEST = 16
"""Queries of a block, at least: products of fewer rows are slow."""

_MOST = 64
"""And at most: under causality a block is as wide as its last query sees."""

_FLOOR = -80.0
"""Least s - lse: e^-80 = 2e-35 is lost beside anything; below -87 the exp of CPUs is a hundred times slower."""


_ALL = slice(None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Visibility:
    """Which query may see which key, asked block by block.

    Query i stands at key position a = i + query_offset, or own_keys[i]. Key j is visible to it iff

        (not causal, or j <= a)  and  (no window, or a - j < window)  and  (no mask, or the mask lets i attend to j)
        and  (no segments, or keys j and a are of the same one)

    Attributes:
        n_queries: Sq.
        n_keys: Sk.
        causal: whether keys after the query are hidden.
        query_offset: key position of query 0.
        own_keys: (1 or B, Sq) int64, key positions of the queries where they are not i + query_offset; None where so.
        window: length of the sliding window; None for none.
        mask: four axes, broadcastable to (B, Hq, Sq, Sk); bool or additive; None for none.
        segments: (1 or B, Sk) integers, which of the sequences packed into a row each key is of; None for one a row.
    """

    n_queries: int
    n_keys: int
    causal: bool
    query_offset: int
    own_keys: torch.Tensor | None
    window: int | None
    mask: torch.Tensor | None
    segments: torch.Tensor | None

    def within_reach(self, rows: slice) -> slice:
        """Keys outside of which no query of `rows` sees any, as far as that is known without looking at a tensor."""
        first, stop = 0, self.n_keys
        if self.own_keys is None:
            if self.causal:
                stop = min(stop, max(0, rows.stop + self.query_offset))
            if self.window is not None:
                first = min(stop, max(0, rows.start + self.query_offset - self.window + 1))
        return slice(first, stop)

    def unsure(self, rows: slice, keys: slice) -> slice:
        """The end part of `keys` that has to be asked about: all queries of `rows` see the keys before it."""
        if not all(part is None for part in (self.own_keys, self.window, self.mask, self.segments)):
            return keys
        seen_by_all = rows.start + self.query_offset + 1 if self.causal else keys.stop
        return slice(min(max(keys.start, seen_by_all), keys.stop), keys.stop)

    def block(self, part: slice, rows: slice, keys: slice, device: torch.device) -> torch.Tensor:
        """(1 or b, 1 or Hq, m, k) bool: which of `keys` each of `rows` may see, in the sequences of `part`."""
        if self.own_keys is None:
            at = torch.arange(rows.start, rows.stop, device=device)[None] + self.query_offset
        else:
            at = cut(self.own_keys, part, rows)
        behind = (at[..., None] - torch.arange(keys.start, keys.stop, device=device))[:, None]
        visible = torch.ones_like(behind, dtype=torch.bool)
        if self.causal:
            visible &= behind >= 0
        if self.window is not None:
            visible &= behind < self.window
        if self.segments is not None:
            segments = cut(self.segments, part)
            batch = max(len(at), len(segments))
            mine = segments.expand(batch, -1).gather(1, at.expand(batch, -1))
            visible = visible & (mine[..., None] == segments[:, None, keys])[:, None]
        if self.mask is not None:
            mask = cut(self.mask, part, _ALL, rows, keys)
            visible = visible & (mask if mask.dtype == torch.bool else mask > hiding_bound(mask.dtype))
        return visible


def cut(tensor: torch.Tensor, *parts: slice) -> torch.Tensor:
    """A view of `parts` of the leading axes, where an axis of length one serves all and stays as it is."""
    return tensor[tuple(part if n > 1 else slice(None) for part, n in zip(parts, tensor.shape, strict=False))]


def visible_keys(view: Visibility, keep: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """(1 or B, 1 or Hq, Sk) bool: keys that some kept query may see; keep (1 or B, Sq)."""
    parts = (view.own_keys, view.mask, view.segments, keep)
    batch = max((len(part) for part in parts if part is not None), default=1)
    heads = 1 if view.mask is None else view.mask.shape[1]
    seen = torch.zeros(batch, heads, view.n_keys, dtype=torch.bool, device=device)
    step = max(_FEWEST, _BLOCK // max(1, batch * heads * view.n_keys))
    for start in range(0, view.n_queries, step):
        rows = slice(start, min(start + step, view.n_queries))
        keys = view.within_reach(rows)
        visible = view.block(_ALL, rows, keys, device)
        if keep is not None:
            visible = visible & cut(keep, _ALL, rows)[:, None, :, None]
        seen[..., keys] |= visible.any(2)
    return seen


def mass_by_key(
    query: torch.Tensor,
    key: torch.Tensor,
    log_total: torch.Tensor,
    view: Visibility,
    *,
    scale: float,
    bias: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """(B, Hq, Sk) float32: received mass.

    `log_total` (B, Hq, Sq) float32 is the log-sum-exp of rows that count and +inf for others; the other arguments are
    as in `attention_columns.received_mass`, checked there.
    """
    (batch, heads, n_queries, _), n_keys = query.shape, key.shape[2]
    mass = torch.zeros(batch, heads, n_keys, dtype=torch.float32, device=query.device)
    rows_a_block = max(_FEWEST, min(_MOST, _BLOCK // (heads * n_keys)))
    step = max(1, _BLOCK // (heads * min(rows_a_block, n_queries) * n_keys))
    for start in range(0, batch, step):
        part = slice(start, min(start + step, batch))
        converted = key[part].float().flatten(0, 1)
        for first in range(0, n_queries, rows_a_block):
            rows = slice(first, min(first + rows_a_block, n_queries))
            keys = view.within_reach(rows)
            p = _probabilities(
                query[part, :, rows].float() * scale,
                converted[:, keys],
                log_total[part, :, rows, None],
                bias=None if bias is None else cut(bias, part, _ALL, rows, keys),
                softcap=softcap,
                mask=None if view.mask is None else cut(view.mask, part, _ALL, rows, keys),
            )
            unsure = view.unsure(rows, keys)
            mass[part, :, keys] += _received(
                p,
                log_total[part, :, rows].isfinite(),
                view.block(part, rows, unsure, query.device),
                first_unsure=unsure.start - keys.start,
            )
    return mass


def _probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    log_total: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    softcap: float | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """(b, Hq, m, k) float32: exp(s - lse) whether visible or not, of scaled query (b, Hq, m, D), key (b Hkv, k, D)."""
    batch, heads, m, width = query.shape
    scores = torch.bmm(query.reshape(len(key), -1, width), key.transpose(1, 2)).view(batch, heads, m, -1)
    if bias is not None:
        scores += bias
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None and mask.dtype != torch.bool:
        scores += mask
    return scores.sub_(log_total).clamp_(_FLOOR, 0.0).exp_()


def _received(p: torch.Tensor, counted: torch.Tensor, visible: torch.Tensor, *, first_unsure: int) -> torch.Tensor:
    """(b, Hq, k): p (b, Hq, m, k) summed over the rows that are counted (b, Hq, m), hidden keys left out.

    `visible` tells of keys from `first_unsure` on; those before are visible to all rows. Overwrites p.
    """
    asked = p[..., first_unsure:]
    if p.device.type == "cpu":
        asked.mul_(visible)
        received = (counted.float()[..., None, :] @ p).squeeze(-2)
        if bool(received.isfinite().all()):
            return received
    asked.copy_(torch.where(visible, asked, 0.0))
    return torch.where(counted[..., None], p, 0.0).sum(-2)
