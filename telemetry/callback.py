"""The front door for `transformers.Trainer`: one callback, on one line.

trainer = Trainer(..., callbacks=[TelemetryCallback()])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from lm_telemetry.agent import Agent
from lm_telemetry.settings import Settings
from lm_telemetry.trainer_tap import TrainerTap, find_trainer

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class TelemetryCallback(TrainerCallback):
    """Captures a training run without changing it.

    Works with gradient accumulation, evaluation during training, mixed precision, gradient checkpointing, DDP and
    compiled models. The keywords are the fields of `lm_telemetry.Settings`, which documents them and where else they
    may come from.

    Raises:
        SettingsError: a setting cannot be used as given, or the port is taken.
        StoreError: the store cannot be written.

    Nothing is raised after construction unless `strict` is set: what goes wrong is a row of `events`.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings.resolve(**settings)
        self._agent = Agent(self.settings)
        self._tap: TrainerTap | None = None

    @property
    def run_id(self) -> str | None:
        """Name of the run; None before training begins."""
        return self._agent.session.run_id

    @property
    def address(self) -> str | None:
        """Where Prometheus can scrape this run; None if nothing is served."""
        return self._agent.session.address

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
            self._agent.attach(kwargs["model"], outer=outer, optimizer=kwargs.get("optimizer"))
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
