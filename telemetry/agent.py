"""The agent: one model, one run, and everything that is measured on it.

Front doors (`callback`, `observe`) tell it what the loop is doing; it tells the instruments, collects what they hand
over, and gives it to the writer. It owns the order of things:

    begin_step -> forward_begin/forward_end (each pass; the first is observed) -> before_update/after_update -> end_step

Every public method may be called from a training loop: none raises (unless `strict`), none blocks. What the agent
costs the training thread is measured here: in all it is stored with each step, by instrument with each capture.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lm_telemetry.cost import Meter
from lm_telemetry.errors import ModelError
from lm_telemetry.guard import Guard
from lm_telemetry.hooks.activation_taps import Activation, ActivationTaps
from lm_telemetry.hooks.attention_tap import AttentionTap
from lm_telemetry.hooks.forward_pass import ForwardPass
from lm_telemetry.hooks.optimizer import unwrap_optimizer
from lm_telemetry.hooks.outer import OuterTap, is_compiled
from lm_telemetry.hooks.parameter_tap import ParameterTap
from lm_telemetry.hooks.preserve import preserved
from lm_telemetry.hooks.probe import Probe
from lm_telemetry.hooks.topology import Topology, discover
from lm_telemetry.instruments.base import Attachment, Harvest, Instrument, Tap
from lm_telemetry.packet import Packet
from lm_telemetry.schedule import Schedule
from lm_telemetry.session import Session
from lm_telemetry.settings import Settings, installed_instruments
from lm_telemetry.step_clock import StepClock
from lm_telemetry.subject import describe_optimizer, describe_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from lm_telemetry.hooks.attention_call import AttentionCall
    from lm_telemetry.instruments.base import Columns


class Agent:
    """Everything that is attached to one model for one run."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.session = Session(settings)
        self.guard = Guard(self.event, strict=settings.strict)
        self.instruments = _build_instruments(settings)
        self.schedule = Schedule(
            {name: i.every or i.usual_every or settings.every for name, i in self.instruments.items()}
        )
        self.meter = Meter(self.schedule)
        self.attached = False
        self.step = 0
        self.optimizer: Any = None
        self.ends_with_forward = False
        """whether the open step is one forward pass of inference, over when that is"""
        self._active: list[Instrument] = []
        self._grad_norm: Any = None
        self._observing = False
        self._probing = False
        """whether a forward pass that comes now is our own"""
        self._in_graph: ForwardPass | None = None
        """the pass that is being observed by taps in a compiled graph"""
        self._clock = StepClock()

    def event(self, severity: str, kind: str, message: str, **fields: Any) -> None:
        """Write a row of `events`; what happens before the run has a name is kept until then."""
        self.session.event(severity, kind, message, step=self.step, **fields)

    # -- attaching ---------------------------------------------------------------------------------------------------

    @staticmethod
    def check(model: Any) -> None:
        """Refuse what cannot be observed.

        Raises:
            ModelError: it is no module, or has no parameters.
        """
        if not isinstance(model, nn.Module):
            raise ModelError(f"a torch.nn.Module was expected; got {type(model).__name__}")
        if next(iter(model.parameters()), None) is None:
            raise ModelError(
                f"a model with parameters was expected; {type(model).__name__} has none. Attach to the module that "
                "holds them"
            )

    def attach(
        self,
        model: nn.Module,
        *,
        outer: nn.Module | None = None,
        optimizer: Any = None,
        before_forward: Callable[[Mapping[str, Any]], None] | None = None,
        continues: str | None = None,
        tokenizer: Any = None,
        max_steps: int | None = None,
    ) -> None:
        """Put the taps on.

        Args:
            model: the bare model.
            outer: the module the loop calls, where that is a wrapper of `model`.
            optimizer: what steps it, if known.
            before_forward: told of each call of the model before the agent is.
            continues: name of the run that this one goes on with, where the settings name none.
            tokenizer: what the model's tokens come from, a tokenizer or a processor of transformers, if known.
            max_steps: step at which training is to end, if known.

        Raises:
            ModelError: see `check`.
        """
        self.detach()
        self.check(model)
        outer = model if outer is None else outer
        self.model = model
        self.topology: Topology = discover(model)
        self.probe = Probe()
        self.parameters = ParameterTap(model)
        self._before_forward = before_forward
        self.set_optimizer(optimizer)
        self._compiled = is_compiled(outer)
        self.mode = self.settings.mode
        if self.mode == "auto":
            self.mode = "shadow" if self._compiled else "taps"
        self._activation_taps = ActivationTaps(self.topology, self._see_activation, self.guard)
        self._attention_tap = AttentionTap(self.topology, self._see_attention, self.guard)
        self._outer = OuterTap(outer, model, self.forward_begin, self.forward_end)
        self._clock = StepClock()
        self._max_steps = max_steps
        self.meter.reset()
        self.schedule.settle()  # what an earlier run has left is not this one's
        self.session.start(model, continues=continues)
        if self.settings.probe is not None:
            with self.guard("freezing the probe"):
                self.probe.freeze(self.settings.probe, model=model)
        attachment = Attachment(
            model=model,
            topology=self.topology,
            probe=self.probe,
            parameters=self.parameters,
            optimizer=lambda: self.optimizer,
            event=self.event,
            request=self.schedule.request,
            grad_norm=lambda: self._grad_norm,
            world_size=self.session.world_size,
            tokenizer=tokenizer,
        )
        for instrument in self.instruments.values():
            with self.guard(f"instrument {instrument.name}"):
                instrument.attach(attachment)
        if self.mode == "taps":
            self._install_taps(self.instruments.values())
        self._outer.install()
        self.attached = True
        if not self.topology.sites:
            self.event(
                "warning",
                "no_layers",
                f"a list of blocks was expected in {type(model).__name__}; none was found, so layers and heads are "
                "not measured",
            )

    def detach(self) -> None:
        """Take everything off, write what is left, and close the store's writer."""
        if not self.attached:
            return
        self.attached = False
        with self.guard("detaching"):
            self._outer.remove()
            self._remove_taps()
            for instrument in self.instruments.values():
                with self.guard(f"instrument {instrument.name}"):
                    instrument.detach()
            self.parameters.release(memory=True)
            self._describe_run()
            self.session.finish()

    def set_optimizer(self, optimizer: Any) -> None:
        """Tell which optimizer steps the model."""
        self.optimizer = unwrap_optimizer(optimizer)
        self._optimizer_columns = {} if self.optimizer is None else describe_optimizer(self.optimizer)

    @property
    def in_step(self) -> bool:
        """Whether a step is open."""
        return self.attached and self._clock.open

    # -- the life of a step ------------------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Optimizer step number `step` (from 1) begins."""
        if not self.attached:
            return
        with self.meter("agent"), self.guard("beginning a step"):
            self.step = step
            self._clock.begin()
            self._active = [self.instruments[name] for name in self.schedule.due(step)]
            self.ends_with_forward = False
            self._unseen = True
            for instrument in self._active:
                self._call(instrument, "begin", step)

    def forward_begin(self, batch: Mapping[str, Any]) -> None:
        """The model is called with `batch`; the step's first call is the one that is observed."""
        if self._probing:
            return
        if self._before_forward is not None:
            self._before_forward(batch)
        if not self.in_step or not (torch.is_grad_enabled() or self.ends_with_forward):
            return
        with self.meter("agent"), self.guard("observing a forward pass"):
            self._observing = True
            self._clock.saw_batch(batch)
            for instrument in self._active:
                self._call(instrument, "on_batch", batch)
            if not self.probe.frozen and any(Tap.PROBE in i.taps for i in self.instruments.values()):
                self.probe.freeze(batch, model=self.model)
            first, self._unseen = self._unseen, False
            if not first or not self._wants(Tap.ACTIVATIONS, Tap.ATTENTION, Tap.HEADS):
                return
            both = {"encoder", "decoder"} <= set(self.topology.stacks)
            forward = ForwardPass(batch, is_encoder_decoder=both)
            if self.mode == "shadow":
                self._shadow(forward)
            else:
                self._arm(forward)
                self._in_graph = forward if self._compiled else None

    def forward_end(self, output: Any) -> None:
        """The call of the model is over."""
        if self._probing or not self._observing:
            return
        with self.meter("agent"), self.guard("observing a forward pass"):
            self._observing = False
            self._silence()
            forward, self._in_graph = self._in_graph, None
            if forward is not None:
                self._check_graph(forward)
            self._clock.saw_output(output)
        if self.ends_with_forward:
            self.end_step()

    def before_update(self) -> None:
        """The optimizer is about to step."""
        if not self.in_step or not self._active:
            return
        with self.meter("agent"), self.guard("before an update"):
            if self._wants(Tap.UPDATE):
                with self.meter("snapshot"):
                    self.parameters.snapshot(keep=any({Tap.UPDATE, Tap.PROBE} <= i.taps for i in self._active))
            for instrument in self._active:
                self._call(instrument, "before_update")

    def after_update(self) -> None:
        """The optimizer has stepped; learning rates and gradients are still those of the step."""
        if not self.in_step:
            return
        with self.meter("agent"), self.guard("after an update"):
            self._clock.saw_learning_rate(self.optimizer)
            for instrument in self._active:
                self._call(instrument, "after_update")

    def end_step(self, *, loss: Any = None, grad_norm: Any = None) -> None:
        """The step is over. `loss` and `grad_norm` are what the loop knows of it, tensors or numbers."""
        if not self.in_step:
            return
        with self.guard("ending a step"):
            with self.meter("agent"):
                self._grad_norm = grad_norm
                with self._own_forwards():
                    for instrument in self._due(Tap.PROBE):
                        self._call(instrument, "measure", self.step)
                harvests = self._harvest()
                if self._clock.learning_rate is None:
                    self._clock.saw_learning_rate(self.optimizer)
                self.parameters.release()
                tensors: dict[tuple[str, str], Tensor] = {
                    (name, key): tensor for name, h in harvests.items() for key, tensor in h.tensors.items()
                }
                scalars, own = self._clock.end(loss=loss, grad_norm=grad_norm)
                tensors.update({("steps", key): tensor for key, tensor in scalars.items()})
                packet = Packet(tensors)
                self._describe_run()
                notes = {name: h.note for name, h in harvests.items()}
                fired, self._active = bool(self._active), []
            own["telemetry_seconds"] = [self.meter.seconds]
            self.meter.reset()
            with self.meter("agent"):  # the step's account is closed: handing over is charged to the next one
                overhead = {"overhead": self.schedule.settle()} if fired else {}
                for name, note in notes.items():
                    self.session.submit(self.step, partial(self._instrument_rows, name, note, packet, own))
                self.session.submit(self.step, partial(self._step_rows, packet, own, overhead))

    # -- inside ------------------------------------------------------------------------------------------------------

    # The next two run on the writer's thread, one after the other, the step's own row last.

    def _instrument_rows(
        self, name: str, note: Any, packet: Packet, step_columns: dict[str, Any]
    ) -> Mapping[str, Columns]:
        host = {column: array for (owner, column), array in packet.open().items() if owner == name}
        tables = dict(self.instruments[name].rows(host, note))
        step_columns.update(tables.pop("steps", {}))  # what it can say of the step itself
        return tables

    @staticmethod
    def _step_rows(
        packet: Packet, step_columns: dict[str, Any], overhead: Mapping[str, Columns]
    ) -> Mapping[str, Columns]:
        scalars = {column: array.reshape(1) for (owner, column), array in packet.open().items() if owner == "steps"}
        if "tokens" in scalars:
            scalars["tokens"] = scalars["tokens"].astype(np.int64)
        return {"steps": {**step_columns, **scalars}, **overhead}

    def _harvest(self) -> dict[str, Harvest]:
        harvests: dict[str, Harvest] = {}
        for instrument in self._active:
            with self.meter(instrument.name), self.guard(f"instrument {instrument.name}"):
                harvest = instrument.harvest()
                if harvest is not None:
                    harvests[instrument.name] = harvest
                    self.schedule.captured(instrument.name)
        return harvests

    def _shadow(self, forward: ForwardPass) -> None:
        """Run the batch once more beside the model's own forward, with taps on and no trace left."""
        arguments = {k: v for k, v in forward.batch.items() if k not in {"past_key_values", "use_cache"}}
        try:
            self._install_taps(self._active)
            with (
                self.meter("shadow"),
                self._own_forwards(),
                preserved(self.model),
                torch.no_grad(),
                torch.compiler.set_stance("force_eager"),
            ):
                self._arm(forward)
                self.model(**arguments)
        finally:
            self._remove_taps()

    def _check_graph(self, forward: ForwardPass) -> None:
        """A graph that was compiled before the taps were put on runs on without them: then the shadow takes over."""
        activations, attention = self._activation_taps, self._attention_tap
        if activations.seen >= len(activations) and (activations.seen or attention.seen):
            return
        self.event(
            "warning",
            "taps_too_late",
            f"the compiled graph passed {activations.seen} of {len(activations)} taps on activations and "
            f"{attention.seen} on attention: most likely it, or one of the same class, was compiled before the agent "
            "attached. The model is observed by shadow forwards from here on. To have taps in its graph, attach before "
            "its first call, or call torch._dynamo.reset() first",
        )
        self.mode = "shadow"
        self._remove_taps()
        for instrument in self._due(Tap.ACTIVATIONS, Tap.ATTENTION, Tap.HEADS):  # again, without what came in part
            self._call(instrument, "begin", self.step)
            self._call(instrument, "on_batch", forward.batch)
        self._shadow(forward)

    @contextmanager
    def _own_forwards(self) -> Iterator[None]:
        self._probing = True
        try:
            yield
        finally:
            self._probing = False

    def _install_taps(self, instruments: Iterable[Instrument]) -> None:
        taps = {tap for instrument in instruments for tap in instrument.taps}
        self._activation_taps.install(sites=Tap.ACTIVATIONS in taps, heads=Tap.HEADS in taps)
        if Tap.ATTENTION in taps:
            self._attention_tap.install()

    def _remove_taps(self) -> None:
        self._activation_taps.remove()
        self._attention_tap.remove()

    def _arm(self, forward: ForwardPass) -> None:
        self._activation_taps.arm(forward, sites=self._wants(Tap.ACTIVATIONS), heads=self._wants(Tap.HEADS))
        self._attention_tap.arm(forward if self._wants(Tap.ATTENTION) else None)

    def _silence(self) -> None:
        self._activation_taps.silence()
        self._attention_tap.silence()

    def _see_activation(self, activation: Activation) -> None:
        heads = activation.site.site == "head_out"
        for instrument in self._due(Tap.HEADS if heads else Tap.ACTIVATIONS):
            self._call(instrument, "on_heads" if heads else "on_activation", activation)

    def _see_attention(self, call: AttentionCall) -> None:
        for instrument in self._due(Tap.ATTENTION):
            self._call(instrument, "on_attention", call)

    def _call(self, instrument: Instrument, method: str, *args: Any) -> None:
        with self.meter(instrument.name), self.guard(f"instrument {instrument.name}"):
            getattr(instrument, method)(*args)

    def _due(self, *taps: Tap) -> list[Instrument]:
        return [i for i in self._active if not i.taps.isdisjoint(taps)]

    def _wants(self, *taps: Tap) -> bool:
        return any(tap in i.taps for i in self._active for tap in taps)

    def _describe_run(self) -> None:
        """Have the row of `runs` written; what takes time (hashes, versions) is done on the writer's thread."""
        with self.guard("describing the run"):
            about = partial(
                describe_run,
                settings=self.settings,
                model=self.model,
                topology=self.topology,
                optimizer=self._optimizer_columns,
                mode=self.mode,
                world_size=self.session.world_size,
                max_steps=self._max_steps,
                probe=self.probe,
            )
            self.session.describe(self.step, lambda: {"runs": about()})


def _build_instruments(settings: Settings) -> dict[str, Instrument]:
    known = installed_instruments()
    return {name: known[name].load().build(**own) for name, own in settings.instruments.items()}
