"""The strongest edges of sampled attention rows: the keys that give a query most, per head, without the S x S matrix.

Of a row with logits s_j over its visible keys, probabilities p = softmax(s) and weights w_j >= 0,

    mass_j = p_j        flow_j = p_j w_j        total_flow = sum over all visible keys of flow_j

With w_j the norm of what the head writes into the residual stream for key j, |W_O v_j|, the flow is the norm of the
edge's own contribution to the query's stream (2004.10102: attention probabilities alone mislead, since heads give much
attention to keys with small values). Without weights it is the attention probability.

Decisions:

- `total_flow` counts every visible key, so a share of it is right whatever the number of edges kept.
- An attention-sink logit takes its part of the mass and is no key.
- A row with a NaN or infinite sink, or logit or weight of a visible key, has no edges and no total; neither has a row
  that sees no key or is not kept. Which of these it was `attention_rows` tells.
- Inputs are multiplied with float32 sums whatever their dtype.

The Triton kernel runs online over blocks of keys with a running list of the k largest; the torch twin takes the sampled
rows at once. Both take O(n Sk) memory for the mask's rows, and for the rest O(n k) and O(n Sk) a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lm_telemetry.kernels.attention_edges_twin import strongest_edges
from lm_telemetry.kernels.attention_rows_geometry import RowGeometry, four_axes, row_geometry
from lm_telemetry.kernels.dispatch import choose, launching_on
from lm_telemetry.kernels.head_operands import full_precision, head_obstacle

MAX_EDGES = 16
"""Longest list the kernel keeps for a row; more go to the twin."""

NO_KEY = -1
"""Stands where a row has no further edge."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Edges:
    """The edges of sampled rows, strongest first.

    Attributes:
        keys: (B, Hq, n, k) int64, index of the key; `NO_KEY` where fewer are visible or the row has none.
        mass: (B, Hq, n, k) float32, attention probability; NaN where there is no key.
        flow: (B, Hq, n, k) float32, mass times weight; NaN where there is no key.
        total_flow: (B, Hq, n) float32, the flow of all visible keys; NaN where the row has no edges.
    """

    keys: torch.Tensor
    mass: torch.Tensor
    flow: torch.Tensor
    total_flow: torch.Tensor


def attention_edges(
    query: torch.Tensor,
    key: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    positions: torch.Tensor,
    k: int,
    scale: float,
    causal: bool,
    query_offset: int = 0,
    own_keys: torch.Tensor | None = None,
    window: int | None = None,
    keep: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    segments: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> Edges:
    """`attention_edges_at` for a geometry used once; arguments as there and in `row_geometry`."""
    geometry = row_geometry(
        positions=positions,
        n_keys=key.shape[2],
        causal=causal,
        query_offset=query_offset,
        own_keys=own_keys,
        window=window,
        keep=keep,
        mask=mask,
        segments=segments,
    )
    return attention_edges_at(query, key, weight, geometry, k=k, scale=scale, bias=bias, softcap=softcap, sinks=sinks)


@torch.no_grad()
def attention_edges_at(
    query: torch.Tensor,
    key: torch.Tensor,
    weight: torch.Tensor | None,
    geometry: RowGeometry,
    *,
    k: int,
    scale: float,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Edges:
    """The k keys of largest flow of each sampled row and head.

    Logits are `scale * q.k + bias`, then `softcap * tanh(logits / softcap)`, then the geometry's mask is added. Edges
    of equal flow, or of flows too small for float32, come in any order. Nothing synchronises with the device.

    Args:
        query: (B, Hq, Sq, D), after rotary embedding and normalisation.
        key: (B, Hkv, Sk, D), not expanded: query head h uses key head h // (Hq / Hkv).
        weight: (B, Hq, Sk) float32, not negative, what the mass of each key is multiplied with; None for 1.
        geometry: the sampled rows and what they may see, from `row_geometry`.
        k: edges a row, at least 1.
        scale: factor on the dot products.
        bias: additive position bias, broadcastable to (B, Hq, Sq, Sk); None for none.
        softcap: bound on the logits' magnitude; None for none.
        sinks: (Hq,) logits of a key without a value that every row of a head sees; None for none.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    _check(query, key, weight, geometry, k=k, bias=bias, sinks=sinks)
    batch, heads, n_queries = query.shape[:3]
    n = geometry.positions.shape[1]
    if 0 in {batch, n, geometry.n_keys}:
        keys = torch.full((batch, heads, n, k), NO_KEY, dtype=torch.int64, device=query.device)
        nothing = torch.full(keys.shape, torch.nan, device=query.device)
        return Edges(keys=keys, mass=nothing, flow=nothing.clone(), total_flow=nothing[..., 0].clone())
    if bias is not None:
        bias = four_axes(bias).expand(-1, heads, n_queries, geometry.n_keys)
    with full_precision(query.device.type):
        if choose(query, key, refusal=_refusal(query, key, k)).path == "triton":
            from lm_telemetry.kernels.attention_edges_kernel import launch

            with launching_on(query):
                found = launch(query, key, weight, geometry, k=k, scale=scale, bias=bias, softcap=softcap, sinks=sinks)
        else:
            found = strongest_edges(
                query, key, weight, geometry, k=k, scale=scale, bias=bias, softcap=softcap, sinks=sinks
            )
    keys, mass, flow, total = found
    known = geometry.counted & total.isfinite()
    there = known[..., None] & (keys >= 0)
    return Edges(
        keys=torch.where(there, keys, NO_KEY),
        mass=torch.where(there, mass, torch.nan),
        flow=torch.where(there, flow, torch.nan),
        total_flow=torch.where(known, total, torch.nan),
    )


def _refusal(query: torch.Tensor, key: torch.Tensor, k: int) -> str | None:
    if k > MAX_EDGES:
        return f"{k} edges a row are more than the kernel's {MAX_EDGES}"
    return head_obstacle(query, key)


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    weight: torch.Tensor | None,
    geometry: RowGeometry,
    *,
    k: int,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> None:
    def expect(holds: bool, expected: str, got: str) -> None:
        if not holds:
            raise ValueError(f"attention_edges: expected {expected}; got {got}")

    shapes = f"query {tuple(query.shape)} and key {tuple(key.shape)}"
    alike = query.ndim == key.ndim == 4 and len(query) == len(key) and query.shape[3] == key.shape[3]
    expect(alike, "query (B, Hq, Sq, D) and key (B, Hkv, Sk, D)", shapes)
    expect(query.shape[1] % key.shape[1] == 0, "Hq to be a multiple of Hkv", shapes)
    expect(key.shape[2] == geometry.n_keys, f"{geometry.n_keys} keys, as in the geometry", shapes)
    expect(geometry.batch in {1, len(query)}, f"a batch of {geometry.batch}, as in the geometry", shapes)
    expect(k >= 1, "k to be at least 1", str(k))
    if weight is not None:
        shape = (*query.shape[:2], key.shape[2])
        known = weight.shape == shape and weight.dtype == torch.float32
        expect(known, f"weight {shape}, float32", f"{tuple(weight.shape)}, {weight.dtype}")
    if bias is not None:
        known = bias.shape[-1] in {1, geometry.n_keys}
        expect(known, f"bias over {geometry.n_keys} keys", str(tuple(bias.shape)))
    if sinks is not None:
        expect(sinks.shape == query.shape[1:2], f"sinks ({query.shape[1]},)", str(tuple(sinks.shape)))
