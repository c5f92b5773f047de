"""Taps on activations: forward hooks at the sites of a topology, silent until they are armed.

They are put on once and taken off at the end, since hooks that are added after a compiled model's first call are
ignored; between captures a tap is one test of a flag. A tap shows the live tensor, detached; whoever listens reduces
it at once and keeps no reference.

In a compiled graph the flag is what the compiler guards on: one graph is compiled with the taps silent and one with
them armed, whatever is observed and by whom, and the armed one shows its tensors through an operator (`graph_tap`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lm_telemetry.hooks.graph_tap import GraphTap, show
from lm_telemetry.kernels.head_operands import full_precision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.utils.hooks import RemovableHandle

    from lm_telemetry.hooks.forward_pass import ForwardPass
    from lm_telemetry.hooks.topology import Site, Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """A site's tensor in the pass that is being observed.

    Attributes:
        site: where it was read.
        hidden: `(B, S, D)`, or `(T, D)` where the model has flattened its tokens; detached, not a copy.
        forward: the pass, for sampling its tokens.
    """

    site: Site
    hidden: Tensor
    forward: ForwardPass


class ActivationTaps:
    """All activation taps of one model.

    `guard(what)` is the context in which a listener is called; the agent's keeps errors from the model's forward.
    """

    def __init__(
        self,
        topology: Topology,
        listener: Callable[[Activation], None],
        guard: Callable[[str], AbstractContextManager[Any]],
    ) -> None:
        self._topology = topology
        self._listener = listener
        self._guard = guard
        self._handles: list[RemovableHandle] = []
        self._forward: ForwardPass | None = None
        self._sites = self._heads = False
        self.armed = False
        """whether a pass is being observed; all that a compiled graph depends on"""
        self.seen = 0
        """how often a tap was passed in the pass that was observed last"""

    def __len__(self) -> int:
        """Number of taps that are on."""
        return len(self._handles)

    def install(self, *, sites: bool = True, heads: bool = True) -> None:
        """Put the hooks on: at the sites of `layers`, and where the heads' outputs are."""
        topology = self._topology
        for site in (*(topology.sites if sites else ()), *(topology.head_outputs if heads else ())):
            if site.reads_input:
                handle = site.module.register_forward_pre_hook(_InputTap(self, site), with_kwargs=True)
            else:
                handle = site.module.register_forward_hook(_OutputTap(self, site))
            self._handles.append(handle)

    def remove(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()
        self.silence()

    def arm(self, forward: ForwardPass, *, sites: bool = True, heads: bool = True) -> None:
        """A pass begins that is observed, with or without the sites of `layers` and the heads' outputs."""
        self._forward, self._sites, self._heads = forward, sites, heads
        self.seen = 0
        self.armed = True

    def silence(self) -> None:
        """It is over."""
        self.armed = False
        self._forward = None

    def see(self, site: Site, value: Any) -> None:
        """A site was computed while the taps are armed."""
        self.seen += 1
        hidden = hidden_states(value)
        wanted = self._heads if site.site == "head_out" else self._sites
        if wanted and hidden is not None and self._forward is not None:
            with self._guard("activation tap"), aside(hidden):
                self._listener(Activation(site=site, hidden=hidden.detach(), forward=self._forward))


class _Tap(GraphTap):
    __slots__ = ("site", "taps")

    def __init__(self, taps: ActivationTaps, site: Site) -> None:
        super().__init__()
        self.taps = taps
        self.site = site

    def see(self, value: Any) -> None:
        if torch.compiler.is_compiling():
            show(self, {"hidden": hidden_states(value)})
        else:
            self.taps.see(self.site, value)

    def receive(self, arguments: dict[str, Any]) -> None:
        self.taps.see(self.site, arguments["hidden"])


class _OutputTap(_Tap):
    __slots__ = ()

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.taps.armed:
            self.see(output)


class _InputTap(_Tap):
    __slots__ = ()

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.taps.armed:
            self.see(args[0] if args else kwargs.get("hidden_states"))


@contextmanager
def aside(tensor: Tensor) -> Iterator[None]:
    """Our arithmetic beside the model's: no graph is recorded, and autocast does not round what we compute."""
    with torch.no_grad(), full_precision(tensor.device.type):
        yield


def hidden_states(value: Any) -> Tensor | None:
    """The hidden states in what a module was given or gave: itself, the first of a tuple, or a model output's."""
    if isinstance(value, Tensor):
        return value
    last = getattr(value, "last_hidden_state", None)
    if isinstance(last, Tensor):
        return last
    if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
        return value[0]
    return None
