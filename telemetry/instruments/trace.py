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
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from lm_telemetry.instruments.probing import Differentiating, Row
from lm_telemetry.kernels.trace import hutch_pp, hutchinson, own_generator

if TYPE_CHECKING:
    from lm_telemetry.instruments.base import Attachment

METHODS = {"hutchinson": hutchinson, "hutch++": hutch_pp}


@dataclass(kw_only=True)
class Trace(Differentiating):
    """Trace of the Hessian on the frozen probe."""

    name: ClassVar[str] = "trace"
    usual_every: ClassVar[int | None] = 1000

    method: Literal["hutchinson", "hutch++"] = "hutchinson"
    """Hutch++ pays where few eigenvalues carry the trace, which those of a language model do not; it holds a vector for
    every third product, Hutchinson one."""

    probes: int = 12
    """Hessian-vector products to spend."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("method", self.method in METHODS, f"one of {', '.join(METHODS)}")
        # One probe has no scatter, and Hutch++ keeps a third for the remainder.
        least = 4 if self.method == "hutch++" else 2
        self.require("probes", type(self.probes) is int and self.probes >= least, f"at least {least}")

    def estimate(self, attachment: Attachment, step: int) -> list[Row]:
        """The trace, one row."""
        began = time.perf_counter()
        with self.hessian(attachment) as hessian:
            found = METHODS[self.method](
                hessian.matvec,
                dimension=hessian.dimension,
                probes=self.probes,
                generator=own_generator(step, hessian.device),
                dtype=hessian.dtype,
                device=hessian.device,
            )
            derivative, loss = hessian.derivative, hessian.loss
        row = {
            "operator": "hessian",
            "scope": "all",
            "estimator": self.method,
            "derivative": derivative,
            "value": found.value,
            "stderr": found.stderr,
            "hvps": found.hvps,
            "loss": loss,
            "n_tokens": attachment.probe.n_tokens,
            "seconds": time.perf_counter() - began,
        }
        return [row]
