"""One call of an attention function, in the field's terms, whatever implementation was called.

Each implementation has its own conventions: who applies causality, how queries are aligned with keys, what a mask looks
like. `describe` knows them, so that no one else has to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

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
        bias: additive position bias, broadcastable likewise; None for none.
        scale: factor on the dot products.
        causal: whether key j is seen by query i only if j <= i + query_offset.
        query_offset: position among the keys of query 0.
        own_keys: int64 `(1 or B, Sq)`, index among the keys of each query's own token, where it is not its index plus
            `query_offset` (static caches); None where it is.
        segments: int32 `(1 or B, Sk)`, which of the packed sequences of a row each key (and query) belongs to, where
            queries see only keys of their own and no mask says so; None for none.
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
    **others: Any,
) -> AttentionCall:
    """The call as each implementation means it.

    `sdpa` is causal by flag only without a mask, and then aligns queries with the first keys; `eager` knows no flag,
    its masks hold everything; the flash implementations take padding as a two-dimensional mask, apply causality and
    the window themselves, and align queries with the last keys.
    """
    unsupported: str | None = None
    if others.get("s_aux") is not None or getattr(module, "sinks", None) is not None:
        unsupported = "attention-sink logits"
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    length = query.shape[2]
    mask = attention_mask
    causal, window = False, None
    if implementation.startswith("sdpa"):
        causal = bool(is_causal) and length > 1 and mask is None
        if causal and key.shape[2] > length:
            key = key[:, :, :length]
            position_bias = position_bias if position_bias is None else position_bias[..., :length]
    elif "flash" in implementation:
        causal = bool(is_causal)
        window = sliding_window
        if isinstance(mask, Tensor) and mask.dim() == 2:
            mask = mask[:, None, None, -key.shape[2] :] != 0
    elif implementation != "eager" and mask is None:
        causal = bool(is_causal) and length > 1
    if mask is not None and not isinstance(mask, Tensor):
        unsupported = f"a mask of type {type(mask).__name__}"
    return AttentionCall(
        attention=attention,
        query=query.detach(),
        key=key.detach(),
        value=value[:, :, : key.shape[2]].detach(),
        mask=mask.detach() if isinstance(mask, Tensor) else None,
        bias=None if position_bias is None else position_bias.detach(),
        scale=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
        causal=causal,
        query_offset=0 if attention.kind == "cross" else key.shape[2] - length,
        own_keys=None,
        segments=None,
        sinks=None,
        window=window,
        softcap=softcap,
        unsupported=unsupported,
        forward=forward,
    )
