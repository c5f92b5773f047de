"""Oracles in float64 for the kernels and their twins: the definitions, written as plainly as they can be.

Every score of every query is formed, grouped keys are repeated, moments take two passes. Nothing is shared with the
code that is measured against these, so an error cannot hide in both. For tests; far too slow and large for a run.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch


def moments(x: torch.Tensor, *, rows: torch.Tensor | None = None, keep: torch.Tensor | None = None) -> dict[str, float]:
    """`moments.RAW_COLUMNS` by name, of the entries of x (N, D), or of its `rows` (n,) whose `keep` (n,) is True."""
    tokens = x.double()
    if rows is not None:
        tokens = tokens[rows]
    if keep is not None:
        tokens = tokens[keep]
    entries = tokens[tokens.isfinite()]
    outliers = 0
    for token in tokens:
        finite = token[token.isfinite()]
        if len(finite):
            outliers += int((finite.abs() > 6 * finite.square().mean().sqrt()).sum())
    mean = entries.mean().item() if len(entries) else 0.0
    return {
        "count": float(len(entries)),
        "nonfinite": float(tokens.numel() - len(entries)),
        "mean": mean,
        "m2": (entries - mean).pow(2).sum().item(),
        "m3": (entries - mean).pow(3).sum().item(),
        "m4": (entries - mean).pow(4).sum().item(),
        "absmax": entries.abs().max().item() if len(entries) else 0.0,
        "zeros": float((entries == 0).sum()),
        "outliers": float(outliers),
    }


def logits(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scale: float,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """(B, Hq, Sq, Sk) float64: what is masked and goes into the softmax."""
    repeated = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.einsum("bhqd,bhkd->bhqk", query.double(), repeated) * scale
    if bias is not None:
        scores = scores + bias.double()
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def visible_rows(
    shape: tuple[int, ...],
    *,
    causal: bool,
    query_offset: int = 0,
    own_keys: torch.Tensor | None = None,
    window: int | None = None,
    mask: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Who may see whom, bool of `shape` (B, Hq, Sq, Sk), and each query's own key (B, Sq).

    Arguments as in `attention_rows_geometry.row_geometry`.
    """
    batch, _, n_queries, n_keys = shape
    own = torch.arange(n_queries) + query_offset if own_keys is None else own_keys
    own = own.expand(batch, n_queries)
    allowed = torch.ones(shape, dtype=torch.bool)
    if mask is not None:
        allowed = allowed & (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)
    for b in range(batch):
        for i in range(n_queries):
            at = int(own[b, i])
            for j in range(n_keys):
                if (
                    (causal and j > at)
                    or (window is not None and at - j >= window)
                    or (segments is not None and segments[b % len(segments), j] != segments[b % len(segments), at])
                ):
                    allowed[b, :, i, j] = False
    return allowed, own


def attention_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    positions: torch.Tensor,
    scale: float,
    keep: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    first_key: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    induction_key: torch.Tensor | None = None,
    **visibility: Any,
) -> torch.Tensor:
    """(Hq, 14) float64, `attention_rows.RAW_COLUMNS`, row by row from the whole matrix; arguments as there."""
    batch, heads = query.shape[:2]
    scores = logits(query, key, scale=scale, bias=bias, softcap=softcap)
    allowed, own = visible_rows(scores.shape, mask=mask, segments=segments, **visibility)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.double()
    result = torch.zeros(heads, 14, dtype=torch.float64)
    result[:, 4] = -torch.inf
    everywhere = positions.expand(batch, -1) if positions.ndim == 1 else positions
    for b in range(batch):
        for r, i in enumerate(everywhere[b].tolist()):
            if keep is not None and not keep.expand(batch, -1)[b, r]:
                continue
            at = int(own[b, i])
            first = 0 if first_key is None else int(first_key[b])
            if segments is not None:
                ids = segments[b % len(segments)].tolist()
                first = ids.index(ids[at])
            target = -1 if induction_key is None else int(induction_key[b % len(induction_key), r])
            for h in range(heads):
                seen = torch.nonzero(allowed[b, h, i]).flatten().tolist()
                slot = None if sinks is None else sinks[h].double()
                if seen:
                    _add_row(result[h], scores[b, h, i, seen], seen, at=at, first=first, slot=slot, target=target)
    return result


def _add_row(
    into: torch.Tensor,
    row: torch.Tensor,
    seen: list[int],
    *,
    at: int,
    first: int,
    slot: torch.Tensor | None,
    target: int,
) -> None:
    """Adds to `into` (14,) what one row of logits over the keys `seen`, and the slot's, has to say."""
    whole = row if slot is None else torch.cat([row, slot[None]])
    if not bool(whole.float().isfinite().all()):  # beyond float32, too: there the kernels' logits are infinite
        into[13] += 1
        return
    p = torch.softmax(whole, dim=0)
    entropy = -torch.special.xlogy(p, p).sum().item()
    distance = torch.tensor([abs(at - j) for j in seen], dtype=torch.float64)
    keys = p[: len(seen)]
    at_key = dict(zip(seen, keys.tolist(), strict=True))
    into[0] += 1
    into[1] += entropy
    into[2] += entropy / math.log(len(p)) if len(p) > 1 else 0.0
    into[3] += torch.logsumexp(whole, dim=0)
    into[4] = max(float(into[4]), float(row.max()))
    into[5] += p.max()
    into[6] += 1 / p.square().sum()
    into[7] += at_key.get(first, 0.0) + (0.0 if slot is None else float(p[-1]))
    into[8] += at_key.get(at - 1, 0.0)
    into[9] += keys[distance < 16].sum()
    into[10] += (keys * distance).sum()
    into[11] += target in at_key
    into[12] += at_key.get(target, 0.0)


def attention_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scale: float,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    **visibility: Any,
) -> torch.Tensor:
    """(B, Hq, Sq) float64: log sum exp of each row; NaN, or -inf where no key is seen, as `attention_rows` has it."""
    scores = logits(query, key, scale=scale, bias=bias, softcap=softcap)
    allowed, _ = visible_rows(scores.shape, mask=mask, **visibility)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.double()
    result = torch.full(scores.shape[:3], -torch.inf, dtype=torch.float64)
    for b, h, i in itertools.product(*(range(n) for n in scores.shape[:3])):
        row = scores[b, h, i][allowed[b, h, i]]
        if len(row):
            whole = row if sinks is None else torch.cat([row, sinks[h : h + 1].double()])
            result[b, h, i] = torch.logsumexp(whole, dim=0) if bool(whole.float().isfinite().all()) else torch.nan
    return result


def induction_keys(
    tokens: torch.Tensor,
    own: torch.Tensor,
    *,
    segments: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, n) int64, `induction.induction_keys` by looking back key by key; arguments as there."""
    batch = len(tokens)
    own = own.expand(batch, -1)
    result = torch.full(own.shape, -1)
    for b, r in itertools.product(*(range(n) for n in own.shape)):
        at = int(own[b, r])
        earlier = [
            j
            for j in range(at)
            if tokens[b, j] == tokens[b, at]
            and (segments is None or segments[b % len(segments), j] == segments[b % len(segments), at])
            and (real is None or (real[b, j] and real[b, at]))
        ]
        if earlier and earlier[-1] + 1 < at:
            result[b, r] = earlier[-1] + 1
    return result


def cross_entropy_hvp(
    logits: torch.Tensor, tangent: torch.Tensor, labels: torch.Tensor, *, scale: float, ignore_index: int = -100
) -> torch.Tensor:
    """(N, V) float64: of each labelled row scale (diag p - p p') u.

    That of a constant is 0, and one is taken out: without, nothing is left of a row certain to 16 digits.
    """
    result = torch.zeros(logits.shape, dtype=torch.float64)
    for i, label in enumerate(labels.tolist()):
        if label != ignore_index:
            p = torch.softmax(logits[i].double(), dim=0)
            u = tangent[i].double() - tangent[i, p.argmax()].double()
            result[i] = scale * (p * u - p * (p @ u))
    return result


def gram(
    x: torch.Tensor, *, rows: torch.Tensor | None = None, keep: torch.Tensor | None = None, center: bool
) -> torch.Tensor:
    """(n, n) float64, product by product, of the finite ones of x (N, D), or of its `rows` that `keep` keeps."""
    tokens = x.double() if rows is None else x[rows].double()
    used = [i for i, t in enumerate(tokens) if t.isfinite().all() and (keep is None or keep[i])]
    mean = sum((tokens[i] for i in used), torch.zeros(x.shape[1], dtype=torch.float64)) / max(len(used), 1)
    origin = mean if center else torch.zeros_like(mean)
    result = torch.zeros(len(tokens), len(tokens), dtype=torch.float64)
    for i in used:
        for j in used:
            result[i, j] = ((tokens[i] - origin) * (tokens[j] - origin)).sum()
    return result


def received_mass(
    query: torch.Tensor,
    key: torch.Tensor,
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
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass (B, Hq, Sk) and log-sum-exp (B, Hq, Sq), NaN of broken rows, float64; sinks (Hq,), others as there."""
    batch, heads, n_queries, _ = query.shape
    n_keys = key.shape[2]
    scores = logits(query, key, scale=scale, bias=bias, softcap=softcap)
    allowed = torch.ones(batch, heads, n_queries, n_keys, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        allowed = allowed & (mask > torch.finfo(mask.dtype).min / 2)
        scores = scores + mask.double()
    mass = torch.zeros(batch, heads, n_keys, dtype=torch.float64)
    lse = torch.full((batch, heads, n_queries), -torch.inf, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])).tolist():
        at = i + query_offset if own_keys is None else int(own_keys.expand(batch, -1)[b, i])
        packed = None if segments is None else segments.expand(batch, -1)[b].tolist()
        seen = [
            j
            for j in torch.nonzero(allowed[b, h, i]).flatten().tolist()
            if (not causal or j <= at)
            and (window is None or at - j < window)
            and (packed is None or packed[j] == packed[at])
        ]
        row = scores[b, h, i, seen]
        if seen and not bool(row.float().isfinite().all()):
            lse[b, h, i] = torch.nan
        elif seen:
            lse[b, h, i] = torch.logsumexp(row if sinks is None else torch.cat((row, sinks[h : h + 1].double())), 0)
            if keep is None or keep.expand(batch, -1)[b, i]:
                mass[b, h, seen] += torch.exp(row - lse[b, h, i])
    return mass, lse


def attention_edges(
    query: torch.Tensor,
    key: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    positions: torch.Tensor,
    scale: float,
    keep: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    **visibility: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mass and flow (B, Hq, n, Sk) float64 of every key for every sampled row; arguments as in `attention_edges`.

    NaN at hidden keys, and throughout rows that are broken, see nothing or are not kept.
    """
    (batch, heads, n_queries, _), n_keys = query.shape, key.shape[2]
    scores = logits(query, key, scale=scale, bias=bias, softcap=softcap)
    allowed, _ = visible_rows((batch, heads, n_queries, n_keys), mask=mask, **visibility)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.double()
    weights = torch.ones(batch, heads, n_keys).double() if weight is None else weight.double()
    everywhere = positions.expand(batch, -1) if positions.ndim == 1 else positions
    found = torch.full((2, batch, heads, everywhere.shape[1], n_keys), torch.nan, dtype=torch.float64)
    for b in range(batch):
        for r, i in enumerate(everywhere[b].tolist()):
            if keep is not None and not keep.expand(batch, -1)[b, r]:
                continue
            for h in range(heads):
                seen = torch.nonzero(allowed[b, h, i]).flatten().tolist()
                row, weighed = scores[b, h, i, seen], weights[b, h, seen]
                slot = row.new_empty(0) if sinks is None else sinks[h : h + 1].double()
                if all(bool(part.isfinite().all()) for part in (row.float(), weighed, slot)):
                    p = torch.softmax(torch.cat([row, slot]), dim=0)[: len(seen)]
                    found[0, b, h, r, seen] = p
                    found[1, b, h, r, seen] = p * weighed
    return found[0], found[1]
