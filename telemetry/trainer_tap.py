"""What the Trainer knows and does not tell its callbacks: the module it calls, the loss, the norm before clipping.

A callback is given neither the wrapped model nor the gradient norm nor the loss of a step (the logged one is an
average, and by default NaN is filtered out of it). While attached, two methods of this Trainer's objects are replaced
by ones that call them and keep what they return: `training_step`, whose value is the micro-batch's share of the step's
loss, and the accelerator's `clip_grad_norm_`, whose first value in a step is the norm before clipping. Both are
attributes of the instances, removed at detach; classes are not touched, nothing is computed or waited for.

The Trainer itself is found on the call stack of the event, read only. Loops that are not a `transformers.Trainer`
but call its callbacks have no tap; losses then come from the model's output.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from torch import Tensor


class TrainerTap:
    """Keeps what passes through one Trainer in one step."""

    def __init__(self, trainer: Any) -> None:
        self.outer = trainer.model_wrapped
        """the module the training loop calls"""
        self._trainer = trainer
        self._losses: list[Tensor] = []
        self._grad_norm: Any = None
        self._replaced: list[tuple[Any, str, Callable[..., Any]]] = []

    def install(self) -> None:
        """Begin to listen."""
        self._replace(self._trainer, "training_step", self._losses.append)
        self._replace(self._trainer.accelerator, "clip_grad_norm_", self._saw_norm)

    def remove(self) -> None:
        """Stop listening; attributes that somebody else has replaced since stay as they are."""
        while self._replaced:
            owner, name, ours = self._replaced.pop()
            if owner.__dict__.get(name) is ours:
                delattr(owner, name)

    def begin(self) -> None:
        """A step begins."""
        self._losses.clear()
        self._grad_norm = None

    def loss(self) -> Tensor | None:
        """Loss of the step, as the Trainer sums it; None if no micro-batch was seen."""
        return sum(self._losses[1:], self._losses[0]) if self._losses else None

    def grad_norm(self) -> Any:
        """Norm of the gradient before clipping; None if it was not taken."""
        return self._grad_norm

    def _saw_norm(self, norm: Any) -> None:
        if self._grad_norm is None:
            self._grad_norm = norm

    def _replace(self, owner: Any, name: str, saw: Callable[[Any], None]) -> None:
        original = getattr(owner, name)
        if name in owner.__dict__:  # somebody has replaced it before us; theirs must stay when we go
            return

        def listening(*args: Any, **kwargs: Any) -> Any:
            value = original(*args, **kwargs)
            saw(value)
            return value

        setattr(owner, name, listening)
        self._replaced.append((owner, name, listening))


def find_trainer(callback: Any) -> Any:
    """The Trainer whose event is calling `callback`, from the stack; None if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        handler = getattr(owner, "callback_handler", None)
        if handler is not None and callback in getattr(handler, "callbacks", ()) and hasattr(owner, "training_step"):
            return owner
        frame = frame.f_back
    return None
