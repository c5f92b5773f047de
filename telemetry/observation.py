"""The front door for everything else: a context around a hand-written training loop, or around `generate`.

with observe(model, store="runs") as session:
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        session.step(loss=loss, optimizer=optimizer)
        optimizer.zero_grad()

with observe(model, store="runs"):
    model.generate(**prompt)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

from lm_telemetry.agent import Agent
from lm_telemetry.errors import SettingsError
from lm_telemetry.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from torch import nn
    from torch.utils.hooks import RemovableHandle


class observe:  # noqa: N801 a context manager that reads as a verb
    """Observes `model` while the context is open.

    A forward pass with gradients belongs to the training step that `step` ends. One without them, before any training
    step was seen, is inference, and is recorded as a step of its own; in a training loop it is an evaluation and is
    not recorded.

    Args:
        model: the module the loop calls; a wrapper (DDP, `torch.compile`) is looked through.
        optimizer: the optimizer, if known here; else `step` is told, and updates are measured from the step after.
        steps_done: steps of the run that were taken before; a loop that goes on from a checkpoint gives their number,
            and the `run_id` it began with.
        max_steps: step at which training is to end, if that is known; views that tell the time to go need it.
        tokenizer: what the model's tokens come from, so that those of the probe can be stored legibly; a tokenizer or
            a processor of transformers.
        settings: fields of `lm_telemetry.Settings`.

    Raises:
        SettingsError: a setting cannot be used as given, or the port is taken.
        StoreError: the store cannot be written.
        ModelError: the model has no parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Any = None,
        steps_done: int = 0,
        max_steps: int | None = None,
        tokenizer: Any = None,
        **settings: Any,
    ) -> None:
        _check_steps("steps_done", steps_done, 0)
        if max_steps is not None:
            _check_steps("max_steps", max_steps, 1)
        self.settings = Settings.resolve(**settings)
        self._outer = model
        self._model = bare(model)
        self._agent = Agent(self.settings)
        self._agent.check(self._model)
        self._optimizer: Any = None
        self._handles: list[RemovableHandle] = []
        self._first_optimizer = optimizer
        self._tokenizer = tokenizer
        self._max_steps = max_steps
        self._step = steps_done
        self._training = False

    @property
    def run_id(self) -> str | None:
        """Name of the run; None before the context is entered."""
        return self._agent.session.run_id

    @property
    def address(self) -> str | None:
        """Where Prometheus can scrape this run; None if nothing is served."""
        return self._agent.session.address

    def __enter__(self) -> Self:
        with self._agent.guard("attaching"):
            self._agent.attach(
                self._model,
                outer=self._outer,
                before_forward=self._before_forward,
                tokenizer=self._tokenizer,
                max_steps=self._max_steps,
            )
            self._watch(self._first_optimizer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._agent.detach()

    def step(self, *, loss: Any = None, optimizer: Any = None, grad_norm: Any = None) -> None:
        """A training step is over: its forward, backward and update are done.

        Args:
            loss: loss of the step, a tensor (not waited for) or a number; None takes it from the model's outputs.
            optimizer: what stepped the model, if it was not given before.
            grad_norm: norm of the gradient before clipping, as `clip_grad_norm_` returns it.
        """
        self._watch(optimizer)
        loss = loss.detach() if isinstance(loss, torch.Tensor) else loss
        self._agent.end_step(loss=loss, grad_norm=grad_norm)

    def flush(self) -> bool:
        """Wait until what was captured is on disk; whether it is."""
        return self._agent.session.flush()

    def _before_forward(self, batch: Mapping[str, Any]) -> None:
        """Decide what the pass that begins belongs to."""
        if torch.is_grad_enabled():
            self._training = True
            if not self._agent.in_step:
                self._begin()
        elif not self._training:
            self._begin()
            self._agent.ends_with_forward = True

    def _begin(self) -> None:
        self._step += 1
        self._agent.begin_step(self._step)

    def _watch(self, optimizer: Any) -> None:
        """Learn of the optimizer's steps through its own hooks."""
        if optimizer is None or optimizer is self._optimizer:
            return
        self._optimizer = optimizer
        while self._handles:
            self._handles.pop().remove()
        with self._agent.guard("hooking the optimizer"):
            self._agent.set_optimizer(optimizer)
            inner = self._agent.optimizer
            self._handles = [
                inner.register_step_pre_hook(_calling(self._agent.before_update)),
                inner.register_step_post_hook(_calling(self._agent.after_update)),
            ]


WRAPPERS = {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"}


def bare(model: nn.Module) -> nn.Module:
    """The model inside its wrappers: `torch.compile`, DDP, DataParallel, FSDP."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in WRAPPERS:
            inner = model.module
        if not isinstance(inner, torch.nn.Module):
            return model
        model = inner


def _check_steps(name: str, value: Any, least: int) -> None:
    if type(value) is not int or value < least:
        raise SettingsError(
            f"{name}: expected a number of steps, at least {least}; got {value!r}", setting=name, value=value
        )


def _calling(tell: Callable[[], None]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        tell()

    return hook
