"""What an instrument is: the one contract between a measurement and the agent.

Life of an instrument, all on the training thread unless said otherwise:

1. It is built with its own settings (its dataclass fields), which are validated there.
2. `attach(attachment)`: the model is known. It keeps what it needs of it.
3. On a step for which the schedule says it is due, in this order: `begin`; `on_batch` before each micro-batch's
   forward; `on_activation`, `on_attention` and `on_heads` inside the first of them; `before_update`, `after_update`
   around the optimizer's step; `measure`, where probes are evaluated; `harvest`, which hands over small device tensors
   (and plain Python notes).
4. The agent copies the tensors of all instruments to the host in one go. On the background thread, `rows` turns the
   host copies into columns of tables. It must depend on nothing but its arguments and what is fixed since `attach`,
   since the next step may be running.
5. `detach`: everything kept is let go.

Methods on the training thread must not synchronise with the device, write files, or change the model; `measure` may
synchronise, since a line search or an eigen-solver decides on the host. Whatever they raise is caught by the agent and
becomes an event. Columns that are left out, and masked entries, are stored as NULL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from lm_telemetry.catalogue import Cost
from lm_telemetry.errors import SettingsError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from lm_telemetry.hooks.activation_taps import Activation
    from lm_telemetry.hooks.attention_call import AttentionCall
    from lm_telemetry.hooks.parameter_tap import ParameterTap
    from lm_telemetry.hooks.probe import Probe
    from lm_telemetry.hooks.topology import Topology

Columns = Mapping[str, "Sequence[Any] | np.ndarray[Any, Any]"]
"""Columns of equal length by name, without keys the writer adds (attempt, step, time). May hold masked arrays."""


class Tap(StrEnum):
    """What an instrument must be shown."""

    ACTIVATIONS = "activations"
    ATTENTION = "attention"
    HEADS = "heads"
    UPDATE = "update"
    PROBE = "probe"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """What an instrument may know of the run it is attached to.

    Attributes:
        model: the bare model (no DDP, no compile wrapper).
        topology: which module is which layer and site.
        probe: the frozen probe batch; empty until the first batch was seen.
        parameters: trainable parameters, and their values before the current update.
        optimizer: returns the live optimizer, or None while it is unknown.
        event: `event(severity, kind, message, **fields)` writes a row of `events`.
        request: `request(name)` makes another instrument due on the next step, if it is there.
        grad_norm: from `measure` on, the norm of the step's whole gradient before clipping, a tensor or a number; None
            where the loop did not tell.
        world_size: number of ranks that train together.
        tokenizer: the tokenizer or processor that the front door was given; None if there is none.
    """

    model: torch.nn.Module
    topology: Topology
    probe: Probe
    parameters: ParameterTap
    optimizer: Callable[[], torch.optim.Optimizer | None]
    event: Callable[..., None]
    request: Callable[[str], None]
    grad_norm: Callable[[], Any]
    world_size: int
    tokenizer: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Harvest:
    """What one capture hands over.

    Attributes:
        tensors: small tensors on the model's device, to be copied to the host.
        note: anything else `rows` needs; plain Python data, not changed afterwards.
    """

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    note: Any = None


@dataclass(kw_only=True)
class Instrument:
    """Base of all instruments: does nothing at every point, so that a subclass says only what it does."""

    name: ClassVar[str]
    tables: ClassVar[tuple[str, ...]]
    taps: ClassVar[frozenset[Tap]] = frozenset()
    cost: ClassVar[Cost] = Cost.FREE
    usual_every: ClassVar[int | None] = None
    """Cadence when the user says nothing; None takes the agent's default cadence."""

    every: int | None = None
    """Cadence in optimizer steps; None takes `usual_every`."""

    def __post_init__(self) -> None:
        self.require(
            "every", self.every is None or (type(self.every) is int and self.every >= 1), "at least 1, or None"
        )

    @classmethod
    def build(cls, **own: Any) -> Instrument:
        """An instrument with its own settings; SettingsError names an unknown one."""
        known = [f.name for f in fields(cls) if f.init]
        for name, value in own.items():
            if name not in known:
                raise SettingsError(
                    f"instruments.{cls.name}: no setting {name!r}; there are {', '.join(known)}",
                    setting=f"instruments.{cls.name}.{name}",
                    value=value,
                )
        return cls(**own)

    def require(self, setting: str, holds: bool, expected: str) -> None:
        """Refuse a setting that does not hold what is expected (SettingsError)."""
        if not holds:
            value = getattr(self, setting)
            raise SettingsError(
                f"instruments.{self.name}.{setting}: expected {expected}; got {value!r}",
                setting=f"instruments.{self.name}.{setting}",
                value=value,
            )

    def attach(self, attachment: Attachment) -> None:
        """The model is known."""

    def begin(self, step: int) -> None:
        """A step on which this instrument is due begins."""

    def on_batch(self, batch: Mapping[str, Any]) -> None:
        """A micro-batch of the step goes into the model."""

    def on_activation(self, activation: Activation) -> None:
        """A site of the model was computed."""

    def on_attention(self, call: AttentionCall) -> None:
        """An attention layer was called."""

    def on_heads(self, activation: Activation) -> None:
        """The outputs of an attention layer's heads, side by side, go into its output projection.

        `activation.site.index` is the index of the attention module in the topology.
        """

    def before_update(self) -> None:
        """The optimizer is about to step; gradients are final."""

    def after_update(self) -> None:
        """The optimizer has stepped; gradients are still there."""

    def measure(self, step: int) -> None:
        """The step is over; the probe may be evaluated."""

    def harvest(self) -> Harvest | None:
        """What was captured, or None if nothing was."""
        return None

    def rows(self, host: Mapping[str, np.ndarray[Any, Any]], note: Any) -> Mapping[str, Columns]:
        """Columns by table, on the background thread; those of `steps` join the step's own row.

        They are read at the next flush: what is handed over here is not changed any more.
        """
        raise NotImplementedError

    def detach(self) -> None:
        """Let go of everything."""
