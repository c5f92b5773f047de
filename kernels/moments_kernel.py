"""The moments kernel: each entry is read from memory once, by one program, and never written back.

`tile_moments` holds a tile of whole tokens in registers and reduces it to `PARTIALS` sums about the tile's own mean;
`merge_tiles`, one program, brings the tiles to the common mean in float64 by the binomial formulas of `moments`.
There are no atomics, so a result does not depend on the order in which programs run.

Within a tile the entries are divided by a power of two near their largest magnitude, and for a token's RMS by one near
the token's. That is exact, and keeps fourth powers inside float32 for every float32 input.

Left out: tokens wider than `moments.MAX_WIDTH`; rows whose entries are not adjacent. The twin takes those.
"""

# ruff: noqa: PLR0917  -- a launch passes its arguments by position
# mypy: disable-error-code="no-untyped-def"
# The arguments of a kernel are pointers or numbers, as the launch decides.

from __future__ import annotations

import torch
import triton
import triton.language as tl

PARTIALS = 10
"""Sums a tile leaves: count, nonfinite, centre, s1, s2, s3, s4, absmax, zeros, outliers."""

_TILE = 4096
"""Entries of a tile when a token has fewer: 32 a thread for four warps."""


@triton.jit
def power_of_two(x):  # noqa: ANN201  -- a pair of whatever x is a tensor of
    """The power of two at or below x >= 0, kept from the ends of float32's range, and its inverse; both exact."""
    exponent = tl.minimum(tl.maximum(x.to(tl.int32, bitcast=True) >> 23, 1), 253)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def tile_moments(
    x,
    rows,
    keep,
    partials,
    n,
    width,
    stride,
    outlier_rms,
    HAS_ROWS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Reduces BLOCK_N taken rows of x (N, width) to one row of partials (tiles, 10) float64."""
    tile = tl.program_id(0)
    taken = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    used = taken < n
    if HAS_KEEP:
        used = used & (tl.load(keep + taken, mask=used, other=0) != 0)
    if HAS_ROWS:  # noqa: SIM108  -- a constexpr branch; an expression would compile both
        row = tl.load(rows + taken, mask=used, other=0).to(tl.int64)
    else:
        row = taken.to(tl.int64)
    used = used[:, None] & (column < width)[None, :]
    entry = tl.load(x + row[:, None] * stride + column[None, :], mask=used, other=0.0).to(tl.float32)
    finite = used & (tl.abs(entry) < float("inf"))
    entry = tl.where(finite, entry, 0.0)
    row_absmax = tl.max(tl.abs(entry), 1)
    absmax = tl.max(row_absmax, 0)
    scale, inverse = power_of_two(absmax)
    y = entry * inverse

    per_row = tl.sum(finite.to(tl.float32), 1)
    count = tl.sum(per_row, 0)
    centre = tl.sum(tl.sum(y, 1), 0) / tl.maximum(count, 1.0)
    d = tl.where(finite, y - centre, 0.0)
    squared = d * d
    s1 = tl.sum(tl.sum(d, 1), 0)
    s2 = tl.sum(tl.sum(squared, 1), 0)
    s3 = tl.sum(tl.sum(squared * d, 1), 0)
    s4 = tl.sum(tl.sum(squared * squared, 1), 0)

    _, row_inverse = power_of_two(row_absmax)
    square = entry * row_inverse[:, None]
    square = square * square
    mean_square = tl.sum(square, 1) / tl.maximum(per_row, 1.0)
    outlier = square > (outlier_rms * outlier_rms) * mean_square[:, None]
    nonfinite = tl.sum(tl.sum((used & (finite == 0)).to(tl.float32), 1), 0)
    zeros = tl.sum(tl.sum((finite & (entry == 0.0)).to(tl.float32), 1), 0)
    outliers = tl.sum(tl.sum(outlier.to(tl.float32), 1), 0)

    unit = scale.to(tl.float64)
    into = partials + tile * 10
    tl.store(into + 0, count.to(tl.float64))
    tl.store(into + 1, nonfinite.to(tl.float64))
    tl.store(into + 2, centre.to(tl.float64) * unit)
    tl.store(into + 3, s1.to(tl.float64) * unit)
    tl.store(into + 4, s2.to(tl.float64) * unit * unit)
    tl.store(into + 5, s3.to(tl.float64) * unit * unit * unit)
    tl.store(into + 6, s4.to(tl.float64) * unit * unit * unit * unit)
    tl.store(into + 7, absmax.to(tl.float64))
    tl.store(into + 8, zeros.to(tl.float64))
    tl.store(into + 9, outliers.to(tl.float64))


@triton.jit
def merge_tiles(partials, out, tiles, BLOCK: tl.constexpr) -> None:
    """Brings partials (tiles, 10) to the common mean: out (9,) float64, the columns of `moments.RAW_COLUMNS`."""
    lane = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.float64)
    nonfinite = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    absmax = tl.zeros([BLOCK], tl.float64)
    zeros = tl.zeros([BLOCK], tl.float64)
    outliers = tl.zeros([BLOCK], tl.float64)
    for start in range(0, tiles, BLOCK):
        use = start + lane < tiles
        tile = partials + (start + lane) * 10
        here = tl.load(tile, mask=use, other=0.0)
        count += here
        nonfinite += tl.load(tile + 1, mask=use, other=0.0)
        total += here * tl.load(tile + 2, mask=use, other=0.0) + tl.load(tile + 3, mask=use, other=0.0)
        absmax = tl.maximum(absmax, tl.load(tile + 7, mask=use, other=0.0))
        zeros += tl.load(tile + 8, mask=use, other=0.0)
        outliers += tl.load(tile + 9, mask=use, other=0.0)
    n = tl.sum(count, 0)
    mean = tl.sum(total, 0) / tl.where(n > 0, n, 1.0)

    m2 = tl.zeros([BLOCK], tl.float64)
    m3 = tl.zeros([BLOCK], tl.float64)
    m4 = tl.zeros([BLOCK], tl.float64)
    for start in range(0, tiles, BLOCK):
        use = start + lane < tiles
        tile = partials + (start + lane) * 10
        here = tl.load(tile, mask=use, other=0.0)
        d = mean - tl.load(tile + 2, mask=use, other=0.0)
        s1 = tl.load(tile + 3, mask=use, other=0.0)
        s2 = tl.load(tile + 4, mask=use, other=0.0)
        s3 = tl.load(tile + 5, mask=use, other=0.0)
        s4 = tl.load(tile + 6, mask=use, other=0.0)
        m2 += s2 - 2 * d * s1 + here * d * d
        m3 += s3 - 3 * d * s2 + 3 * d * d * s1 - here * d * d * d
        m4 += s4 - 4 * d * s3 + 6 * d * d * s2 - 4 * d * d * d * s1 + here * d * d * d * d

    tl.store(out + 0, n)
    tl.store(out + 1, tl.sum(nonfinite, 0))
    tl.store(out + 2, mean)
    tl.store(out + 3, tl.sum(m2, 0))
    tl.store(out + 4, tl.sum(m3, 0))
    tl.store(out + 5, tl.sum(m4, 0))
    tl.store(out + 6, tl.max(absmax, 0))
    tl.store(out + 7, tl.sum(zeros, 0))
    tl.store(out + 8, tl.sum(outliers, 0))


def tile_shape(width: int) -> tuple[int, int, int]:
    """(tokens a tile, padded width, warps) for tokens of `width` entries."""
    block_d = triton.next_power_of_2(max(width, 16))
    block_n = max(1, _TILE // block_d)
    warps = 4 * block_n * block_d // _TILE
    return block_n, block_d, 4 if warps <= 4 else 2 * warps  # a token wider than a tile spills at as many a warp


def launch(
    x: torch.Tensor,
    out: torch.Tensor,
    rows: torch.Tensor | None,
    keep: torch.Tensor | None,
    outlier_rms: float,
) -> torch.Tensor:
    """Raw moments of `x` (N, D) into `out` (9,) float64; arguments as in `moments.moments`, checked there."""
    n, width = len(x) if rows is None else len(rows), x.shape[1]
    block_n, block_d, warps = tile_shape(width)
    tiles = max(1, triton.cdiv(n, block_n))
    partials = torch.empty(tiles, PARTIALS, dtype=torch.float64, device=x.device)
    result = out if out.is_contiguous() else torch.empty_like(out)
    tile_moments[(tiles,)](
        x,
        x if rows is None else rows.contiguous(),
        x if keep is None else keep.contiguous().view(torch.uint8),
        partials,
        n,
        width,
        x.stride(0),
        outlier_rms,
        HAS_ROWS=rows is not None,
        HAS_KEEP=keep is not None,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    merge_tiles[(1,)](partials, result, tiles, BLOCK=128, num_warps=4, enable_fp_fusion=True)
    return out if result is out else out.copy_(result)
