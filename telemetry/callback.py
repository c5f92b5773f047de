"""The front door for `transformers.Trainer`: one callback, on one line.

trainer = Trainer(..., callbacks=[TelemetryCallback()])
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lm_telemetry.agent import Agent
from lm_telemetry.settings import Settings
from lm_telemetry.trainer_tap import TrainerTap, find_trainer

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class TelemetryCallback(TrainerCallback, ExportableState):
    """Captures a training run without changing it.

    Works with gradient accumulation, evaluation during training, mixed precision, gradient checkpointing, DDP and
    compiled models. The keywords are the fields of `lm_telemetry.Settings`, which documents them and where else they
    may come from.

    Training that is resumed from a checkpoint goes on as the same run, as its next attempt: the checkpoint holds the
    run's name. A `run_id` of the settings comes first.

    Raises:
        SettingsError: a setting cannot be used as given, or the port is taken.
        StoreError: the store cannot be written.

    Nothing is raised after construction unless `strict` is set: what goes wrong is a row of `events`.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings.resolve(**settings)
        self._given = settings
        self._agent = Agent(self.settings)
        self.saved_run_id: str | None = None
        """set by a Trainer that builds its callbacks anew from a checkpoint; the checkpoint's state tells the same"""
        self._tap: TrainerTap | None = None

    @property
    def run_id(self) -> str | None:
        """Name of the run; None before training begins."""
        return self._agent.session.run_id

    @property
    def address(self) -> str | None:
        """Where Prometheus can scrape this run; None if nothing is served."""
        return self._agent.session.address

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback, as JSON: the settings it was built with, and the run's name.

        A `probe` is not kept; Trainers that build callbacks anew from a checkpoint freeze the first batch instead.
        """
        given = {name: value for name, value in self._given.items() if name not in {"probe", "forward_to"}}
        return {"args": json.loads(json.dumps(given, default=os.fspath)), "attributes": {"saved_run_id": self.run_id}}

    def flush(self) -> bool:
        """Wait until what was captured is on disk; whether it is."""
        return self._agent.session.flush()

    def close(self) -> None:
        """Detach and write what is left; for runs that end by an exception, where the Trainer tells nobody."""
        if self._tap is not None:
            self._tap.remove()
            self._tap = None
        self._agent.detach()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the model that is about to be trained."""
        self.close()
        with self._agent.guard("attaching to the Trainer"):
            trainer = find_trainer(self)
            self._tap = None if trainer is None else TrainerTap(trainer)
            outer = kwargs["model"] if self._tap is None else self._tap.outer
            continues = _run_of_checkpoint(state)
            # A Trainer that goes on from a checkpoint without us would fail to save the next: it looks us up there.
            if isinstance(state.stateful_callbacks, dict):
                state.stateful_callbacks.setdefault(type(self).__name__, self.state())
            self._agent.attach(
                kwargs["model"],
                outer=outer,
                optimizer=kwargs.get("optimizer"),
                continues=continues,
                tokenizer=kwargs.get("processing_class"),
                max_steps=state.max_steps if state.max_steps > 0 else None,
            )
            if self._tap is not None:
                self._tap.install()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An optimizer step begins."""
        if self._tap is not None:
            self._tap.begin()
        self._agent.begin_step(state.global_step + 1)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are final and clipped."""
        self._agent.before_update()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The optimizer has stepped."""
        self._agent.after_update()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The step is over."""
        if self._tap is None:
            self._agent.end_step()
        else:
            self._agent.end_step(loss=self._tap.loss(), grad_norm=self._tap.grad_norm())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Training is over."""
        self.close()


def _run_of_checkpoint(state: TrainerState) -> str | None:
    """Name of the run that the checkpoint was saved by; None for training that begins."""
    if state.global_step == 0:  # what is in the state then is this process's own
        return None
    saved: Any = (state.stateful_callbacks or {}).get(TelemetryCallback.__name__)
    if isinstance(saved, list):
        saved = saved[0]
    return None if saved is None else saved["attributes"]["saved_run_id"]
