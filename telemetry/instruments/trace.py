"""`trace`: the sum of all Hessian eigenvalues on the frozen probe, by random probing.

Fills `curvature` with one row of scope `all` and estimator `hutchinson` or `hutch++` (see `kernels.trace`): `value` is
unbiased, `stderr` its standard error from the scatter of the probes. The trace over the number of parameters is the
mean curvature; beside the largest eigenvalue it tells whether a few directions carry it all. It has no threshold.

Random signs are drawn from a generator of this instrument's own, seeded with the step: the errors of two captures are
independent, so that a mean over captures is better than each. `stderr` does not hold the error of the derivative, which
counts for finite differences only. What cannot be measured leaves an event and no row.

Left out: layers, and averaging over ranks: each rank writes its own probe's trace.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lm_telemetry.catalogue import Cost
from lm_telemetry.errors import ProbeError
from lm_telemetry.hooks.curvature_operator import DERIVATIVES, Derivative, curvature_operator
from lm_telemetry.instruments.base import Attachment, Columns, Harvest, Instrument, Tap
from lm_telemetry.kernels.trace import hutch_pp, hutchinson, own_generator

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

METHODS = {"hutchinson": hutchinson, "hutch++": hutch_pp}


@dataclass(kw_only=True)
class Trace(Instrument):
    """Trace of the Hessian on the frozen probe."""

    name: ClassVar[str] = "trace"
    tables: ClassVar[tuple[str, ...]] = ("curvature",)
    taps: ClassVar[frozenset[Tap]] = frozenset({Tap.PROBE})
    cost: ClassVar[Cost] = Cost.GRADIENT
    usual_every: ClassVar[int | None] = 1000

    method: Literal["hutchinson", "hutch++"] = "hutchinson"
    """Hutch++ pays where few eigenvalues carry the trace, which those of a language model do not; it holds a vector for
    every third product, Hutchinson one."""

    probes: int = 12
    """Hessian-vector products to spend."""

    derivative: Derivative = "auto"
    """How the Hessian is applied, as for `sharpness`."""

    micro_batch: int | None = None
    """Sequences of the probe differentiated at a time, so that these bound the memory; None for all at once."""

    _attachment: Attachment | None = field(default=None, init=False, repr=False, compare=False)
    _told: bool = field(default=False, init=False, repr=False, compare=False)
    _captured: dict[str, Any] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("method", self.method in METHODS, f"one of {', '.join(METHODS)}")
        # One probe has no scatter, and Hutch++ keeps a third for the remainder.
        least = 4 if self.method == "hutch++" else 2
        self.require("probes", type(self.probes) is int and self.probes >= least, f"at least {least}")
        self.require("derivative", self.derivative in DERIVATIVES, f"one of {', '.join(DERIVATIVES)}")
        size = self.micro_batch
        self.require("micro_batch", size is None or (type(size) is int and size >= 1), "at least 1, or None")

    def attach(self, attachment: Attachment) -> None:
        """Keep the model and the probe."""
        self._attachment = attachment
        self._told = False

    def begin(self, step: int) -> None:
        """Forget the last capture."""
        self._captured = None

    def measure(self, step: int) -> None:
        """Estimate the trace."""
        assert self._attachment is not None
        try:
            self._captured = self._estimate(self._attachment, step)
        except (ProbeError, FloatingPointError) as error:
            self._attachment.event("warning", "trace_not_measured", str(error))

    def harvest(self) -> Harvest | None:
        """Hand over the estimate; it is plain numbers already."""
        captured, self._captured = self._captured, None
        return None if captured is None else Harvest(note=captured)

    def rows(self, host: Mapping[str, np.ndarray[Any, Any]], note: Any) -> Mapping[str, Columns]:
        """One row."""
        return {"curvature": {name: [value] for name, value in note.items()}}

    def detach(self) -> None:
        """Let go of the model."""
        self._attachment = None

    def _estimate(self, attachment: Attachment, step: int) -> dict[str, Any]:
        began = time.perf_counter()
        model, probe = attachment.model, attachment.probe
        with curvature_operator(
            model,
            probe,
            attachment.parameters.parameters,
            derivative=self.derivative,
            micro_batch=self.micro_batch,
        ) as hessian:
            found = METHODS[self.method](
                hessian.matvec,
                dimension=hessian.dimension,
                probes=self.probes,
                generator=own_generator(step, hessian.device),
                dtype=hessian.dtype,
                device=hessian.device,
            )
            derivative, loss = hessian.derivative, hessian.loss
        self._tell(attachment, hessian.reason)
        return {
            "operator": "hessian",
            "scope": "all",
            "estimator": self.method,
            "derivative": derivative,
            "value": found.value,
            "stderr": found.stderr,
            "hvps": found.hvps,
            "loss": loss,
            "n_tokens": probe.n_tokens,
            "seconds": time.perf_counter() - began,
        }

    def _tell(self, attachment: Attachment, reason: str | None) -> None:
        """Say once why differences of gradients stand in for the second derivative."""
        if reason and not self._told:
            self._told = True
            attachment.event("info", "finite_differences", f"the Hessian is applied by differences: {reason}")
