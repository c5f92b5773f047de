"""Parameters around an optimizer step: their values before it, so that an update can be measured.

An update's norm needs both sides of the step, and subtracting norms would cancel to noise, so the values before are
copied. That costs memory: `limit_bytes` bounds it. A model that does not fit is covered by a window of tensors that
moves on at every captured step; what is not covered is not reported for that step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

_CUDA_SHARE = 0.05
"""share of a device's memory that copies may take when no limit is given"""


class ParameterTap:
    """The trainable parameters of a model, tied ones once, in the model's order.

    Attributes:
        names: their names.
        parameters: the parameters themselves.
        covered: indices of those whose earlier values are held, after `snapshot`.
    """

    def __init__(self, model: nn.Module, *, limit_bytes: int | None = None) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.names: tuple[str, ...] = tuple(n for n, _ in named)
        self.parameters: tuple[nn.Parameter, ...] = tuple(p for _, p in named)
        self.covered: tuple[int, ...] = ()
        self.limit_bytes = limit_bytes if limit_bytes is not None else _default_limit(self.parameters)
        self._copies: dict[int, Tensor] = {}
        self._next = 0
        self._live = False
        self._keep = True

    @property
    def previous(self) -> list[Tensor] | None:
        """Values before the step of all parameters; None if they are not held, or not all of them."""
        if not self._live or len(self.covered) != len(self.parameters):
            return None
        return [self._copies[i] for i in self.covered]

    @torch.no_grad()
    def snapshot(self, *, keep: bool) -> None:
        """Copy the values before a step; memory of earlier copies is used again.

        With `keep` the copies last until `release`; else `updates` may turn them into the updates.
        """
        self._keep = keep
        window = self._window()
        if window != self.covered:
            self._copies = {i: torch.empty_like(self.parameters[i]) for i in window}
            self.covered = window
        torch._foreach_copy_([self._copies[i] for i in window], [self.parameters[i] for i in window])
        self._live = True

    @torch.no_grad()
    def updates(self) -> list[Tensor]:
        """The change of each covered parameter in the step just taken (up to its sign, which a norm does not see).

        Without `keep` they take the place of the copies: no memory is allocated, and `previous` is None from then on.
        """
        after: list[Tensor] = [self.parameters[i] for i in self.covered]
        copies = [self._copies[i] for i in self.covered]
        if self._keep:
            return list(torch._foreach_sub(copies, after))
        torch._foreach_sub_(copies, after)
        self._live = False
        return copies

    def release(self, *, memory: bool = False) -> None:
        """The step is over: earlier values no longer stand for anything. With `memory`, give the copies up too."""
        self._live = False
        if memory:
            self._copies, self.covered = {}, ()

    def _window(self) -> tuple[int, ...]:
        sizes = [p.numel() * p.element_size() for p in self.parameters]
        if sum(sizes) <= self.limit_bytes:
            return tuple(range(len(sizes)))
        taken: list[int] = []
        room = self.limit_bytes
        for offset in range(len(sizes)):
            i = (self._next + offset) % len(sizes)
            if taken and sizes[i] > room:
                break
            taken.append(i)
            room -= sizes[i]
        self._next = (taken[-1] + 1) % len(sizes)
        return tuple(sorted(taken))


def _default_limit(parameters: tuple[nn.Parameter, ...]) -> int:
    if parameters and parameters[0].is_cuda:
        return int(torch.cuda.get_device_properties(parameters[0].device).total_memory * _CUDA_SHARE)
    return 4 << 30
