"""The attention-row kernel: sampled rows, online over blocks of keys; no score is ever written to memory.

A program holds BLOCK_M rows of one key-value head. All query heads of the group and all sampled positions are rows
alike, so keys are read once for a whole group. It keeps, for each row, the running maximum m and

    l = sum e^(s-m)    u = sum e^(s-m) (s-m)    q = sum e^2(s-m)    and the sink, previous, local and distance sums,

which a larger maximum m' turns into, with a = e^(m-m'): l <- a l, u <- a (u + l (m - m')), q <- a^2 q. The logit of an
attention sink is one more such step, at the end. Rows are written out as they are; `attention_rows` sums them in a
fixed order, so there are no atomics and results repeat.

Decisions:

- 16-bit inputs go to the tensor cores as they are, with float32 sums: products of bfloat16 are exact there. The head is
  one block, padded to a power of two.
- float32 inputs are multiplied in full precision (TF32 keeps ten bits of a factor) in pieces of the head, since
  a whole head of float32 operands does not fit the registers.
- Blocks of keys that causality, the window or packing hides from all rows of a program are not visited.
- Where only log-sum-exp is wanted the same loop keeps m and l only.

Left out: splitting one row's keys over programs; with a few dozen sampled queries a layer it is not needed.
"""

# ruff: noqa: PLR0917  -- a launch passes its arguments by position
# mypy: disable-error-code="no-untyped-def"
# The arguments of a kernel are pointers or numbers, as the launch decides.

from __future__ import annotations

import triton
import triton.language as tl

from lm_telemetry.kernels.attention_rows_geometry import KEY_BLOCK

_PIECE = 32
"""Channels of a float32 head that are multiplied at a time."""


@triton.jit
def tanh(x):  # noqa: ANN201  -- of whatever x is a tensor of
    """(1 - t) / (1 + t) with t = e^(-2|x|), and the Taylor series near 0, where 1 - t cancels."""
    t = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0, -1.0, 1.0) * ((1.0 - t) / (1.0 + t))
    y = x * x
    near = x * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, far)


# Lengths change from call to call (decoding, packing); to specialise on them would compile again and again.
@triton.jit(do_not_specialize=["n", "n_keys", "window", "row_blocks"])
def row_kernel(
    query,
    key,
    rows,
    positions,
    positions_b,
    positions_n,
    own,
    own_b,
    own_n,
    keep,
    keep_b,
    keep_n,
    first_key,
    first_key_b,
    first_key_n,
    induction_key,
    induction_key_b,
    induction_key_n,
    segments,
    segments_b,
    segments_j,
    sinks,
    sinks_h,
    mask,
    mask_b,
    mask_h,
    mask_n,
    bias,
    bias_b,
    bias_h,
    bias_n,
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
    window,
    heads,
    kv_heads,
    row_blocks,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_INDUCTION: tl.constexpr,
    LSE_ONLY: tl.constexpr,
    UPCAST: tl.constexpr,
    LOCAL: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIECE: tl.constexpr,
) -> None:
    """Writes rows (B, Hq, n, 14) float32 for the sampled positions, or (B, Hq, n) LSEs; strides are in elements."""
    stripe = tl.program_id(0) // row_blocks
    b = (stripe // kv_heads).to(tl.int64)
    kv = stripe % kv_heads
    group = heads // kv_heads
    r = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    live = r < group * n
    sample = r % n
    head = kv * group + r // n
    position = tl.load(positions + b * positions_b + sample * positions_n, mask=live, other=0).to(tl.int64)
    if HAS_KEEP:
        live = live & (tl.load(keep + b * keep_b + sample * keep_n, mask=live, other=0) != 0)
    own_at = tl.load(own + b * own_b + sample * own_n, mask=live, other=0).to(tl.int64)
    at = own_at.to(tl.int32)
    first = tl.zeros([BLOCK_M], tl.int32)
    if HAS_FIRST:
        first = tl.load(first_key + b * first_key_b + sample * first_key_n, mask=live, other=0).to(tl.int32)
    target = tl.full([BLOCK_M], -1, tl.int32)
    if HAS_INDUCTION:
        target = tl.load(induction_key + b * induction_key_b + sample * induction_key_n, mask=live, other=-1).to(
            tl.int32
        )
    segment_of = segments + b * segments_b
    segment = tl.zeros([BLOCK_M], tl.int64)
    if HAS_SEGMENTS:
        segment = tl.load(segment_of + own_at * segments_j, mask=live, other=0).to(tl.int64)

    channel = tl.arange(0, PIECE)
    query_row = query + b * query_b + head.to(tl.int64) * query_h + position * query_s
    key_head = key + b * key_b + kv.to(tl.int64) * key_h
    mask_row = mask + b * mask_b + head.to(tl.int64) * mask_h + sample.to(tl.int64) * mask_n
    bias_row = bias + b * bias_b + head.to(tl.int64) * bias_h + sample.to(tl.int64) * bias_n
    if PIECE == BLOCK_D:
        q = tl.load(query_row[:, None] + channel[None, :], mask=live[:, None] & (channel < width)[None, :], other=0.0)
        if UPCAST:
            q = q.to(tl.float32)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    u = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    sink = tl.zeros([BLOCK_M], tl.float32)
    previous = tl.zeros([BLOCK_M], tl.float32)
    local = tl.zeros([BLOCK_M], tl.float32)
    distance = tl.zeros([BLOCK_M], tl.float32)
    induction = tl.zeros([BLOCK_M], tl.float32)
    seen = tl.zeros([BLOCK_M], tl.float32)

    begin = 0
    end = n_keys
    if CAUSAL:
        end = tl.minimum(n_keys, tl.max(tl.where(live, at, -1), 0) + 1)
    if HAS_WINDOW:
        begin = tl.maximum(0, tl.min(tl.where(live, at, n_keys), 0) - window + 1) // BLOCK_N * BLOCK_N
    if HAS_SEGMENTS:  # each begins with its first key
        begin = tl.maximum(begin, tl.min(tl.where(live, first, n_keys), 0) // BLOCK_N * BLOCK_N)
    for start in range(begin, end, BLOCK_N):
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
        visible = live[:, None] & there[None, :]
        behind = at[:, None] - j[None, :]
        if HAS_BIAS:
            s += tl.load(bias_row[:, None] + j[None, :], mask=live[:, None], other=0.0)
        if HAS_SOFTCAP:
            s = softcap * tanh(s / softcap)
        if CAUSAL:
            visible = visible & (behind >= 0)
        if HAS_WINDOW:
            visible = visible & (behind < window)
        if HAS_SEGMENTS:
            visible = visible & (tl.load(segment_of + j * segments_j, mask=there, other=0)[None, :] == segment[:, None])
        if HAS_MASK:
            added = tl.load(mask_row[:, None] + j[None, :], mask=live[:, None], other=HIDDEN)
            visible = visible & (added > HIDDEN / 2)
            s += added
        # 0 * s is NaN where s is not finite, and stays: one sum counts the visible keys and remembers a broken row.
        seen += tl.sum(tl.where(visible, 1.0 + 0.0 * s, 0.0), 1)
        s = tl.where(visible & (tl.abs(s) < float("inf")), s, float("-inf"))

        larger = tl.maximum(m, tl.max(s, 1))
        reference = tl.where(larger == float("-inf"), 0.0, larger)
        fall = tl.where(m == float("-inf"), 0.0, m - reference)
        a = tl.exp(fall)
        shifted = s - reference[:, None]
        e = tl.exp(shifted)
        if not LSE_ONLY:
            u = a * (u + total * fall) + tl.sum(tl.where(e > 0, e * shifted, 0.0), 1)
            squares = a * a * squares + tl.sum(e * e, 1)
            sink = a * sink + tl.sum(tl.where(j[None, :] == first[:, None], e, 0.0), 1)
            previous = a * previous + tl.sum(tl.where(behind == 1, e, 0.0), 1)
            local = a * local + tl.sum(tl.where(tl.abs(behind) < LOCAL, e, 0.0), 1)
            distance = a * distance + tl.sum(e * tl.abs(behind).to(tl.float32), 1)
        if HAS_INDUCTION:
            induction = a * induction + tl.sum(tl.where(j[None, :] == target[:, None], e, 0.0), 1)
        total = a * total + tl.sum(e, 1)
        m = larger

    sees = seen > 0  # False of NaN
    broken = seen != seen  # noqa: PLR0124  -- of NaN
    largest = tl.where(sees, m, float("-inf"))
    counted = seen
    if HAS_SINKS:
        slot = tl.load(sinks + head * sinks_h, mask=live, other=0.0).to(tl.float32)
        whole = tl.abs(slot) < float("inf")
        broken = broken | (sees & (whole == 0))
        slot = tl.where(whole, slot, 0.0)
        reference = tl.maximum(tl.where(sees, m, slot), slot)
        fall = tl.where(sees, m - reference, 0.0)
        a = tl.exp(fall)
        e_slot = tl.exp(slot - reference)
        u = a * (u + total * fall) + e_slot * (slot - reference)
        squares = a * a * squares + e_slot * e_slot
        sink = a * sink + e_slot
        previous = a * previous
        local = a * local
        distance = a * distance
        induction = a * induction
        total = a * total + e_slot
        m = reference
        counted = seen + 1.0
    known = live & sees & (broken == 0)
    total = tl.where(known, total, 1.0)
    log_total = tl.log(total)
    stored = r < group * n
    place = (b * heads + head) * n + sample
    if LSE_ONLY:
        lse = tl.where(broken, float("nan"), float("-inf"))
        tl.store(rows + place, tl.where(known, m + log_total, lse), mask=stored)
    else:
        aimed = tl.zeros([BLOCK_M], tl.float32)
        if HAS_INDUCTION:
            visible = known & (target >= 0) & (target < n_keys)
            if CAUSAL:
                visible = visible & (target <= at)
            if HAS_WINDOW:
                visible = visible & (at - target < window)
            if HAS_SEGMENTS:
                visible = visible & (tl.load(segment_of + target * segments_j, mask=visible, other=0) == segment)
            if HAS_MASK:
                visible = visible & (tl.load(mask_row + target, mask=visible, other=HIDDEN) > HIDDEN / 2)
            aimed = visible.to(tl.float32)
        entropy = tl.maximum(log_total - u / total, 0.0)
        row = rows + place * 14
        tl.store(row + 0, known.to(tl.float32), mask=stored)
        tl.store(row + 1, tl.where(known, entropy, 0.0), mask=stored)
        normalized = entropy / tl.log(tl.maximum(counted, 2.0))
        tl.store(row + 2, tl.where(known & (counted > 1), normalized, 0.0), mask=stored)
        tl.store(row + 3, tl.where(known, m + log_total, 0.0), mask=stored)
        tl.store(row + 4, tl.where(known, largest, float("-inf")), mask=stored)
        tl.store(row + 5, tl.where(known, 1.0 / total, 0.0), mask=stored)
        tl.store(row + 6, tl.where(known, total * total / squares, 0.0), mask=stored)
        tl.store(row + 7, tl.where(known, sink / total, 0.0), mask=stored)
        tl.store(row + 8, tl.where(known, previous / total, 0.0), mask=stored)
        tl.store(row + 9, tl.where(known, local / total, 0.0), mask=stored)
        tl.store(row + 10, tl.where(known, distance / total, 0.0), mask=stored)
        tl.store(row + 11, aimed, mask=stored)
        tl.store(row + 12, tl.where(known, induction / total, 0.0), mask=stored)
        tl.store(row + 13, (live & broken).to(tl.float32), mask=stored)


def block_sizes(n_rows: int, width: int, *, whole_head: bool) -> dict[str, int]:
    """Block sizes for `n_rows` rows a key-value head and heads of `width` channels."""
    block_m = min(64, max(16, triton.next_power_of_2(n_rows)))
    block_d = max(16, triton.next_power_of_2(width)) if whole_head else triton.cdiv(width, _PIECE) * _PIECE
    piece = block_d if whole_head else _PIECE
    return {"BLOCK_M": block_m, "BLOCK_N": KEY_BLOCK, "BLOCK_D": block_d, "PIECE": piece}


def launch_options(*, whole_head: bool) -> dict[str, int | bool]:
    """Warps, stages of the pipeline of loads, and whether products and sums may fuse (Triton's default is changing)."""
    return {"num_warps": 4, "num_stages": 2 if whole_head else 1, "enable_fp_fusion": True}
