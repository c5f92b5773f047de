"""The attention-column kernel: what each key receives, summed over queries; no score is ever written to memory.

A program holds BLOCK_N keys for one query head and walks the queries that may see them, like the key-value half of the
flash-attention backward pass (2307.08691). With the log-sum-exp of every row known, each score is final as soon as it
is formed:

    mass_j = sum_i exp(s_ij - lse_i)

Decisions:

- The tile is keys times queries, not queries times keys: a key's sum then runs along a row of the tile, which few
  threads share. Each mass is written once, by one program, so there are no atomics and results repeat.
- Programs of the first key blocks start first: under causality they have the most queries to walk.
- Rows that do not count come with a log-sum-exp of +inf, so the kernel needs no second list of them.
- Masks and biases are read where they lie, whatever they are broadcast over: an aligned copy would be S x S.
- 16-bit inputs go to the tensor cores as they are and float32 in full precision, as in `attention_rows_kernel`.

Left out: skipping blocks of queries that are all of other segments.
"""

# ruff: noqa: PLR0917  -- a launch passes its arguments by position
# mypy: disable-error-code="no-untyped-def"
# The arguments of a kernel are pointers or numbers, as the launch decides.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from lm_telemetry.kernels.attention_rows_geometry import hiding_bound
from lm_telemetry.kernels.attention_rows_kernel import tanh
from lm_telemetry.kernels.dispatch import interpreting
from lm_telemetry.kernels.head_operands import with_strides

if TYPE_CHECKING:
    from lm_telemetry.kernels.attention_columns_twin import Visibility

_PIECE = 32
"""Channels of a float32 head that are multiplied at a time."""


# Lengths change from call to call (decoding, packing); to specialise on them would compile again and again.
@triton.jit(do_not_specialize=["n_queries", "n_keys", "query_offset", "window", "stripes"])
def column_kernel(
    query,
    key,
    log_total,
    mass,
    own_keys,
    own_keys_b,
    own_keys_n,
    segments,
    segments_b,
    segments_n,
    mask,
    mask_b,
    mask_h,
    mask_n,
    mask_k,
    bias,
    bias_b,
    bias_h,
    bias_n,
    bias_k,
    query_b,
    query_h,
    query_s,
    key_b,
    key_h,
    key_s,
    scale,
    softcap,
    mask_bound,
    n_queries,
    n_keys,
    width,
    query_offset,
    window,
    heads,
    group,
    stripes,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_OWN_KEYS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_BOOL_MASK: tl.constexpr,
    HAS_ADDED_MASK: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """Writes mass (B, Hq, Sk) float32 for log_total (B, Hq, Sq) float32; strides are in elements."""
    stripe = tl.program_id(0) % stripes
    b = (stripe // heads).to(tl.int64)
    head = (stripe % heads).to(tl.int64)
    j0 = tl.program_id(0) // stripes * BLOCK_N
    j = j0 + tl.arange(0, BLOCK_N)
    there = j < n_keys
    far_j = j.to(tl.int64)

    channel = tl.arange(0, PIECE)
    query_head = query + b * query_b + head * query_h
    key_row = key + b * key_b + head // group * key_h + far_j * key_s
    totals = log_total + (b * heads + head) * n_queries
    mask_key = mask + b * mask_b + head * mask_h + far_j * mask_k
    bias_key = bias + b * bias_b + head * bias_h + far_j * bias_k
    if PIECE == BLOCK_D:
        k = tl.load(key_row[:, None] + channel[None, :], mask=there[:, None] & (channel < width)[None, :], other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
    if HAS_SEGMENTS:
        key_segment = tl.load(segments + b * segments_b + far_j * segments_n, mask=there, other=0)

    begin = 0
    end = n_queries
    if CAUSAL and not HAS_OWN_KEYS:
        begin = tl.maximum(0, j0 - query_offset) // BLOCK_M * BLOCK_M
    if HAS_WINDOW and not HAS_OWN_KEYS:
        end = tl.minimum(n_queries, j0 + BLOCK_N - 1 + window - query_offset)
    received = tl.zeros([BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)
        live = i < n_queries
        far_i = i.to(tl.int64)
        query_row = query_head + far_i * query_s
        if PIECE == BLOCK_D:
            q = tl.load(
                query_row[None, :] + channel[:, None], mask=live[None, :] & (channel < width)[:, None], other=0.0
            )
            if UPCAST:
                q = q.to(tl.float32)
            s = tl.dot(k, q, input_precision="ieee")
        else:
            s = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for piece in range(0, BLOCK_D, PIECE):
                c = piece + channel
                k = tl.load(key_row[:, None] + c[None, :], mask=there[:, None] & (c < width)[None, :], other=0.0)
                q = tl.load(query_row[None, :] + c[:, None], mask=live[None, :] & (c < width)[:, None], other=0.0)
                s = tl.dot(k, q, s, input_precision="ieee")
        total = tl.load(totals + i, mask=live, other=float("inf"))
        counted = total < float("inf")
        visible = counted[None, :] & there[:, None]
        s = s * scale
        if HAS_BIAS:
            s += tl.load(bias_key[:, None] + (far_i * bias_n)[None, :], mask=visible, other=0.0).to(tl.float32)
        if HAS_SOFTCAP:
            s = softcap * tanh(s / softcap)
        if HAS_OWN_KEYS:
            at = tl.load(own_keys + b * own_keys_b + far_i * own_keys_n, mask=live, other=0).to(tl.int32)
        else:
            at = i + query_offset
        if CAUSAL:
            visible = visible & (j[:, None] <= at[None, :])
        if HAS_WINDOW:
            visible = visible & (at[None, :] - j[:, None] < window)
        if HAS_SEGMENTS:
            query_segment = tl.load(segments + b * segments_b + at.to(tl.int64) * segments_n, mask=live, other=0)
            visible = visible & (key_segment[:, None] == query_segment[None, :])
        if HAS_BOOL_MASK:
            visible = visible & (tl.load(mask_key[:, None] + (far_i * mask_n)[None, :], mask=visible, other=0) != 0)
        if HAS_ADDED_MASK:
            added = tl.load(mask_key[:, None] + (far_i * mask_n)[None, :], mask=visible, other=0.0).to(tl.float32)
            visible = visible & (added > mask_bound)
            s += added
        # Rounding may put s above its row's total, and NaN is to stay what it is.
        s = tl.minimum(s - total[None, :], 0.0, propagate_nan=tl.PropagateNan.ALL)
        received += tl.sum(tl.where(visible, tl.exp(s), 0.0), 1)
    tl.store(mass + (b * heads + head) * n_keys + j, received, mask=there)


def block_sizes(n_queries: int, width: int, *, whole_head: bool) -> dict[str, int]:
    """Block sizes for `n_queries` queries and heads of `width` channels."""
    block_d = max(16, triton.next_power_of_2(width)) if whole_head else triton.cdiv(width, _PIECE) * _PIECE
    return {
        "BLOCK_M": min(64, max(16, triton.next_power_of_2(n_queries))),
        "BLOCK_N": 128 if whole_head and block_d <= 128 else 64,
        "BLOCK_D": block_d,
        "PIECE": block_d if whole_head else _PIECE,
    }


def launch_options(sizes: dict[str, int], *, whole_head: bool) -> dict[str, int | bool]:
    """Warps, stages of the pipeline of loads, and whether products and sums may fuse (Triton's default is changing)."""
    return {
        "num_warps": sizes["BLOCK_N"] // 16 if whole_head else 8,
        "num_stages": 2 if whole_head else 1,
        "enable_fp_fusion": True,
    }


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    log_total: torch.Tensor,
    view: Visibility,
    *,
    scale: float,
    bias: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """Mass (B, Hq, Sk) float32; arguments as in `attention_columns_twin.mass_by_key`."""
    (batch, heads, n_queries, width), (_, kv_heads, n_keys, _) = query.shape, key.shape
    mass = torch.empty(batch, heads, n_keys, dtype=torch.float32, device=query.device)
    mask = view.mask
    whole_head = query.dtype != torch.float32
    sizes = block_sizes(n_queries, width, whole_head=whole_head)
    column_kernel[(batch * heads * triton.cdiv(n_keys, sizes["BLOCK_N"]),)](
        query,
        key,
        log_total.contiguous(),
        mass,
        *with_strides(view.own_keys, (batch, n_queries), query),
        *with_strides(view.segments, (batch, n_keys), query),
        *with_strides(mask, (batch, heads, n_queries, n_keys), query),
        *with_strides(bias, (batch, heads, n_queries, n_keys), query),
        *query.stride()[:3],
        *key.stride()[:3],
        scale,
        softcap or 1.0,
        hiding_bound(mask.dtype) if mask is not None and mask.is_floating_point() else 0.0,
        n_queries,
        n_keys,
        width,
        view.query_offset,
        view.window or 0,
        heads,
        heads // kv_heads,
        batch * heads,
        CAUSAL=view.causal,
        HAS_WINDOW=view.window is not None,
        HAS_OWN_KEYS=view.own_keys is not None,
        HAS_SEGMENTS=view.segments is not None,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_BOOL_MASK=mask is not None and mask.dtype == torch.bool,
        HAS_ADDED_MASK=mask is not None and mask.dtype != torch.bool,
        UPCAST=whole_head and interpreting(),
        **sizes,
        **launch_options(sizes, whole_head=whole_head),
    )
    return mass
