"""Launches of the attention-row kernel.

Masks and biases are given to it as copies of the rows' own, aligned, in float32, so that it may read them unguarded.
The copy of a mask serves all layers that share a geometry. Where there are many rows they are copied and launched a
part at a time, so that the copies do not grow with the square of the length; without masks and biases nothing is
copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton

from lm_telemetry.kernels.attention_rows_geometry import (
    HIDDEN,
    LOCAL_WINDOW,
    RAW_COLUMNS,
    RowGeometry,
    aligned,
    rows_of,
)
from lm_telemetry.kernels.attention_rows_kernel import block_sizes, launch_options, row_kernel
from lm_telemetry.kernels.dispatch import interpreting
from lm_telemetry.kernels.head_operands import with_strides

if TYPE_CHECKING:
    from collections.abc import Iterator

_COPIED = 1 << 24
"""Entries of masks and biases copied for one launch: 64 MiB in float32."""

_ROWS = 64
"""But at least so many rows of all sequences and heads."""


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    geometry: RowGeometry,
    *,
    scale: float,
    bias: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    induction_key: torch.Tensor | None = None,
    lse_only: bool = False,
) -> torch.Tensor:
    """Rows (B, Hq, n, 14) float32, or with `lse_only` (B, Hq, n).

    Arguments as in `attention_rows.attention_rows_at`, checked there.
    """
    done = [
        _launch(
            query,
            key,
            part,
            scale=scale,
            bias=bias,
            softcap=softcap,
            sinks=sinks,
            induction_key=None if induction_key is None else induction_key[:, rows],
            lse_only=lse_only,
        )
        for rows, part in _parts(query, geometry, bias)
    ]
    return done[0] if len(done) == 1 else torch.cat(done, dim=2)


def _parts(
    query: torch.Tensor, geometry: RowGeometry, bias: torch.Tensor | None
) -> Iterator[tuple[slice, RowGeometry]]:
    """Rows that are launched together: all, or so many that copies of masks and biases stay small."""
    n, copied = geometry.positions.shape[1], 0
    for tensor in (geometry.mask, bias):
        if isinstance(tensor, torch.Tensor):
            copied += max(len(tensor), geometry.batch) * tensor.shape[1] * geometry.n_keys
        elif tensor is not None:  # a function, of who knows how many sequences and heads
            copied += query.shape[0] * query.shape[1] * geometry.n_keys
    step = n if copied == 0 else max(_ROWS, _COPIED // copied)
    if step >= n:
        yield slice(None), geometry
        return
    for start in range(0, n, step):
        rows = slice(start, start + step)
        yield rows, geometry.part(rows)


def _launch(
    query: torch.Tensor,
    key: torch.Tensor,
    geometry: RowGeometry,
    *,
    scale: float,
    bias: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    induction_key: torch.Tensor | None,
    lse_only: bool,
) -> torch.Tensor:
    (batch, heads, _, width), (_, kv_heads, n_keys, _) = query.shape, key.shape
    n = geometry.positions.shape[1]
    shape = (batch, heads, n) if lse_only else (batch, heads, n, len(RAW_COLUMNS))
    rows = torch.empty(shape, dtype=torch.float32, device=query.device)
    positions, keep, segments = geometry.positions, geometry.keep, geometry.segments
    first = None if lse_only and segments is None else geometry.first
    mask = None if geometry.mask is None else geometry.padded_mask
    bias = None if bias is None else aligned(rows_of(bias, positions))
    whole_head = query.dtype != torch.float32
    sizes = block_sizes(heads // kv_heads * n, width, whole_head=whole_head)
    row_blocks = triton.cdiv(heads // kv_heads * n, sizes["BLOCK_M"])
    row_kernel[(batch * kv_heads * row_blocks,)](
        query,
        key,
        rows,
        *with_strides(positions, (batch, n), query),
        *with_strides(geometry.own, (batch, n), query),
        *with_strides(keep, (batch, n), query),
        *with_strides(first, (batch, n), query),
        *with_strides(induction_key, (batch, n), query),
        *with_strides(segments, (batch, n_keys), query),
        *with_strides(sinks, (heads,), query),
        *with_strides(mask, (batch, heads, n, -1), query)[:4],
        *with_strides(bias, (batch, heads, n, -1), query)[:4],
        *query.stride()[:3],
        *key.stride()[:3],
        scale,
        softcap or 1.0,
        n,
        n_keys,
        width,
        geometry.window or 0,
        heads,
        kv_heads,
        row_blocks,
        CAUSAL=geometry.causal,
        HAS_WINDOW=geometry.window is not None,
        HAS_KEEP=keep is not None,
        HAS_FIRST=first is not None,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_MASK=mask is not None,
        HAS_SEGMENTS=segments is not None,
        HAS_SINKS=sinks is not None,
        HAS_INDUCTION=induction_key is not None,
        LSE_ONLY=lse_only,
        UPCAST=whole_head and interpreting(),
        LOCAL=LOCAL_WINDOW,
        HIDDEN=HIDDEN,
        **sizes,
        **launch_options(whole_head=whole_head),
    )
    return rows
