"""What instruments on the frozen probe share: when they measure, what they hand over, and what becomes of a failure.

A subclass says how it estimates, as rows of its table. Whatever the probe refuses (no labels, a loss that is not
finite, nothing trainable) becomes one event and no row. Estimates are plain numbers on the host already.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from lm_telemetry.catalogue import Cost
from lm_telemetry.errors import ProbeError
from lm_telemetry.hooks.curvature_operator import DERIVATIVES, CurvatureOperator, Derivative, curvature_operator
from lm_telemetry.hooks.optimizer import OptimizerReading, read_optimizer
from lm_telemetry.instruments.base import Attachment, Columns, Harvest, Instrument, Tap

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    from torch import Tensor

Row = dict[str, Any]


@dataclass(kw_only=True)
class Probing(Instrument):
    """Base of instruments that evaluate the loss on the frozen probe when a step is over."""

    tables: ClassVar[tuple[str, ...]] = ("curvature",)
    taps: ClassVar[frozenset[Tap]] = frozenset({Tap.PROBE})

    _attachment: Attachment | None = field(default=None, init=False, repr=False, compare=False)
    _reading: OptimizerReading | None = field(default=None, init=False, repr=False, compare=False)
    _captured: list[Row] = field(default_factory=list, init=False, repr=False, compare=False)

    def estimate(self, attachment: Attachment, step: int) -> list[Row]:
        """Rows of this instrument's table, all with the same columns.

        Raises:
            ProbeError: it cannot be measured.
            FloatingPointError: a number on the way was not finite.
        """
        raise NotImplementedError

    def attach(self, attachment: Attachment) -> None:
        """Keep the way to the model, the probe, the parameters and the optimizer."""
        self._attachment = attachment

    def begin(self, step: int) -> None:
        """Forget the last capture."""
        self._reading = None
        self._captured = []

    def after_update(self) -> None:
        """Read the optimizer while its learning rate is the one of the step."""
        self._reading = self._read()

    def measure(self, step: int) -> None:
        """Estimate."""
        assert self._attachment is not None
        try:
            self._captured = self.estimate(self._attachment, step)
        except (ProbeError, FloatingPointError) as error:
            self._attachment.event(self.severity(), f"{self.name}_not_measured", str(error))

    def harvest(self) -> Harvest | None:
        """Hand over the rows."""
        captured, self._captured = self._captured, []
        return Harvest(note=tuple(captured)) if captured else None

    def rows(self, host: Mapping[str, np.ndarray[Any, Any]], note: Any) -> Mapping[str, Columns]:
        """The rows as columns."""
        return {self.tables[0]: {name: [row[name] for row in note] for name in note[0]}}

    def detach(self) -> None:
        """Let go of the model."""
        self._attachment = None

    def severity(self) -> str:
        """How bad it is that nothing could be measured."""
        return "warning"

    def reading(self) -> OptimizerReading | None:
        """The optimizer in this step; where the loop shows no update, what it says now, after the scheduler's step."""
        return self._reading or self._read()

    def _read(self) -> OptimizerReading | None:
        optimizer = self._attachment.optimizer() if self._attachment else None
        return None if optimizer is None else read_optimizer(optimizer)


@dataclass(kw_only=True)
class Differentiating(Probing):
    """Base of instruments that apply the Hessian."""

    cost: ClassVar[Cost] = Cost.GRADIENT

    derivative: Derivative = "auto"
    """How the Hessian is applied: `double_backward`, `finite_difference`, or `auto`, the first where it can go."""

    micro_batch: int | None = None
    """Sequences of the probe differentiated at a time, so that these bound the memory; None for all at once."""

    _told: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("derivative", self.derivative in DERIVATIVES, f"one of {', '.join(DERIVATIVES)}")
        size = self.micro_batch
        self.require("micro_batch", size is None or (type(size) is int and size >= 1), "at least 1, or None")

    def attach(self, attachment: Attachment) -> None:
        """Keep the way to the model; a new one may have a second derivative."""
        super().attach(attachment)
        self._told = False

    @contextmanager
    def hessian(
        self, attachment: Attachment, parameters: Sequence[Tensor] | None = None
    ) -> Iterator[CurvatureOperator]:
        """The Hessian over some parameters, all by default. Where differences stand in, an event says so once."""
        with curvature_operator(
            attachment.model,
            attachment.probe,
            attachment.parameters.parameters if parameters is None else parameters,
            derivative="finite_difference" if self._told else self.derivative,
            micro_batch=self.micro_batch,
        ) as operator:
            yield operator
        if operator.reason and not self._told:
            self._told = True
            attachment.event("info", "finite_differences", f"the Hessian is applied by differences: {operator.reason}")


def is_share(value: Any) -> bool:
    """Whether a setting is a number strictly between 0 and 1."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1


def is_positive(value: Any) -> bool:
    """Whether a setting is a number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
