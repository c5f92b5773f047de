"""Taps on activations: forward hooks at the sites of a topology, silent until they are armed.

They are put on once and taken off at the end, since hooks that are added after a compiled model's first call are
ignored; between captures a tap is one test of a flag. A tap shows the live tensor, detached; whoever listens reduces
it at once and keeps no reference.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lm_telemetry.hooks.inert import Inert

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
        self.forward: ForwardPass | None = None
        """the pass being observed; None while the taps are silent"""
        self.sites = True
        """whether the sites of `layers` are shown in an observed pass"""
        self.heads = True
        """whether the heads' outputs are"""

    def install(self) -> None:
        """Put the hooks on."""
        for site in (*self._topology.sites, *self._topology.head_outputs):
            if site.reads_input:
                handle = site.module.register_forward_pre_hook(_InputTap(self, site), with_kwargs=True)
            else:
                handle = site.module.register_forward_hook(_OutputTap(self, site))
            self._handles.append(handle)

    def remove(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()
        self.forward = None

    def see(self, site: Site, value: Any) -> None:
        """A site was computed while the taps are armed."""
        hidden = hidden_states(value)
        wanted = self.heads if site.site == "head_out" else self.sites
        if wanted and hidden is not None and self.forward is not None:
            with self._guard("activation tap"), aside(hidden):
                self._listener(Activation(site=site, hidden=hidden.detach(), forward=self.forward))


class _Tap(Inert):
    __slots__ = ("site", "taps")

    def __init__(self, taps: ActivationTaps, site: Site) -> None:
        self.taps = taps
        self.site = site


class _OutputTap(_Tap):
    __slots__ = ()

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.taps.forward is not None:
            self.taps.see(self.site, output)


class _InputTap(_Tap):
    __slots__ = ()

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.taps.forward is not None:
            self.taps.see(self.site, args[0] if args else kwargs.get("hidden_states"))


@contextmanager
def aside(tensor: Tensor) -> Iterator[None]:
    """Our arithmetic beside the model's: no graph is recorded, and autocast does not round what we compute."""
    with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
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
