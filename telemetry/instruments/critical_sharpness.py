"""`critical_sharpness`: how sharp the loss is along the optimizer's own step, found with forward passes alone.

Let θ be the parameters before a step of learning rate η and θ' after it, so that u = (θ - θ')/η is the direction the
optimizer took. With η_c the smallest step along -u that raises the probe's loss above L(θ), the critical sharpness is
λ_c = 2/η_c (arXiv 2601.16979). On a quadratic it is u'Hu / g'u. It is a curvature along one direction and no
eigenvalue, so it stands under operator `hessian` with estimator `critical`, and without an index.

`threshold` is 2/η whatever the optimizer, since u carries the optimizer's own scaling: λ_c above it says that the step
just taken was longer than the critical one. `residual` is half the last bracket in λ, a bound of the error.

The live parameters are never written: the loss is evaluated with others in their place. With several learning rates u
is scaled by that of the first group, which the threshold uses as well, so that their ratio is right for any. A search
without a crossing, or without a descent that stands out of the rounding noise of the loss, leaves a row with value
NULL; in bfloat16 that noise is a hundred times that of float32.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from lm_telemetry.catalogue import Cost
from lm_telemetry.errors import ProbeError
from lm_telemetry.hooks.preserve import evaluating
from lm_telemetry.instruments.base import Attachment, Tap
from lm_telemetry.instruments.probing import Probing, Row, is_positive, is_share
from lm_telemetry.kernels.line_search import critical_step

LOSS_NOISE: dict[torch.dtype, float] = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-5}
"""Rounding noise of a loss relative to itself, by the dtype it is computed in."""

COARSEST_NOISE = 1.2e-4
"""The same in bfloat16 and below: measured up to 6e-5 between neighbouring points on small Llamas under autocast, so
that a search that took every lowered loss for a descent found steps that were none."""


@dataclass(kw_only=True)
class CriticalSharpness(Probing):
    """Sharpness along the update by a line search on the frozen probe."""

    name: ClassVar[str] = "critical_sharpness"
    taps: ClassVar[frozenset[Tap]] = frozenset({Tap.PROBE, Tap.UPDATE})
    cost: ClassVar[Cost] = Cost.FORWARD
    usual_every: ClassVar[int | None] = 50

    tolerance: float = 0.1
    """Relative width of the bracket of η_c at which the search ends."""

    max_forwards: int = 24
    """Forward passes a search may cost."""

    alarm: float = 0.9
    """Share of the threshold above which `sharpness` is asked to run on the next step, whatever its cadence."""

    _last_eta: float | None = field(default=None, init=False, repr=False, compare=False)
    _noise: float | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("tolerance", is_share(self.tolerance), "a number between 0 and 1")
        self.require("alarm", is_positive(self.alarm), "a positive number")
        self.require("max_forwards", type(self.max_forwards) is int and self.max_forwards >= 3, "at least 3")

    def attach(self, attachment: Attachment) -> None:
        """Keep the model, the probe, and the way to the parameters and the optimizer."""
        self._attachment = attachment
        self._last_eta = self._noise = None

    def estimate(self, attachment: Attachment, step: int) -> list[Row]:
        """Search for the critical step; near the threshold, ask for eigenvalues."""
        began = time.perf_counter()
        rate = None if self._reading is None else self._reading.learning_rate
        if rate is None:
            raise ProbeError(
                "no step of a known optimizer was seen: give `optimizer`, so that its update can be looked along"
            )
        if rate <= 0:
            raise ProbeError(f"a step of learning rate {rate} has no direction")
        names, live = attachment.parameters.names, attachment.parameters.parameters
        before = attachment.parameters.previous
        if not live:
            raise ProbeError("no parameter requires gradients: there is no update to look along")
        if before is None:
            raise ProbeError("the parameters before the update are not held, or not all of them for want of memory")
        model, probe = attachment.model, attachment.probe

        def loss_at(eta: float) -> float:
            # θ - ηu, which is θ at 0 and exactly θ' at the learning rate.
            moved = [torch.lerp(old, new.detach(), eta / rate) for old, new in zip(before, live, strict=True)]
            # Beyond 0 a loss that is not finite is a raised one.
            return float(probe.loss(model, dict(zip(names, moved, strict=True)), require_finite=eta == 0))

        with evaluating(model), torch.no_grad():
            if self._noise is None:
                self._noise = LOSS_NOISE.get(probe.precision(model), COARSEST_NOISE)
            found = critical_step(
                loss_at,
                start=self._last_eta or rate,
                tolerance=self.tolerance,
                max_forwards=self.max_forwards,
                resolution=self._noise,
            )
        self._last_eta = found.eta
        if found.sharpness is not None and found.sharpness > self.alarm * 2 / rate:
            attachment.request("sharpness")
        row = {
            "operator": "hessian",
            "scope": "all",
            "estimator": "critical",
            "derivative": "forward",
            "value": found.sharpness,
            "residual": found.sharpness_error,
            "converged": found.converged,
            "threshold": 2 / rate,
            "forwards": found.forwards,
            "loss": found.loss,
            "n_tokens": probe.n_tokens,
            "seconds": time.perf_counter() - began,
        }
        return [row]

    def severity(self) -> str:
        """A warmup that begins at 0 takes steps of no length; that is nobody's fault."""
        return "info" if self._reading is not None and self._reading.learning_rate == 0 else "warning"
