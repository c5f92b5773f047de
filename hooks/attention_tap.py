"""The attention tap: queries and keys of every attention call, as the model's own attention function receives them.

All fast attention of transformers passes through `AttentionInterface.get_interface(name, default)`, which gives the
function for the configured implementation. While at least one model is tapped, that method is wrapped: what it returns
calls the same function with the same arguments, and afterwards, if the calling module carries an armed tap, shows the
arguments to it. The configuration keeps its name and masks stay as they are, so a model cannot notice. Wrapping the
lookup rather than registry entries also reaches `eager`, which has no entry, and registries that a model file keeps
for itself.

Seen there: post-RoPE, post-cache queries and keys with grouped keys not expanded. Not reached: models that compute
attention themselves (Bloom, Falcon's older paths); the instrument says so once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lm_telemetry.hooks.activation_taps import aside
from lm_telemetry.hooks.inert import Inert

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from lm_telemetry.hooks.forward_pass import ForwardPass
    from lm_telemetry.hooks.topology import AttentionModule, Topology

MARK = "_lm_telemetry_attention_tap"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One call of an attention function, in the terms of the field.

    Attributes:
        attention: which layer called.
        query: `(B, Hq, Sq, D)`.
        key: `(B, Hkv, Sk, D)`.
        mask: bool (True may attend) or additive, broadcastable to `(B, Hq, Sq, Sk)`; None for none.
        bias: additive position bias, broadcastable likewise; None for none.
        scale: factor on the dot products.
        causal: whether key j is seen by query i only if j <= i + query_offset.
        query_offset: position among the keys of query 0.
        window: length of a sliding window that the mask does not already hold; None for none.
        softcap: logits are `softcap * tanh(logits / softcap)`; None for none.
        unsupported: why the rows cannot be computed from these arguments; None if they can.
        forward: the pass, for sampling its queries.
    """

    attention: AttentionModule
    query: Tensor
    key: Tensor
    mask: Tensor | None
    bias: Tensor | None
    scale: float
    causal: bool
    query_offset: int
    window: int | None
    softcap: float | None
    unsupported: str | None
    forward: ForwardPass


class AttentionTap:
    """The attention taps of one model."""

    _installed: ClassVar[int] = 0
    _original: ClassVar[Callable[..., Any] | None] = None

    def __init__(
        self,
        topology: Topology,
        listener: Callable[[AttentionCall], None],
        guard: Callable[[str], AbstractContextManager[Any]],
    ) -> None:
        self._attentions = topology.attentions
        self._listener = listener
        self._guard = guard
        self._marked: list[torch.nn.Module] = []
        self.forward: ForwardPass | None = None
        """the pass being observed; None while the tap is silent"""

    def install(self) -> None:
        """Mark the attention modules and wrap the lookup."""
        for attention in self._attentions:
            for module in attention.modules:
                module.__dict__[MARK] = _Mark(self, attention)
                self._marked.append(module)
        if self._marked:
            _wrap_lookup()

    def remove(self) -> None:
        """Unmark, and unwrap the lookup when no model is left."""
        if self._marked:
            _unwrap_lookup()
        while self._marked:
            self._marked.pop().__dict__.pop(MARK, None)
        self.forward = None

    def see(self, attention: AttentionModule, implementation: str, arguments: dict[str, Any]) -> None:
        """An attention function was called while the tap is armed."""
        if self.forward is not None:
            with self._guard("attention tap"), aside(arguments["query"]):
                self._listener(describe(attention, implementation, self.forward, **arguments))


class _Mark(Inert):
    __slots__ = ("attention", "tap")

    def __init__(self, tap: AttentionTap, attention: AttentionModule) -> None:
        self.tap = tap
        self.attention = attention


def _tapped(  # noqa: PLR0917 the interface's own order
    function: Callable[..., Any],
    implementation: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    result = function(module, query, key, value, attention_mask, *args, **kwargs)
    mark = module.__dict__.get(MARK)
    if isinstance(mark, _Mark) and mark.tap.forward is not None:
        seen = {"module": module, "query": query, "key": key, "attention_mask": attention_mask, **kwargs}
        mark.tap.see(mark.attention, implementation, seen)
    return result


def _wrap_lookup() -> None:
    from transformers import AttentionInterface

    AttentionTap._installed += 1
    if AttentionTap._installed > 1:
        return
    original = AttentionInterface.get_interface
    AttentionTap._original = original

    @functools.wraps(original)
    def get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = original(self, attn_implementation, default)
        return functools.partial(_tapped, function, attn_implementation)

    AttentionInterface.get_interface = get_interface


def _unwrap_lookup() -> None:
    from transformers import AttentionInterface

    AttentionTap._installed -= 1
    if AttentionTap._installed == 0:
        AttentionInterface.get_interface = AttentionTap._original
        AttentionTap._original = None


def describe(
    attention: AttentionModule,
    implementation: str,
    forward: ForwardPass,
    *,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
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
        mask=mask.detach() if isinstance(mask, Tensor) else None,
        bias=None if position_bias is None else position_bias.detach(),
        scale=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
        causal=causal,
        query_offset=0 if attention.kind == "cross" else key.shape[2] - length,
        window=window,
        softcap=softcap,
        unsupported=unsupported,
        forward=forward,
    )
