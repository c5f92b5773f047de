"""The attention-edge kernel: sampled rows, online over blocks of keys, with a running list of the strongest edges.

A program holds BLOCK_M rows of one key-value head, as in `attention_rows_kernel`. For each row it keeps the running
maximum m, the sums l = sum e^(s-m) and t = sum e^(s-m) w, and the EDGES keys of largest s + log w seen so far; the
denominator is common to a row's keys, so these are the keys of largest flow. At the end mass = e^(s-m) / l,
flow = mass w, and the total flow is t / l.

Decisions:

- A candidate is one 64-bit integer: the bits of s + log w, mapped so that integers are ordered as the numbers are, and
  below them the bits of the key, larger for smaller keys. So one maximum finds the number and the key at once, no two
  are equal, and of equal flows the smaller key wins. What a list holds before it is full, and hidden keys, are integers
  below that of minus infinity.
- Of a block as many keys are looked at as can enter the lists; usually none does, once a list is full.
- Causality, windows, segments and masks come as the geometry's rows, O(n Sk) numbers. All blocks of keys are visited:
  with a few dozen rows, now and then, what could be skipped is not worth a second way.
"""

# ruff: noqa: PLR0917  -- a launch passes its arguments by position
# mypy: disable-error-code="no-untyped-def"
# The arguments of a kernel are pointers or numbers, as the launch decides.

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lm_telemetry.kernels.attention_rows_geometry import HIDDEN, KEY_BLOCK, RowGeometry, aligned, rows_of
from lm_telemetry.kernels.attention_rows_kernel import tanh
from lm_telemetry.kernels.dispatch import interpreting
from lm_telemetry.kernels.head_operands import with_strides

LOWEST = -(2**63)
"""The candidate that a hidden key is."""

_PIECE = 32
"""Channels of a float32 head that are multiplied at a time."""


# Lengths change from call to call; to specialise on them would compile again and again.
@triton.jit(do_not_specialize=["n", "n_keys", "row_blocks"])
def edge_kernel(
    query,
    key,
    weight,
    weight_b,
    weight_h,
    keys_out,
    mass_out,
    flow_out,
    total_out,
    positions,
    positions_b,
    positions_n,
    mask,
    mask_b,
    mask_h,
    mask_n,
    bias,
    bias_b,
    bias_h,
    bias_n,
    sinks,
    query_b,
    query_h,
    query_s,
    key_b,
    key_h,
    key_s,
    scale,
    softcap,
    n,
    n_keys,
    width,
    heads,
    kv_heads,
    row_blocks,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    UPCAST: tl.constexpr,
    HIDDEN: tl.constexpr,
    LOWEST: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """Writes keys int64, mass, flow (B, Hq, n, EDGES) and total (B, Hq, n) float32; strides are in elements."""
    stripe = tl.program_id(0) // row_blocks
    b = (stripe // kv_heads).to(tl.int64)
    kv = stripe % kv_heads
    group = heads // kv_heads
    r = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    live = r < group * n
    sample = r % n
    head = kv * group + r // n
    position = tl.load(positions + b * positions_b + sample * positions_n, mask=live, other=0).to(tl.int64)

    channel = tl.arange(0, PIECE)
    query_row = query + b * query_b + head.to(tl.int64) * query_h + position * query_s
    key_head = key + b * key_b + kv.to(tl.int64) * key_h
    mask_row = mask + b * mask_b + head.to(tl.int64) * mask_h + sample.to(tl.int64) * mask_n
    bias_row = bias + b * bias_b + head.to(tl.int64) * bias_h + sample.to(tl.int64) * bias_n
    weight_row = weight + b * weight_b + head.to(tl.int64) * weight_h
    if PIECE == BLOCK_D:
        q = tl.load(query_row[:, None] + channel[None, :], mask=live[:, None] & (channel < width)[None, :], other=0.0)
        if UPCAST:
            q = q.to(tl.float32)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    flows = tl.zeros([BLOCK_M], tl.float32)
    seen = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        m = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32)
        total += 1.0
        seen += 0.0 * m  # NaN where the sink is not finite, and stays
    slot = tl.arange(0, EDGES)
    best = tl.zeros([BLOCK_M, EDGES], tl.int64) + (LOWEST + 1 + slot.to(tl.int64))[None, :]
    logits = tl.zeros([BLOCK_M, EDGES], tl.float32)

    for start in range(0, n_keys, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        there = j < n_keys
        key_row = key_head + j.to(tl.int64) * key_s
        if PIECE == BLOCK_D:
            guard = there[None, :] & (channel < width)[:, None]
            k = tl.load(key_row[None, :] + channel[:, None], mask=guard, other=0.0)
            if UPCAST:
                k = k.to(tl.float32)
            s = tl.dot(q, k, input_precision="ieee")
        else:
            s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for piece in range(0, BLOCK_D, PIECE):
                c = piece + channel
                q = tl.load(query_row[:, None] + c[None, :], mask=live[:, None] & (c < width)[None, :], other=0.0)
                k = tl.load(key_row[None, :] + c[:, None], mask=there[None, :] & (c < width)[:, None], other=0.0)
                s = tl.dot(q, k, s, input_precision="ieee")
        s = s * scale
        if HAS_BIAS:
            s += tl.load(bias_row[:, None] + j[None, :], mask=live[:, None], other=0.0)
        if HAS_SOFTCAP:
            s = softcap * tanh(s / softcap)
        added = tl.load(mask_row[:, None] + j[None, :], mask=live[:, None], other=HIDDEN)
        visible = live[:, None] & there[None, :] & (added > HIDDEN / 2)
        s += added
        sane = tl.abs(s) < float("inf")
        # 0 * s is NaN where s is not finite, and stays: one sum counts the visible keys and remembers a broken row.
        told = 1.0 + 0.0 * s
        if HAS_WEIGHT:
            w = tl.load(weight_row[:, None] + j[None, :], mask=live[:, None] & there[None, :], other=0.0)
            told += 0.0 * w
            sane = sane & (tl.abs(w) < float("inf"))
        seen += tl.sum(tl.where(visible, told, 0.0), 1)
        usable = visible & sane
        s = tl.where(usable, s, float("-inf"))

        larger = tl.maximum(m, tl.max(s, 1))
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        a = tl.exp(tl.where(m == float("-inf"), 0.0, m - reference))
        e = tl.exp(s - reference[:, None])
        total = a * total + tl.sum(e, 1)
        rank = s
        flow = e
        if HAS_WEIGHT:
            w = tl.where(usable, w, 0.0)
            flow = e * w
            rank = s + tl.log(w)
        flows = a * flows + tl.sum(flow, 1)
        m = larger

        bits = rank.to(tl.int32, bitcast=True)
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        candidates = tl.where(usable, (ordered << 32) | (0x7FFFFFFF - j).to(tl.int64)[None, :], LOWEST)
        first = tl.max(candidates, 1)
        worst = tl.min(best, 1)
        while tl.max((first > worst).to(tl.int32), 0) > 0:
            chosen = candidates == first[:, None]
            logit = tl.sum(tl.where(chosen, s, 0.0), 1)
            place = (best == worst[:, None]) & (first > worst)[:, None]
            best = tl.where(place, first[:, None], best)
            logits = tl.where(place, logit[:, None], logits)
            candidates = tl.where(chosen, LOWEST, candidates)
            first = tl.max(candidates, 1)
            worst = tl.min(best, 1)

    known = live & (seen > 0)  # False of NaN
    reference = tl.where(known, m, 0.0)
    total = tl.where(known, total, 1.0)
    found = known[:, None] & (best > LOWEST + EDGES)
    found_key = (0x7FFFFFFF - (best & 0x7FFFFFFF)).to(tl.int32)
    mass = tl.exp(tl.where(found, logits - reference[:, None], 0.0)) / total[:, None]
    strength = mass
    if HAS_WEIGHT:
        strength = mass * tl.load(weight_row[:, None] + found_key, mask=found, other=0.0)
    row = (b * heads + head) * n + sample
    edge = row[:, None] * EDGES + slot[None, :]
    tl.store(keys_out + edge, tl.where(found, found_key.to(tl.int64), -1), mask=live[:, None])
    tl.store(mass_out + edge, mass, mask=live[:, None])
    tl.store(flow_out + edge, tl.where(found, strength, -1.0), mask=live[:, None])
    tl.store(total_out + row, tl.where(known, flows / total, float("nan")), mask=live)


def block_sizes(n_rows: int, width: int, k: int, *, whole_head: bool) -> dict[str, int]:
    """Block sizes for `n_rows` rows a key-value head, heads of `width` channels and lists of k edges."""
    block_d = max(16, triton.next_power_of_2(width)) if whole_head else triton.cdiv(width, _PIECE) * _PIECE
    return {
        "EDGES": triton.next_power_of_2(k),
        "BLOCK_M": min(32, max(16, triton.next_power_of_2(n_rows))),
        "BLOCK_N": KEY_BLOCK,
        "BLOCK_D": block_d,
        "PIECE": block_d if whole_head else _PIECE,
    }


def launch_options() -> dict[str, int | bool]:
    """Warps, stages of the pipeline of loads (the inner loop allows none), and whether products and sums may fuse."""
    return {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def launch(
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

    Keys are -1 where fewer are visible, and the total of a broken row is NaN.
    """
    (batch, heads, _, width), (_, kv_heads, n_keys, _) = query.shape, key.shape
    n = geometry.positions.shape[1]
    whole_head = query.dtype != torch.float32
    sizes = block_sizes(heads // kv_heads * n, width, k, whole_head=whole_head)
    keys = torch.empty(batch, heads, n, sizes["EDGES"], dtype=torch.int64, device=query.device)
    mass, flow = (torch.empty(keys.shape, dtype=torch.float32, device=query.device) for _ in range(2))
    total = torch.empty(batch, heads, n, dtype=torch.float32, device=query.device)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else aligned(rows_of(bias, geometry.positions))
    row_blocks = triton.cdiv(heads // kv_heads * n, sizes["BLOCK_M"])
    edge_kernel[(batch * kv_heads * row_blocks,)](
        query,
        key,
        *with_strides(weight, (batch, heads, n_keys), query)[:3],
        keys,
        mass,
        flow,
        total,
        *with_strides(geometry.positions, (batch, n), query),
        *with_strides(geometry.padded_mask, (batch, heads, n, -1), query)[:4],
        *with_strides(bias, (batch, heads, n, -1), query)[:4],
        query if sinks is None else sinks.contiguous(),
        *query.stride()[:3],
        *key.stride()[:3],
        scale,
        softcap or 1.0,
        n,
        n_keys,
        width,
        heads,
        kv_heads,
        row_blocks,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        UPCAST=whole_head and interpreting(),
        HIDDEN=HIDDEN,
        LOWEST=LOWEST,
        **sizes,
        **launch_options(),
    )
    order = flow.argsort(dim=-1, descending=True)[..., :k]
    return keys.gather(-1, order), mass.gather(-1, order), flow.gather(-1, order), total
