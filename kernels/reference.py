"""Oracles in float64 for the kernels and their twins: the definitions, written as plainly as they can be.

Every score of every query is formed, grouped keys are repeated, moments take two passes. Nothing is shared with the
code that is measured against these, so an error cannot hide in both. For tests; far too slow and large for a run.
"""

from __future__ import annotations

import math

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
) -> torch.Tensor:
    """(Hq, 12) float64, `attention_rows.RAW_COLUMNS`, row by row from the whole matrix; arguments as there."""
    batch, heads, n_queries, _ = query.shape
    n_keys = key.shape[2]
    scores = logits(query, key, scale=scale, bias=bias, softcap=softcap)
    allowed = torch.ones(batch, heads, n_queries, n_keys, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        allowed = allowed & (mask > torch.finfo(mask.dtype).min / 2)
        scores = scores + mask.double()
    result = torch.zeros(heads, 12, dtype=torch.float64)
    result[:, 4] = -torch.inf
    everywhere = positions.expand(batch, -1) if positions.ndim == 1 else positions
    for b in range(batch):
        first = 0 if first_key is None else int(first_key[b])
        for r, i in enumerate(everywhere[b].tolist()):
            if keep is not None and not keep.expand(batch, -1)[b, r]:
                continue
            at = i + query_offset
            for h in range(heads):
                seen = [
                    j
                    for j in torch.nonzero(allowed[b, h, i]).flatten().tolist()
                    if (not causal or j <= at) and (window is None or at - j < window)
                ]
                if seen:
                    _add_row(result[h], scores[b, h, i, seen], seen, at, first)
    return result


def _add_row(into: torch.Tensor, row: torch.Tensor, seen: list[int], at: int, first: int) -> None:
    """Adds to `into` (12,) what one row of logits over the keys `seen` has to say."""
    if not bool(row.float().isfinite().all()):  # beyond float32, too: there the kernels' logits are infinite
        into[11] += 1
        return
    p = torch.softmax(row, dim=0)
    entropy = -torch.special.xlogy(p, p).sum().item()
    distance = torch.tensor([abs(at - j) for j in seen], dtype=torch.float64)
    at_key = dict(zip(seen, p.tolist(), strict=True))
    into[0] += 1
    into[1] += entropy
    into[2] += entropy / math.log(len(seen)) if len(seen) > 1 else 0.0
    into[3] += torch.logsumexp(row, dim=0)
    into[4] = max(float(into[4]), float(row.max()))
    into[5] += p.max()
    into[6] += 1 / p.square().sum()
    into[7] += at_key.get(first, 0.0)
    into[8] += at_key.get(at - 1, 0.0)
    into[9] += p[distance < 16].sum()
    into[10] += (p * distance).sum()


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
