"""The attention tap: queries and keys of every attention call, as the model's own attention function receives them.

All fast attention of transformers passes through `AttentionInterface.get_interface(name, default)`, which gives the
function for the configured implementation. While at least one model is tapped, that method is wrapped: what it returns
calls the same function with the same arguments, and afterwards, if the calling module carries an armed tap, shows the
arguments to it. The configuration keeps its name and masks stay as they are, so a model cannot notice. Wrapping the
lookup rather than registry entries also reaches `eager`, which has no entry, and registries that a model file keeps
for itself.

In a compiled graph the wrapped function is traced with the rest; as with the taps on activations, one graph is silent
and one shows its arguments through an operator (`graph_tap`).

Seen there: post-RoPE, post-cache queries and keys with grouped keys not expanded. Not reached: models that compute
attention themselves (Bloom, Falcon's older paths); the instrument says so once.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lm_telemetry.hooks.activation_taps import aside
from lm_telemetry.hooks.attention_call import describe
from lm_telemetry.hooks.graph_tap import GraphTap, show

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch import Tensor

    from lm_telemetry.hooks.attention_call import AttentionCall
    from lm_telemetry.hooks.forward_pass import ForwardPass
    from lm_telemetry.hooks.topology import AttentionModule, Topology

MARK = "_lm_telemetry_attention_tap"


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
        self._forward: ForwardPass | None = None
        self.armed = False
        """whether a pass is being observed; all that a compiled graph depends on"""
        self.seen = 0
        """how many calls of attention were seen in the pass that was observed last"""

    def install(self) -> None:
        """Mark the attention modules and wrap the lookup."""
        for attention in self._attentions:
            for module in attention.modules:
                module.__dict__[MARK] = _Mark(self, attention, module)
                self._marked.append(module)
        if self._marked:
            _wrap_lookup()

    def remove(self) -> None:
        """Unmark, and unwrap the lookup when no model is left."""
        if self._marked:
            _unwrap_lookup()
        while self._marked:
            self._marked.pop().__dict__.pop(MARK, None)
        self.silence()

    def arm(self, forward: ForwardPass | None) -> None:
        """A pass begins that is observed; None if its attention is not wanted.

        Then too the flag is up, so that a compiled graph has no third state.
        """
        self._forward = forward
        self.seen = 0
        self.armed = True

    def silence(self) -> None:
        """It is over."""
        self.armed = False
        self._forward = None

    def see(self, attention: AttentionModule, implementation: str, arguments: dict[str, Any]) -> None:
        """An attention function was called while the tap is armed."""
        self.seen += 1
        if self._forward is not None:
            with self._guard("attention tap"), aside(arguments["query"]):
                self._listener(describe(attention, implementation, self._forward, **arguments))


class _Mark(GraphTap):
    __slots__ = ("attention", "module", "tap")

    def __init__(self, tap: AttentionTap, attention: AttentionModule, module: torch.nn.Module) -> None:
        super().__init__()
        self.tap = tap
        self.attention = attention
        self.module = module

    def see(self, implementation: str, arguments: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            show(self, {"implementation": implementation, **arguments})
        else:
            self.tap.see(self.attention, implementation, {"module": self.module, **arguments})

    def receive(self, arguments: dict[str, Any]) -> None:
        implementation = arguments.pop("implementation")
        self.tap.see(self.attention, implementation, {"module": self.module, **arguments})


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
    if isinstance(mark, _Mark) and mark.tap.armed:
        arguments = {"query": query, "key": key, "value": value, "attention_mask": attention_mask, **kwargs}
        mark.see(implementation, arguments)
    return result


def _wrap_lookup() -> None:
    from transformers import AttentionInterface

    AttentionTap._installed += 1
    if AttentionTap._installed > 1:
        return
    AttentionTap._original = AttentionInterface.get_interface
    AttentionInterface.get_interface = _tapping(AttentionTap._original)


def _tapping(original: Callable[..., Any]) -> Callable[..., Any]:
    """The lookup that taps."""

    @functools.wraps(original)
    def get_interface(self: Any, attn_implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        function = original(self, attn_implementation, default)
        return functools.partial(_tapped, function, attn_implementation)

    return get_interface


def _unwrap_lookup() -> None:
    from transformers import AttentionInterface

    AttentionTap._installed -= 1
    if AttentionTap._installed == 0:
        AttentionInterface.get_interface = AttentionTap._original
        AttentionTap._original = None
