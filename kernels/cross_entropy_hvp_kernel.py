"""The cross-entropy HVP kernel: a program takes one row of logits and tangent through two passes over the vocabulary.

In the first pass every lane keeps, of the columns it has seen, the largest logit m, the tangent c there, and

    s = sum e^(z - m),   t = sum e^(z - m) (u - c)

which cost one exponential a column and no exchange between lanes; both are rescaled and moved to the new centre when a
larger logit comes (the online softmax of arXiv 1805.02867, with a mean carried along). After the loop the lanes are
brought to the largest of their m. The centre is then the tangent at the row's largest logit, and <u> - c is exact to
rounding of the spread, however little mass is left for the other columns. The second pass reads the row again, from
the L2 cache where it fits, and writes.

A row belongs to one program, which reads a block before it writes it, so the result may take the tangent's place; and
no result depends on the order in which programs run. Rows without a label are written without being read.

Left out: rows whose entries are not adjacent. The twin takes those.
"""

# ruff: noqa: PLR0917  -- a launch passes its arguments by position
# mypy: disable-error-code="no-untyped-def"
# The arguments of a kernel are pointers or numbers, as the launch decides.

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch

_BLOCK = 2048
"""Columns a pass takes at a time, at most: 8 a thread for eight warps, a load of 16 bytes in bfloat16."""


@triton.jit
def hvp_row(
    logits,
    tangent,
    labels,
    out,
    width,
    logits_stride,
    tangent_stride,
    out_stride,
    labels_stride,
    scale,
    ignore_index,
    BLOCK: tl.constexpr,
) -> None:
    """Row `program_id` of out (N, width) from that of logits and tangent; see `cross_entropy_hvp`."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    into = out + row * out_stride
    if tl.load(labels + row * labels_stride) == ignore_index:
        for start in range(0, width, BLOCK):
            column = start + lane
            tl.store(into + column, tl.zeros([BLOCK], out.dtype.element_ty), mask=column < width)
    else:
        of_logits = logits + row * logits_stride
        of_tangent = tangent + row * tangent_stride
        m = tl.full([BLOCK], float("-inf"), tl.float32)
        s = tl.zeros([BLOCK], tl.float32)
        t = tl.zeros([BLOCK], tl.float32)
        c = tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            column = start + lane
            z = tl.load(of_logits + column, mask=column < width, other=float("-inf")).to(tl.float32)
            u = tl.load(of_tangent + column, mask=column < width, other=0.0).to(tl.float32)
            larger = z > m
            ratio = tl.where(z == m, 1.0, tl.exp(-tl.abs(z - m)))  # equal may be -inf twice
            t = tl.where(larger, ratio * (t + s * (c - u)), t + ratio * (u - c))
            s = tl.where(larger, ratio * s + 1.0, s + ratio)
            c = tl.where(larger, u, c)
            m = tl.where(larger, z, m)

        largest, where = tl.max(m, 0, return_indices=True)
        centre = tl.sum(tl.where(lane == where, c, 0.0), 0)
        weight = tl.exp(m - largest)  # NaN where the largest is infinite, and so the row: as softmax has it
        total = tl.sum(weight * s, 0)
        mean = tl.sum(weight * (t + s * (c - centre)), 0) / total
        factor = scale / total
        for start in range(0, width, BLOCK):
            column = start + lane
            z = tl.load(of_logits + column, mask=column < width, other=float("-inf")).to(tl.float32)
            u = tl.load(of_tangent + column, mask=column < width, other=0.0).to(tl.float32)
            value = factor * tl.exp(z - largest) * ((u - centre) - mean)
            tl.store(into + column, value.to(out.dtype.element_ty), mask=column < width)


def launch_options(width: int) -> dict[str, int]:
    """Block and warps for rows of `width` columns."""
    block = min(_BLOCK, triton.next_power_of_2(max(width, 128)))
    return {"BLOCK": block, "num_warps": max(4, block // 256)}


def launch(
    logits: torch.Tensor,
    tangent: torch.Tensor,
    labels: torch.Tensor,
    scale: float,
    ignore_index: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """The product into `out`; arguments as in `cross_entropy_hvp.cross_entropy_hvp`, checked there."""
    N, V = logits.shape
    hvp_row[(N,)](
        logits,
        tangent,
        labels,
        out,
        V,
        logits.stride(0),
        tangent.stride(0),
        out.stride(0),
        labels.stride(0),
        scale,
        ignore_index,
        **launch_options(V),
        enable_fp_fusion=True,
    )
    return out
