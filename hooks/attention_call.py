"""One call of an attention function, in the field's terms, whatever implementation was called.

Each implementation has its own conventions: who applies causality, how queries are aligned with keys, what a mask looks
like. `describe` knows them, so that no one else has to. As of transformers 5.23:

| | causality without a mask | alignment | mask | window | softcap | bias | sinks |
| --- | --- | --- | --- | --- | --- | --- | --- |
| eager | none | | additive | in the mask | yes | yes | yes |
| sdpa | by flag, if Sq > 1 | first keys, the rest cut off | bool or additive | in the mask | raises | yes | ignored |
| flash | by flag | last keys | padding (B, Sk) | by argument | yes | ignored | yes |
| flex | none | | BlockMask or additive | in the mask | yes | yes | yes |

Which key is a query's own does not follow from any of these. The keys of a pass are written one after the other, behind
those that a cache still holds; of T tokens so far, Sq of them new, the first new one lies at

    min(T, Sk) - Sq

whether the cache grows (Sk = T), is preallocated (Sk > T, the rest not yet written), or holds a window (Sk < T, and the
last key is the newest). T is asked of the cache itself. A static cache keeps it in a tensor, which is computed with and
never read.

Packed sequences are told by lengths or positions to flash, and by the mask to the others: where tokens' positions start
again and the mask hides the token before, a new sequence begins.

Left out, with the reason in `unsupported`: paged caches, implementations that are registered by others, keys that stand
for several tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lm_telemetry.hooks.forward_pass import sees
from lm_telemetry.hooks.mask_mod import MaskMod
from lm_telemetry.kernels.attention_rows_geometry import four_axes, rows_of

if TYPE_CHECKING:
    from lm_telemetry.hooks.forward_pass import ForwardPass
    from lm_telemetry.hooks.topology import AttentionModule


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One call of an attention function, in the terms of the field.

    Attributes:
        attention: which layer called.
        query: `(B, Hq, Sq, D)`.
        key: `(B, Hkv, Sk, D)`.
        value: `(B, Hkv, Sk, Dv)`.
        mask: bool (True may attend) or additive, broadcastable to `(B, Hq, Sq, Sk)`; None for none.
        mask_mod: what is hidden beyond `mask` and told by a function (FlexAttention); None for none.
        bias: additive position bias, broadcastable likewise; None for none.
        scale: factor on the dot products.
        causal: whether key j is seen by query i only if j <= the key of its own token.
        query_offset: position among the keys of query 0, where `own_keys` is None.
        own_keys: int64 `(1 or B, Sq)`, index among the keys of each query's own token, where it is not its index plus
            `query_offset` (static caches); None where it is.
        segments: int32 `(1 or B, Sk)`, which of the sequences packed into a row each key (and query) belongs to;
            queries see only keys of their own. None where rows are not packed.
        sinks: `(Hq,)` logits of a key without a value that every row of a head sees (gpt-oss); None for none.
        window: length of a sliding window that the mask does not already hold; None for none.
        softcap: logits are `softcap * tanh(logits / softcap)`; None for none.
        unsupported: why the rows cannot be computed from these arguments; None if they can.
        forward: the pass, for sampling its queries.
    """

    attention: AttentionModule
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    mask_mod: MaskMod | None
    bias: Tensor | None
    scale: float
    causal: bool
    query_offset: int
    own_keys: Tensor | None
    segments: Tensor | None
    sinks: Tensor | None
    window: int | None
    softcap: float | None
    unsupported: str | None
    forward: ForwardPass

    def mask_rows(self, positions: Tensor) -> Tensor | None:
        """Rows of `mask` and `mask_mod` at queries `(n,)` or `(1 or B, n)`; None where there is neither.

        Returns:
            `(1 or B, 1 or Hq, 1 or n, 1 or Sk)`, bool or additive like the mask; O(n Sk) memory.
        """
        positions = positions if positions.ndim == 2 else positions[None]
        rows = None if self.mask is None else four_axes(self.mask)
        if rows is not None and rows.shape[2] > 1:
            rows = rows_of(rows, positions)
        if self.mask_mod is None:
            return rows
        told = self.mask_mod.rows(positions)
        return told if rows is None else told & sees(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Visibility:
    """What an implementation shows its queries, and which of the keys it uses: the same for all layers of a kind."""

    n_keys: int
    query_offset: int
    own_keys: Tensor | None = None
    mask: Tensor | None = None
    mask_mod: MaskMod | None = None
    causal: bool = False
    window: int | None = None
    segments: Tensor | None = None


def describe(
    attention: AttentionModule,
    implementation: str,
    forward: ForwardPass,
    *,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> AttentionCall:
    """The call as each implementation means it; arguments are those of the attention function."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    flash, sdpa = "flash" in implementation, implementation == "sdpa"

    def show() -> _Visibility:
        if flash:
            return _flash(
                attention, forward, query, key, attention_mask, causal=causal, window=sliding_window, told=others
            )
        by_flag = sdpa and causal and query.shape[2] > 1 and attention_mask is None
        return _masked(attention, forward, query, key, attention_mask, causal=by_flag)

    shapes = (len(query), query.shape[2], key.shape[2], query.device)
    shown = forward.once(
        (attention.stack, attention.kind, implementation, causal, sliding_window, *shapes),
        (attention_mask, others.get("position_ids"), others.get("cu_seq_lens_q")),
        show,
    )
    n_keys = shown.n_keys
    return AttentionCall(
        attention=attention,
        query=query.detach(),
        key=key[:, :, :n_keys].detach(),
        value=value[:, :, :n_keys].detach(),
        mask=shown.mask,
        mask_mod=shown.mask_mod,
        bias=None if position_bias is None or flash else position_bias[..., :n_keys].detach(),
        scale=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
        causal=shown.causal,
        query_offset=shown.query_offset,
        own_keys=shown.own_keys,
        segments=shown.segments,
        sinks=None if s_aux is None or sdpa else s_aux.detach().reshape(-1),
        window=shown.window,
        softcap=softcap,
        unsupported=_unsupported(
            implementation,
            module=module,
            query=query,
            key=key,
            attention_mask=attention_mask,
            s_aux=s_aux,
            **others,
        ),
        forward=forward,
    )


def _own_keys(attention: AttentionModule, forward: ForwardPass, query: Tensor, n_keys: int) -> dict[str, Any]:
    """Where the queries' own tokens lie among the keys; for cross-attention, their positions in their own stack."""
    length = query.shape[2]
    if attention.kind == "self" and n_keys == length:
        return {"query_offset": 0}
    seen = forward.n_tokens(attention.stack)
    if attention.kind == "cross":
        first = 0 if seen is None else seen - length
    elif seen is None:
        first = n_keys - length
    else:
        first = (seen.clamp(max=n_keys) if isinstance(seen, Tensor) else min(seen, n_keys)) - length
    if isinstance(first, Tensor):
        return {"query_offset": 0, "own_keys": (first + torch.arange(length, device=query.device))[None]}
    return {"query_offset": first}


def _masked(
    attention: AttentionModule,
    forward: ForwardPass,
    query: Tensor,
    key: Tensor,
    attention_mask: Any,
    *,
    causal: bool,
) -> _Visibility:
    """eager, sdpa and flex: a mask holds everything, or there is none; sdpa may then be `causal`."""
    length, n_keys = query.shape[2], key.shape[2]
    if causal:
        return _Visibility(causal=True, n_keys=min(length, n_keys), query_offset=0)
    mask, mask_mod, segments = None, None, None
    if isinstance(attention_mask, Tensor):
        mask = attention_mask[..., :n_keys].detach()
    elif hasattr(attention_mask, "mask_mod"):
        batch, heads = attention_mask.shape[:2]
        mask_mod = MaskMod(function=attention_mask.mask_mod, batch=batch, heads=heads, n_keys=n_keys)
    if attention.kind == "self" and 1 < length == n_keys:
        segments = _seen_segments(mask, mask_mod, attention, forward, query)
    return _Visibility(
        n_keys=n_keys,
        mask=mask,
        mask_mod=mask_mod,
        segments=segments,
        **_own_keys(attention, forward, query, n_keys),
    )


def _flash(
    attention: AttentionModule,
    forward: ForwardPass,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    window: int | None,
    told: dict[str, Any],
) -> _Visibility:
    """The flash implementations: a mask tells padding only, and keys of a static cache beyond it are cut off."""
    length, n_keys = query.shape[2], key.shape[2]
    own = attention.kind == "self" and length == n_keys
    segments = _told_segments(query, forward, **told) if own and mask is None else None
    if mask is not None:
        n_keys = min(n_keys, mask.shape[-1])
        mask = mask.detach()[:, None, None, :n_keys] != 0
    return _Visibility(
        n_keys=n_keys,
        mask=mask,
        mask_mod=None if causal or window is None else _both_ways(window, n_keys),
        causal=causal,
        window=window if causal else None,
        segments=segments,
        **(
            {"query_offset": n_keys - length}
            if attention.kind == "self"
            else _own_keys(attention, forward, query, n_keys)
        ),
    )


def _both_ways(window: int, n_keys: int) -> MaskMod:
    """What flash shows a query that may look ahead: fewer than `window` keys away on either side."""
    return MaskMod(function=lambda _b, _h, i, j: (i - j).abs() < window, batch=1, heads=1, n_keys=n_keys)


def _told_segments(
    query: Tensor,
    forward: ForwardPass,
    *,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: Any = None,
    max_length_k: Any = None,
    position_ids: Tensor | None = None,
    **_: Any,
) -> Tensor | None:
    """Segments of a call of flash without a mask: from cumulative lengths, or from positions that start again."""
    batch, _heads, length, _width = query.shape
    if all(part is not None for part in (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)):
        assert cu_seq_lens_q is not None
        places = torch.arange(batch * length, device=query.device, dtype=cu_seq_lens_q.dtype)
        return torch.searchsorted(cu_seq_lens_q, places, right=True, out_int32=True).view(batch, length)
    if batch == 1 and length > 1 and position_ids is not None and "position_ids" in forward.batch:
        positions = position_ids.reshape(1, -1)
        if positions.shape[1] == length:
            return (positions == positions.min()).cumsum(1, dtype=torch.int32)
    return None


def _seen_segments(
    mask: Tensor | None, mask_mod: MaskMod | None, attention: AttentionModule, forward: ForwardPass, query: Tensor
) -> Tensor | None:
    """Segments that a mask tells: a sequence begins where a token does not see the one before it.

    Looked for where the batch tells that it may be packed, by its positions or a mask of four axes. A mask may hide a
    token's predecessor for other reasons (sparse attention, chunks), so positions that go on are no boundary.
    """
    length = query.shape[2]
    given = forward.given_mask(attention.stack)
    if given is not None and given.dim() == 2:
        return None
    positions = forward.batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] != length:
        positions = None
    if positions is None and given is None:
        return None
    if mask_mod is not None:
        at = torch.arange(1, length, device=query.device)
        begins = ~mask_mod.at(at, at - 1)[:, 0]
    elif mask is not None and mask.dim() == 4 and mask.shape[2] == mask.shape[3]:
        begins = ~sees(mask[:, 0].diagonal(offset=-1, dim1=1, dim2=2))
    else:
        return None
    if positions is not None:
        begins = begins & (positions.diff(dim=1) != 1)
    return torch.nn.functional.pad(begins.cumsum(1, dtype=torch.int32), (1, 0))


def _unsupported(
    implementation: str,
    *,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Any,
    s_aux: Tensor | None,
    cache: Any = None,
    sinks: Any = None,
    cu_seq_lens_q: Any = None,
    **_: Any,
) -> str | None:
    if cache is not None or implementation.startswith("paged|"):
        return "keys in a paged cache, which the attention function reads itself"
    if implementation not in {"eager", "sdpa", "flex_attention"} and "flash" not in implementation:
        return f"the conventions of an attention implementation that is not transformers' own, {implementation!r}"
    if sinks is not None or (s_aux is not None and s_aux.numel() != query.shape[1]):
        return "attention-sink logits that differ between queries"
    if getattr(module, "compressor", None) is not None:
        return "keys that stand for several tokens"
    packed = "flash" in implementation and cu_seq_lens_q is not None and attention_mask is None
    if packed and query.shape[2] != key.shape[2]:
        return "packed sequences with keys of other tokens than their queries"
    if not (attention_mask is None or isinstance(attention_mask, Tensor) or hasattr(attention_mask, "mask_mod")):
        return f"a mask of type {type(attention_mask).__name__}"
    return None
