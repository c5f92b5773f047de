"""The torch twin of the attention-edge kernel: sampled rows at once, O(n Sk) memory a head.

One batched product over key-value heads; the query heads of a group are rows of it, so grouped keys are not expanded.
"""

from __future__ import annotations

import torch

from lm_telemetry.kernels.attention_rows_geometry import RowGeometry, rows_of


def strongest_edges(
    query: torch.Tensor,
    key: torch.Tensor,
    weight: torch.Tensor | None,
    geometry: RowGeometry,
    *,
    k: int,
    scale: float,
    bias: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys int64, mass and flow (B, Hq, n, k), total flow (B, Hq, n), float32; arguments as in `attention_edges_at`.

    Keys are -1 where fewer are visible, and the total of a broken row is NaN. Rows that see nothing or are not kept are
    left to the caller.
    """
    scores = _scores(query, key, geometry.positions, scale=scale, bias=bias, softcap=softcap) + geometry.added
    weights = torch.ones((), device=scores.device) if weight is None else weight[:, :, None]
    visible = geometry.visible
    usable = visible & scores.isfinite() & weights.isfinite()
    broken = (visible & ~usable).any(-1)
    scores = torch.where(usable, scores, torch.finfo(scores.dtype).min)
    if sinks is None:
        mass = scores.softmax(-1)
    else:
        slot = sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
        broken |= ~slot[..., 0].isfinite()
        mass = torch.cat([scores, slot], dim=-1).softmax(-1)[..., :-1]
    flow = torch.where(usable, mass * weights, 0.0)
    ranked = torch.where(usable, flow, -1.0)
    best, keys = ranked.topk(min(k, geometry.n_keys), dim=-1)
    mass = mass.gather(-1, keys)
    keys = torch.where(best >= 0, keys, -1)
    missing = (0, k - keys.shape[-1])
    pad = torch.nn.functional.pad
    total = torch.where(broken, torch.nan, flow.sum(-1))
    return pad(keys, missing, value=-1), pad(mass, missing), pad(best, missing), total


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
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)
