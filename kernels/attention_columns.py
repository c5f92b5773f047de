"""Attention columns: what each key receives from all queries, without the S x S matrix, and what that says of a head.

    mass_j = sum over queries i of p_ij,    p_ij = exp(s_ij - lse_i)

The masses of a head's keys sum to the number of rows that count, less what attention-sink logits take. Heavy hitters
(2306.14048) are keys of large mass, attention sinks (2309.17453) the extreme. With the log-sum-exp of each row known
this is one more pass over the scores: half the products of attention's forward.

Decisions:

- Every query counts, since what a key receives is a sum over them; a sample would say nothing of rare readers.
- The log-sum-exp is an argument. The backend's own may be given; attention sinks are in it and nowhere else.
- A row whose log-sum-exp is -inf sees nothing and gives nothing. One with NaN or +inf is broken: it gives nothing
  either, and `broken_rows` counts it.
- s - lse is capped at 0: at logits of 10,000 float32 is only so sure of either, but no probability exceeds 1.
- The Triton kernel holds keys and walks queries; the torch twin takes blocks of queries. Both are O(S) in memory and
  add in a fixed order.
- Summaries are over keys that some kept query may see, so that padding does not make attention look uneven.

Left out: gradients.
"""

from __future__ import annotations

import torch

from lm_telemetry.kernels import attention_columns_twin as twin
from lm_telemetry.kernels.attention_rows_geometry import four_axes
from lm_telemetry.kernels.dispatch import choose, launching_on
from lm_telemetry.kernels.head_operands import full_precision, head_obstacle

SUMMARY_COLUMNS = ("n_sequences", "n_keys", "mean_mass", "max_mass", "gini", "heavy_share")
"""What `summary` gives of a head, before the heaviest keys."""

HEAVY = 10
"""One in this many keys, rounded up, is heavy."""


@torch.no_grad()
def received_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    query_offset: int = 0,
    own_keys: torch.Tensor | None = None,
    window: int | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    segments: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention that each key receives, summed over queries.

    Logits are `scale * q.k + bias`, then `softcap * tanh(logits / softcap)`, then an additive mask is added. A query's
    own key is a = i + query_offset, or own_keys[i]. On the Triton path nothing synchronises with the device.

    Args:
        query: (B, Hq, Sq, D), after rotary embedding and normalisation.
        key: (B, Hkv, Sk, D), not expanded: query head h uses key head h // (Hq / Hkv).
        lse: (B, Hq, Sq) float32, natural log of the sum of exponentials of each row's logits, sinks among them.
        scale: factor on the dot products.
        causal: whether key j is hidden from query i unless j <= a.
        query_offset: a - i, where `own_keys` is None.
        own_keys: (1 or B, Sq) int64, a of every query, where it is not its index plus an offset (static caches).
        window: keys with a - j >= window are hidden; None for none.
        mask: broadcastable to (B, Hq, Sq, Sk). Bool: True may attend. Floating: added to the logits, except that
            entries at or below half the dtype's minimum (and -inf) hide the key. None for none.
        bias: additive position bias, broadcastable likewise; None for none.
        softcap: bound on the logits' magnitude; None for none.
        segments: (1 or B, Sk) integers, which of the sequences packed into a row each key is of; keys of another than
            a's are hidden. None where a row holds one sequence.
        keep: (1 or B, Sq) bool, False leaves a query out (padding); None keeps all.

    Returns:
        (B, Hq, Sk) float32, nonnegative; 0 where no counted row sees the key.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    _check_products(query, key, lse, bias)
    (batch, heads, n_queries, _), n_keys = query.shape, key.shape[2]
    view = _visibility(
        n_queries,
        n_keys,
        causal=causal,
        query_offset=query_offset,
        own_keys=own_keys,
        window=window,
        mask=mask,
        segments=segments,
        keep=keep,
    )
    if 0 in {batch, heads, n_queries, n_keys}:
        return torch.zeros(batch, heads, n_keys, dtype=torch.float32, device=query.device)
    counts = lse.isfinite() if keep is None else lse.isfinite() & keep[:, None]
    log_total = torch.where(counts, lse, torch.inf)
    bias = None if bias is None else four_axes(bias)
    with full_precision(query.device.type):
        if choose(query, key, refusal=head_obstacle(query, key)).path == "triton":
            from lm_telemetry.kernels.attention_columns_kernel import launch

            with launching_on(query):
                return launch(query, key, log_total, view, scale=scale, bias=bias, softcap=softcap)
        return twin.mass_by_key(query, key, log_total, view, scale=scale, bias=bias, softcap=softcap)


@torch.no_grad()
def visible_keys(
    n_queries: int,
    n_keys: int,
    *,
    causal: bool,
    query_offset: int = 0,
    own_keys: torch.Tensor | None = None,
    window: int | None = None,
    mask: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    device: torch.device,
) -> torch.Tensor:
    """Keys that some kept query may see: what padding leaves.

    It depends on no query or key, so one serves all layers that share a mask. Arguments as in `received_mass`.

    Returns:
        (1 or B, 1 or Hq, Sk) bool.

    Raises:
        ValueError: a shape or dtype is not as in `received_mass`.
    """
    view = _visibility(
        n_queries,
        n_keys,
        causal=causal,
        query_offset=query_offset,
        own_keys=own_keys,
        window=window,
        mask=mask,
        segments=segments,
        keep=keep,
    )
    return twin.visible_keys(view, keep, device)


def broken_rows(lse: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """(B, Hq) int64: kept rows whose log-sum-exp, (B, Hq, Sq), is NaN or +inf; `keep` (1 or B, Sq) as above."""
    broken = ~(lse < torch.inf)
    return (broken if keep is None else broken & keep[:, None]).sum(-1)


@torch.no_grad()
def summary(mass: torch.Tensor, visible: torch.Tensor, *, top: int) -> torch.Tensor:
    """How evenly a head's attention is spread over the keys that may be seen.

    With the n visible keys of a sequence sorted, x_0 the largest mass and x_(n-1) the least, T their sum:

        gini         sum_k (n - 1 - 2 k) x_k / (n T): 0 if all are equal, 1 - 1/n if one has all
        heavy_share  (x_0 + ... + x_(h-1)) / T, h = ceil(n / 10) (2306.14048)

    Both are averaged over the sequences with T > 0, counted in n_sequences; n_keys is a sum over these, mean_mass their
    total mass over n_keys, max_mass the largest of all. Nothing synchronises with the device.

    Args:
        mass: (B, Hq, Sk) from `received_mass`.
        visible: (1 or B, 1 or Hq, Sk) bool from `visible_keys`.
        top: how many of the heaviest keys of the first sequence to name.

    Returns:
        (Hq, 6 + 2 top) float64: `SUMMARY_COLUMNS`, then positions of the heaviest keys, largest first, then their
        masses. Without any mass the columns are 0; where a position does not exist it is -1 and its mass 0.
    """
    batch, heads, n_keys = mass.shape
    # Hidden keys sort behind all others. Stable, so that of equal keys the first is named first.
    x, position = torch.where(visible, mass.double(), -1.0).sort(dim=-1, descending=True, stable=True)
    x = x.clamp_(min=0)
    n = visible.sum(-1).expand(batch, heads)
    k = torch.arange(n_keys, device=mass.device)
    total = x.sum(-1)
    some = total > 0
    divisor = torch.where(some, total, 1.0)
    spread = ((n[..., None] - 1 - 2 * k) * x).sum(-1) / (n.clamp(min=1) * divisor)
    heavy = torch.where(k < ((n + HEAVY - 1) // HEAVY)[..., None], x, 0.0).sum(-1) / divisor
    sequences, keys = some.sum(0), torch.where(some, n, 0).sum(0)
    columns = (
        sequences,
        keys,
        total.sum(0) / keys.clamp(min=1),
        x.amax((0, 2)) if x.numel() else total.sum(0),
        torch.where(some, spread, 0.0).sum(0) / sequences.clamp(min=1),
        heavy.sum(0) / sequences.clamp(min=1),
    )
    named = torch.zeros(heads, 2, top, dtype=torch.float64, device=mass.device)
    named[:, 0] = -1.0
    if batch:
        there = k[:top] < n[0, :, None]
        named[:, 0, : len(k)] = torch.where(there, position[0, :, :top], -1).double()
        named[:, 1, : len(k)] = x[0, :, :top]
    return torch.cat((torch.stack([c.double() for c in columns], -1), named.flatten(1)), -1)


def _visibility(
    n_queries: int,
    n_keys: int,
    *,
    causal: bool,
    query_offset: int,
    own_keys: torch.Tensor | None,
    window: int | None,
    mask: torch.Tensor | None,
    segments: torch.Tensor | None,
    keep: torch.Tensor | None,
) -> twin.Visibility:
    def expect(holds: bool, expected: str, got: torch.Tensor) -> None:
        if not holds:
            raise ValueError(f"attention_columns: expected {expected}; got {tuple(got.shape)}, {got.dtype}")

    if own_keys is not None:
        known = own_keys.ndim == 2 and own_keys.shape[1] == n_queries and own_keys.dtype == torch.int64
        expect(known, f"own_keys (1 or B, {n_queries}), int64", own_keys)
    if mask is not None:
        known = (mask.dtype == torch.bool or mask.is_floating_point()) and mask.ndim <= 4
        expect(known, "a bool or floating mask broadcastable to (B, Hq, Sq, Sk)", mask)
        mask = four_axes(mask)
        known = mask.shape[2] in {1, n_queries} and mask.shape[3] in {1, n_keys}
        expect(known, f"a mask over {n_queries} queries and {n_keys} keys", mask)
    if segments is not None:
        known = segments.ndim == 2 and segments.shape[1] == n_keys and not segments.is_floating_point()
        expect(known, f"segments (1 or B, {n_keys}) of integers", segments)
        known = own_keys is not None or 0 <= query_offset <= n_keys - n_queries
        expect(known, f"segments over the keys of all {n_queries} queries", segments)
    if keep is not None:
        known = keep.ndim == 2 and keep.shape[1] == n_queries and keep.dtype == torch.bool
        expect(known, f"keep (1 or B, {n_queries}), bool", keep)
    return twin.Visibility(
        n_queries=n_queries,
        n_keys=n_keys,
        causal=causal,
        query_offset=query_offset,
        own_keys=own_keys,
        window=window,
        mask=mask,
        segments=segments,
    )


def _check_products(query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, bias: torch.Tensor | None) -> None:
    shapes = f"query {tuple(query.shape)} and key {tuple(key.shape)}"
    if query.ndim != 4 or key.ndim != 4 or len(query) != len(key) or query.shape[3] != key.shape[3]:
        raise ValueError(f"attention_columns: expected query (B, Hq, Sq, D) and key (B, Hkv, Sk, D); got {shapes}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"attention_columns: expected Hq to be a multiple of Hkv; got {shapes}")
    if lse.shape != query.shape[:3] or lse.dtype != torch.float32:
        raise ValueError(
            f"attention_columns: expected lse {tuple(query.shape[:3])}, float32; got {tuple(lse.shape)}, {lse.dtype}"
        )
    if bias is not None:
        axes = four_axes(bias).shape if bias.ndim <= 4 else ()
        if len(axes) != 4 or axes[2] not in {1, query.shape[2]} or axes[3] not in {1, key.shape[2]}:
            raise ValueError(
                f"attention_columns: expected bias broadcastable to (B, Hq, {query.shape[2]}, {key.shape[2]}); "
                f"got {tuple(bias.shape)}"
            )
