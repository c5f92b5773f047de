"""Statistics of attention rows without the S x S matrix, summed over sampled queries, per query head.

For a row with logits s_j over its visible keys, m = max s, e_j = exp(s_j - m), l = sum e, p = e / l:

    lse                 m + log l
    entropy             log l - u / l, where u = sum e_j (s_j - m)
    normalized_entropy  entropy / log(visible keys); 0 where one key is visible
    top1_mass           1 / l
    effective_keys      1 / sum p^2
    sink_mass           p at the first key that is not padding
    prev_token_mass     p at the key just before the query
    local_mass          sum of p over |a - j| < 16, a the key position of the query
    mean_distance       sum of p |a - j|

Decisions:

- The entropy is never lse - sum p s: at logits of deviation 64 that is wrong by 1e-3 and goes negative. With u it is a
  difference of a nonnegative and a nonpositive term (2303.06296 tells why entropy is worth watching).
- A row with a NaN or infinite logit at a visible key is counted in `nonfinite` and left out of the rest. A row that
  sees no key is left out silently.
- Inputs are multiplied with float32 sums whatever their dtype.

The Triton kernel runs online over blocks of keys; the torch twin takes the sampled rows at once. Both give the same
twelve numbers a row, and their reduction to heads, in float64 and in fixed order, is here.

Left out: attention-sink logits that are parameters (gpt-oss), and received mass, which is a pass over columns.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from lm_telemetry.kernels.attention_rows_geometry import (
    LOCAL_WINDOW,
    MAX_LOGIT,
    RAW_COLUMNS,
    RowGeometry,
    four_axes,
    row_geometry,
)
from lm_telemetry.kernels.attention_rows_twin import row_statistics
from lm_telemetry.kernels.dispatch import choose, launching_on

__all__ = [
    "LOCAL_WINDOW",
    "MAX_HEAD_DIM",
    "RAW_COLUMNS",
    "RowGeometry",
    "attention_rows",
    "attention_rows_at",
    "row_geometry",
]

MAX_HEAD_DIM = 256
"""Widest head the kernel takes: a block of queries and one of keys lie in shared memory."""


def attention_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    positions: torch.Tensor,
    scale: float,
    causal: bool,
    query_offset: int = 0,
    window: int | None = None,
    keep: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    first_key: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attention_rows_at` for a geometry used once; arguments as there and in `row_geometry`."""
    geometry = row_geometry(
        positions=positions,
        n_keys=key.shape[2],
        causal=causal,
        query_offset=query_offset,
        window=window,
        keep=keep,
        mask=mask,
        first_key=first_key,
    )
    return attention_rows_at(query, key, geometry, scale=scale, bias=bias, softcap=softcap, out=out)


@torch.no_grad()
def attention_rows_at(
    query: torch.Tensor,
    key: torch.Tensor,
    geometry: RowGeometry,
    *,
    scale: float,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Raw statistics of the sampled attention rows, summed over sequences and queries.

    Logits are `scale * q.k + bias`, then `softcap * tanh(logits / softcap)`, then the geometry's mask is added. On the
    Triton path nothing synchronises with the device.

    Args:
        query: (B, Hq, Sq, D), after rotary embedding and normalisation.
        key: (B, Hkv, Sk, D), not expanded: query head h uses key head h // (Hq / Hkv).
        geometry: the sampled rows and what they may see, from `row_geometry`; one serves all layers that share a mask.
        scale: factor on the dot products.
        bias: additive position bias, broadcastable to (B, Hq, Sq, Sk); None for none.
        softcap: bound on the logits' magnitude; None for none.
        out: (Hq, 12) float64 on the same device, part of a buffer; None makes one.

    Returns:
        (Hq, 12) float64, `RAW_COLUMNS`: sums over rows; max_logit is the largest of any row, -inf if none counted;
        `nonfinite` counts rows set aside, which `n_queries` does not.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    _check(query, key, geometry, bias, out)
    batch, heads, n_queries = query.shape[:3]
    if out is None:
        out = torch.empty(heads, len(RAW_COLUMNS), dtype=torch.float64, device=query.device)
    if 0 in {batch, n_queries, geometry.positions.shape[1], geometry.n_keys}:
        out.zero_()[:, MAX_LOGIT] = -torch.inf
        return out
    if bias is not None:
        bias = four_axes(bias).expand(-1, heads, n_queries, geometry.n_keys)
    with _full_precision(query.device.type):
        if choose(query, key, refusal=_refusal(query, key)).path == "triton":
            from lm_telemetry.kernels.attention_rows_kernel import launch

            with launching_on(query):
                rows = launch(query, key, geometry, scale=scale, bias=bias, softcap=softcap)
        else:
            rows = row_statistics(query, key, geometry, scale=scale, bias=bias, softcap=softcap)
        out.copy_(rows.sum((0, 2), dtype=torch.float64))
        out[:, MAX_LOGIT] = rows[..., MAX_LOGIT].amax((0, 2))
    return out


def _full_precision(device: str) -> torch.autocast | nullcontext[None]:
    """Autocast, in which a training step runs, would multiply in bfloat16."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _refusal(query: torch.Tensor, key: torch.Tensor) -> str | None:
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"heads of {query.shape[-1]} channels are wider than the kernel's {MAX_HEAD_DIM}"
    if query.stride(-1) != 1 or key.stride(-1) != 1:
        return "the channels of a head are not adjacent"
    if query.dtype != key.dtype:
        return f"queries are {query.dtype} and keys {key.dtype}"
    return None


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    geometry: RowGeometry,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    shapes = f"query {tuple(query.shape)} and key {tuple(key.shape)}"
    if query.ndim != 4 or key.ndim != 4 or len(query) != len(key) or query.shape[3] != key.shape[3]:
        raise ValueError(f"attention_rows: expected query (B, Hq, Sq, D) and key (B, Hkv, Sk, D); got {shapes}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"attention_rows: expected Hq to be a multiple of Hkv; got {shapes}")
    if key.shape[2] != geometry.n_keys:
        raise ValueError(f"attention_rows: expected {geometry.n_keys} keys, as in the geometry; got {shapes}")
    if geometry.batch not in {1, len(query)}:
        raise ValueError(f"attention_rows: expected a batch of {geometry.batch}, as in the geometry; got {shapes}")
    if bias is not None and bias.shape[-1] not in {1, geometry.n_keys}:
        raise ValueError(f"attention_rows: expected bias over {geometry.n_keys} keys; got {tuple(bias.shape)}")
    if out is not None and (out.shape != (query.shape[1], len(RAW_COLUMNS)) or out.dtype != torch.float64):
        raise ValueError(
            f"attention_rows: expected out ({query.shape[1]}, {len(RAW_COLUMNS)}) float64; "
            f"got {tuple(out.shape)}, {out.dtype}"
        )
