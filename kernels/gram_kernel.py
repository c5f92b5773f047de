"""The Gram kernels: sampled tokens are read where they stand, three times, and never copied or written back.

`flag_tokens` looks for non-finite entries, a program a token; `mean_token` averages the used tokens, a program a block
of channels; `token_products` takes a tile of pairs of tokens through all channels. Only the tiles on and below the
diagonal are computed, and each entry is written twice, so that the matrix is symmetric to the last bit. There are no
atomics, so a result does not depend on the order in which programs run.

Decisions:

- Entries become float64 as they are loaded, and products are taken in it: see `gram`. Compiled for sm_80 to sm_100 and
  gfx942 the product is the float64 instruction of the tensor cores. It also keeps clear of `tl.dot` on bfloat16, which
  Triton's interpreter gets wrong.
- Tiles are small (32 tokens square), since a few hundred tokens make only a few dozen of them.
"""

# ruff: noqa: PLR0917  -- a launch passes its arguments by position
# mypy: disable-error-code="no-untyped-def"
# The arguments of a kernel are pointers or numbers, as the launch decides.

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = {"BLOCK_N": 32, "BLOCK_D": 32}
"""Tokens a side of a tile of products, and channels multiplied at a time."""

FLAG = {"BLOCK_D": 1024}
"""Channels of a token looked at at a time."""

MEAN = {"BLOCK_N": 16, "BLOCK_D": 64}
"""Tokens added at a time, and channels a program averages."""


@triton.jit
def flag_tokens(
    x,
    rows,
    keep,
    used,
    width,
    row_s,
    col_s,
    HAS_ROWS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Writes used (n,) uint8: 1 for taken tokens of x (N, width) that are kept and finite. Strides are in elements."""
    i = tl.program_id(0)
    row = i.to(tl.int64)
    if HAS_ROWS:
        row = tl.load(rows + i).to(tl.int64)
    broken = tl.zeros([BLOCK_D], tl.int32)
    for start in range(0, width, BLOCK_D):
        c = start + tl.arange(0, BLOCK_D)
        entry = tl.load(x + row * row_s + c.to(tl.int64) * col_s, mask=c < width, other=0.0).to(tl.float32)
        broken += (tl.abs(entry) < float("inf")).to(tl.int32) ^ 1
    fine = tl.sum(broken, 0) == 0
    if HAS_KEEP:
        fine = fine & (tl.load(keep + i) != 0)
    tl.store(used + i, fine.to(tl.uint8))


# Sample sizes change with the padding of a batch; to specialise on them would compile again and again.
@triton.jit(do_not_specialize=["n"])
def mean_token(
    x,
    rows,
    used,
    mean,
    n,
    width,
    row_s,
    col_s,
    HAS_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Writes mean (width,) float64 of the used tokens; 0 if there are none."""
    c = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float64)
    count = tl.zeros([BLOCK_N], tl.float64)
    for start in range(0, n, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        live = tl.load(used + i, mask=i < n, other=0) != 0
        row = i.to(tl.int64)
        if HAS_ROWS:
            row = tl.load(rows + i, mask=live, other=0).to(tl.int64)
        at = x + row[:, None] * row_s + c.to(tl.int64)[None, :] * col_s
        entry = tl.load(at, mask=live[:, None] & (c < width)[None, :], other=0.0)
        total += tl.sum(entry.to(tl.float64), 0)
        count += live.to(tl.float64)
    tl.store(mean + c, total / tl.maximum(tl.sum(count, 0), 1.0), mask=c < width)


@triton.jit(do_not_specialize=["n"])
def token_products(
    x,
    rows,
    used,
    mean,
    out,
    n,
    width,
    row_s,
    col_s,
    HAS_ROWS: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Writes out (n, n) float64, 0 for tokens that are not used: program (i, j) the tiles (i, j) and (j, i)."""
    if tl.program_id(1) > tl.program_id(0):
        return
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_i = tl.load(used + i, mask=i < n, other=0) != 0
    live_j = tl.load(used + j, mask=j < n, other=0) != 0
    row_i = i.to(tl.int64)
    row_j = j.to(tl.int64)
    if HAS_ROWS:
        row_i = tl.load(rows + i, mask=live_i, other=0).to(tl.int64)
        row_j = tl.load(rows + j, mask=live_j, other=0).to(tl.int64)
    products = tl.zeros([BLOCK_N, BLOCK_N], tl.float64)
    for start in range(0, width, BLOCK_D):
        c = start + tl.arange(0, BLOCK_D)
        there_i = live_i[:, None] & (c < width)[None, :]
        there_j = live_j[None, :] & (c < width)[:, None]
        channel = c.to(tl.int64) * col_s
        a = tl.load(x + row_i[:, None] * row_s + channel[None, :], mask=there_i, other=0.0).to(tl.float64)
        b = tl.load(x + row_j[None, :] * row_s + channel[:, None], mask=there_j, other=0.0).to(tl.float64)
        if CENTER:
            m = tl.load(mean + c, mask=c < width, other=0.0)
            a = tl.where(there_i, a - m[None, :], 0.0)
            b = tl.where(there_j, b - m[:, None], 0.0)
        products = tl.dot(a, b, products, out_dtype=tl.float64)
    lower = (i < n)[:, None] & (j[None, :] <= i[:, None])
    tl.store(out + i[:, None] * n + j[None, :], products, mask=lower)
    tl.store(out + j[None, :] * n + i[:, None], products, mask=lower)


def launch(
    x: torch.Tensor, rows: torch.Tensor | None, keep: torch.Tensor | None, *, center: bool
) -> dict[str, torch.Tensor]:
    """`matrix` and `used` of a Gram; arguments as in `gram.gram`, checked there, and at least one token."""
    n, width = len(x) if rows is None else len(rows), x.shape[1]
    used = torch.empty(n, dtype=torch.uint8, device=x.device)
    mean = torch.empty(width if center else 0, dtype=torch.float64, device=x.device)
    matrix = torch.empty(n, n, dtype=torch.float64, device=x.device)
    taken = x if rows is None else rows.contiguous()
    kept = x if keep is None else keep.contiguous().view(torch.uint8)
    sizes = (n, width, *x.stride())
    has_rows = rows is not None
    fused = {"num_warps": 4, "enable_fp_fusion": True}
    flag_tokens[(n,)](x, taken, kept, used, *sizes[1:], HAS_ROWS=has_rows, HAS_KEEP=keep is not None, **FLAG, **fused)
    if center:
        blocks = triton.cdiv(width, MEAN["BLOCK_D"])
        mean_token[(blocks,)](x, taken, used, mean, *sizes, HAS_ROWS=has_rows, **MEAN, **fused)
    tiles = triton.cdiv(n, TILE["BLOCK_N"])
    token_products[(tiles, tiles)](
        x, taken, used, mean, matrix, *sizes, HAS_ROWS=has_rows, CENTER=center, **TILE, **fused
    )
    return {"matrix": matrix, "used": used.view(torch.bool)}
