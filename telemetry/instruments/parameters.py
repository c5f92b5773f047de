"""Norms of every parameter tensor, its gradient and its update: does each layer learn at a sane rate?

Fills `params`, and `update_norm` and `param_norm` of the step's row. The gradient is the one the optimizer was given
(after clipping); the update is the measured change of the parameter, so it holds for any optimizer, weight decay
included. Under sharded training the norms are those of this rank's shards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from lm_telemetry.catalogue import Cost
from lm_telemetry.instruments.base import Attachment, Columns, Harvest, Instrument, Tap

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lm_telemetry.hooks.parameter_tap import ParameterTap


@dataclass(kw_only=True)
class Parameters(Instrument):
    """Norm, gradient norm, update norm and update ratio by parameter tensor."""

    name: ClassVar[str] = "parameters"
    tables: ClassVar[tuple[str, ...]] = ("params",)
    taps: ClassVar[frozenset[Tap]] = frozenset({Tap.UPDATE})
    cost: ClassVar[Cost] = Cost.REDUCTION

    _tap: ParameterTap | None = field(default=None, init=False, repr=False)
    _places: list[tuple[str | None, int | None]] = field(default_factory=list, init=False, repr=False)
    _numels: list[int] = field(default_factory=list, init=False, repr=False)
    _captured: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _with_gradient: list[int] = field(default_factory=list, init=False, repr=False)
    _covered: tuple[int, ...] = field(default=(), init=False, repr=False)

    def attach(self, attachment: Attachment) -> None:
        """Keep the parameters and where each belongs."""
        self._tap = attachment.parameters
        self._places = [attachment.topology.place(name) for name in self._tap.names]
        self._numels = [p.numel() for p in self._tap.parameters]
        total = sum(p.numel() * p.element_size() for p in self._tap.parameters)
        if total > self._tap.limit_bytes:
            attachment.event(
                "info",
                "updates_in_turns",
                f"update norms need a copy of the parameters ({total / 1e9:.2f} GB), more than the "
                f"{self._tap.limit_bytes / 1e9:.2f} GB allowed; each capture covers some of the tensors, in turns",
                bytes=total,
                limit_bytes=self._tap.limit_bytes,
            )

    def begin(self, step: int) -> None:
        """Forget what an abandoned capture has left."""
        self._captured = {}

    def before_update(self) -> None:
        """Gradients are final."""
        assert self._tap is not None
        self._with_gradient = [i for i, p in enumerate(self._tap.parameters) if p.grad is not None]
        gradients = [_dense(self._tap.parameters[i].grad) for i in self._with_gradient]
        self._captured["grad_norm"] = _norms(gradients)

    def after_update(self) -> None:
        """Both sides of the update are there."""
        assert self._tap is not None
        self._covered = self._tap.covered
        self._captured["update_norm"] = _norms(self._tap.updates())
        self._captured["norm"] = _norms([p.detach() for p in self._tap.parameters])

    def harvest(self) -> Harvest | None:
        """The norms, if the optimizer has stepped."""
        if "norm" not in self._captured:
            return None
        return Harvest(tensors=self._captured, note=(tuple(self._with_gradient), self._covered))

    def rows(self, host: Mapping[str, np.ndarray[Any, Any]], note: Any) -> Mapping[str, Columns]:
        """One row a tensor, and what all of them make together for the step."""
        assert self._tap is not None
        with_gradient, covered = note
        count = len(self._numels)
        gradient = _scatter(host["grad_norm"], with_gradient, count)
        update = _scatter(host["update_norm"], covered, count)
        columns: dict[str, Any] = {
            "name": list(self._tap.names),
            "stack": [stack for stack, _ in self._places],
            "layer": [layer for _, layer in self._places],
            "numel": self._numels,
            "norm": host["norm"],
            "grad_norm": gradient,
            "update_norm": update,
            "update_ratio": update / np.ma.masked_equal(host["norm"], 0),
        }
        step: dict[str, Any] = {"param_norm": [float(np.linalg.norm(host["norm"]))]}
        if len(covered) == count:
            step["update_norm"] = [float(np.linalg.norm(host["update_norm"]))]
        return {"params": columns, "steps": step}

    def detach(self) -> None:
        """Let go of the captured norms; names stay, since rows may still be built."""
        self._captured = {}


def _norms(tensors: list[Tensor]) -> Tensor:
    """L2 norms `(n,)`, accumulated in float32 at least."""
    if not tensors:
        return torch.empty(0)
    home = tensors[0].device
    local = [_dense(t) for t in tensors]
    halves = any(t.dtype in {torch.float16, torch.bfloat16} for t in local)
    # asking for a dtype takes a slower path even where it is the tensors' own
    norms = torch._foreach_norm(local, 2, dtype=torch.float32) if halves else torch._foreach_norm(local, 2)
    return torch.stack([n.to(home, non_blocking=True) for n in norms])


def _dense(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a sharded tensor's own part
    return local.coalesce().values() if local.is_sparse else local


def _scatter(values: np.ndarray[Any, Any], places: tuple[int, ...], count: int) -> np.ma.MaskedArray[Any, Any]:
    full = np.ma.array(np.zeros(count), mask=np.ones(count, dtype=bool))
    full[list(places)] = values
    return full
