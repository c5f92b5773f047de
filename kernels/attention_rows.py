"""Statistics of attention rows without the S x S matrix, summed over sampled queries, per query head.

For a row with logits s_j over its visible keys, m = max s, e_j = exp(s_j - m), l = sum e, p = e / l:

    lse                 m + log l
    entropy             log l - u / l, where u = sum e_j (s_j - m)
    normalized_entropy  entropy / log(visible keys); 0 where one key is visible
    max_logit           max s
    top1_mass           1 / l
    effective_keys      1 / sum p^2
    sink_mass           p at the first key of the query's sequence that is not padding
    prev_token_mass     p at the key just before the query's own, a
    local_mass          sum of p over |a - j| < 16
    mean_distance       sum of p |a - j|
    induction_score     p at the row's induction key (see `induction`), over the `n_induction` rows that see theirs

Attention-sink logits are parameters of some models (gpt-oss): one logit a head that joins the softmax of every row as a
slot without a value. The slot is then in m, l, u and sum p^2, hence in `lse`, `entropy` (over keys and slot, and
normalized by the log of one more than the visible keys), `top1_mass` and `effective_keys`; `sink_mass` is the first
key's probability plus the slot's. `max_logit` remains that of the keys, which is what grows with queries and keys; and
the slot has no place, so it is not local, and at no distance.

Decisions:

- The entropy is never lse - sum p s: at logits of deviation 64 that is wrong by 1e-3 and goes negative. With u it is a
  difference of a nonnegative and a nonpositive term (2303.06296 tells why entropy is worth watching).
- A row with a NaN or infinite logit at a visible key or in the slot is counted in `nonfinite` and left out of the rest.
  A row that sees no key is left out silently.
- Inputs are multiplied with float32 sums whatever their dtype.

The Triton kernel runs online over blocks of keys; the torch twin takes blocks of rows. Both give the same fourteen
numbers a row, and their reduction to heads, in float64 and in fixed order, is here. With all rows taken, memory beyond
the arguments still grows with S only.

Left out: received mass, which is a pass over columns.
"""

from __future__ import annotations

import torch

from lm_telemetry.kernels.attention_rows_geometry import (
    LOCAL_WINDOW,
    MAX_LOGIT,
    RAW_COLUMNS,
    Mask,
    RowGeometry,
    four_axes,
    row_geometry,
)
from lm_telemetry.kernels.attention_rows_twin import row_lse, row_statistics
from lm_telemetry.kernels.dispatch import choose, launching_on
from lm_telemetry.kernels.head_operands import full_precision, head_obstacle

__all__ = [
    "LOCAL_WINDOW",
    "RAW_COLUMNS",
    "RowGeometry",
    "attention_lse",
    "attention_rows",
    "attention_rows_at",
    "refusal",
    "row_geometry",
]


def attention_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    positions: torch.Tensor,
    scale: float,
    causal: bool,
    query_offset: int = 0,
    own_keys: torch.Tensor | None = None,
    window: int | None = None,
    keep: torch.Tensor | None = None,
    mask: Mask | None = None,
    segments: torch.Tensor | None = None,
    first_key: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    induction_key: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attention_rows_at` for a geometry used once; arguments as there and in `row_geometry`."""
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
        first_key=first_key,
    )
    return attention_rows_at(
        query,
        key,
        geometry,
        scale=scale,
        bias=bias,
        softcap=softcap,
        sinks=sinks,
        induction_key=induction_key,
        out=out,
    )


@torch.no_grad()
def attention_rows_at(
    query: torch.Tensor,
    key: torch.Tensor,
    geometry: RowGeometry,
    *,
    scale: float,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    induction_key: torch.Tensor | None = None,
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
        sinks: (Hq,) attention-sink logits, neither scaled nor capped; None for none.
        induction_key: (1 or B, n) int64 of the sampled queries, from `induction.induction_keys`, -1 where there is
            none; None counts no row.
        out: (Hq, 14) float64 on the same device, part of a buffer; None makes one.

    Returns:
        (Hq, 14) float64, `RAW_COLUMNS`: sums over rows; max_logit is the largest of any row, -inf if none counted;
        `nonfinite` counts rows set aside, which `n_queries` and `n_induction` do not.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    _check(query, key, geometry, bias, sinks)
    _check_rows(query, geometry, induction_key, out)
    batch, heads, n_queries = query.shape[:3]
    if out is None:
        out = torch.empty(heads, len(RAW_COLUMNS), dtype=torch.float64, device=query.device)
    if 0 in {batch, n_queries, geometry.positions.shape[1], geometry.n_keys}:
        out.zero_()[:, MAX_LOGIT] = -torch.inf
        return out
    bias = _expanded(bias, query, geometry)
    with full_precision(query.device.type):
        if choose(query, key, refusal=head_obstacle(query, key)).path == "triton":
            from lm_telemetry.kernels.attention_rows_launch import launch

            with launching_on(query):
                rows = launch(
                    query,
                    key,
                    geometry,
                    scale=scale,
                    bias=bias,
                    softcap=softcap,
                    sinks=sinks,
                    induction_key=induction_key,
                )
        else:
            rows = row_statistics(
                query,
                key,
                geometry,
                scale=scale,
                bias=bias,
                softcap=softcap,
                sinks=sinks,
                induction_key=induction_key,
            )
        out.copy_(rows.sum((0, 2), dtype=torch.float64))
        out[:, MAX_LOGIT] = rows[..., MAX_LOGIT].amax((0, 2))
    return out


@torch.no_grad()
def attention_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    query_offset: int = 0,
    own_keys: torch.Tensor | None = None,
    window: int | None = None,
    mask: Mask | None = None,
    segments: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The log-sum-exp of every row's logits, with which p = exp(s - lse) is known key by key; O(S) memory.

    Arguments as in `attention_rows_at` and `row_geometry`.

    Returns:
        (B, Hq, Sq) float32: NaN where a visible logit, or the head's sink, is NaN or infinite; -inf where no key is
        seen, also where there is a sink.

    Raises:
        ValueError: a shape or dtype is not as there.
    """
    geometry = row_geometry(
        positions=torch.arange(query.shape[2], device=query.device),
        n_keys=key.shape[2],
        causal=causal,
        query_offset=query_offset,
        own_keys=own_keys,
        window=window,
        mask=mask,
        segments=segments,
    )
    _check(query, key, geometry, bias, sinks)
    if 0 in {*query.shape[:3], geometry.n_keys}:
        return query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    bias = _expanded(bias, query, geometry)
    with full_precision(query.device.type):
        if choose(query, key, refusal=head_obstacle(query, key)).path == "triton":
            from lm_telemetry.kernels.attention_rows_launch import launch

            with launching_on(query):
                return launch(query, key, geometry, scale=scale, bias=bias, softcap=softcap, sinks=sinks, lse_only=True)
        return row_lse(query, key, geometry, scale=scale, bias=bias, softcap=softcap, sinks=sinks)


def refusal(query: torch.Tensor, key: torch.Tensor) -> str | None:
    """Why tensors on an accelerator go to the twin; None where the kernel takes them, and on the CPU."""
    if query.device.type == "cpu":
        return None
    choice = choose(query, key, refusal=head_obstacle(query, key))
    return choice.reason if choice.path == "torch" else None


def _expanded(bias: torch.Tensor | None, query: torch.Tensor, geometry: RowGeometry) -> torch.Tensor | None:
    """The bias with all its axes but the first."""
    return None if bias is None else four_axes(bias).expand(-1, query.shape[1], query.shape[2], geometry.n_keys)


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    geometry: RowGeometry,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
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
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise ValueError(f"attention_rows: expected sinks ({query.shape[1]},); got {tuple(sinks.shape)}")


def _check_rows(
    query: torch.Tensor, geometry: RowGeometry, induction_key: torch.Tensor | None, out: torch.Tensor | None
) -> None:
    n = geometry.positions.shape[1]
    if induction_key is not None and (
        induction_key.ndim != 2 or len(induction_key) not in {1, len(query)} or induction_key.shape[1] != n
    ):
        raise ValueError(
            f"attention_rows: expected induction_key (1 or {len(query)}, {n}); got {tuple(induction_key.shape)}"
        )
    if out is not None and (out.shape != (query.shape[1], len(RAW_COLUMNS)) or out.dtype != torch.float64):
        raise ValueError(
            f"attention_rows: expected out ({query.shape[1]}, {len(RAW_COLUMNS)}) float64; "
            f"got {tuple(out.shape)}, {out.dtype}"
        )
