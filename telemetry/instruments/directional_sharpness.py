"""`directional_sharpness`: the Hessian along the gradient and along the optimizer's own step, one product each.

Let θ be the parameters before a step of learning rate η and θ' after it, u = (θ - θ')/η the direction that was taken,
and g and H the probe's gradient and Hessian at θ. Fills `curvature` with estimator `directional`:

* scope `update`: u'Hu / g'u. To second order it is the critical sharpness (2601.16979), and on a quadratic equal to it;
  where that searches with forward passes how far the loss stays lowered, this looks at the point itself. `threshold` is
  2/η whatever the optimizer, since u carries the optimizer's own scaling. NULL where g'u is not positive: the step did
  not go down the probe's loss;
* scope `gradient`: g'Hg / g'g, at most the largest eigenvalue. `threshold` is 2/η under SGD, and NULL elsewhere, where
  no step of length η is taken along the gradient.

Both are at θ, as critical sharpness is: while they are measured the live parameters and the copies from before the step
change places, tensor by tensor and bit by bit, and back again whatever happens. Where there are no such copies (no
optimizer known, no memory) an event says so, and the gradient's row alone is left, taken at θ'. With several learning
rates u is scaled by that of the first group.

Cost: the retained graph and two products, about 6.5 gradients. Left out: averaging over ranks.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lm_telemetry.hooks.differentiate import flatten
from lm_telemetry.instruments.base import Attachment, Tap
from lm_telemetry.instruments.probing import Differentiating, Row

if TYPE_CHECKING:
    from torch import Tensor

    from lm_telemetry.hooks.curvature_operator import CurvatureOperator


@dataclass(kw_only=True)
class DirectionalSharpness(Differentiating):
    """Curvature along gradient and update on the frozen probe."""

    name: ClassVar[str] = "directional_sharpness"
    taps: ClassVar[frozenset[Tap]] = frozenset({Tap.PROBE, Tap.UPDATE})
    usual_every: ClassVar[int | None] = 200

    def __post_init__(self) -> None:
        super().__post_init__()

    def estimate(self, attachment: Attachment, step: int) -> list[Row]:
        """Both directions."""
        began = time.perf_counter()
        probe, live = attachment.probe, attachment.parameters.parameters
        held, rate = attachment.parameters.previous, self._rate(attachment)
        rows: list[Row] = []
        with ExitStack() as stack:
            for parameter, copy in zip(live, held or (), strict=held is not None):
                _exchange(parameter, copy)
                stack.callback(_exchange, parameter, copy)
            hessian = stack.enter_context(self.hessian(attachment))
            directions = [("gradient", hessian.gradient, 1.0)]
            if held is not None and rate is not None:
                here, there = (
                    flatten([p.detach() for p in point], dtype=hessian.dtype, device=hessian.device)
                    for point in (live, held)
                )
                directions.append(("update", here.sub_(there), rate))
            for scope, direction, unit in directions:
                value = _ratio(hessian, direction)
                seconds, began = time.perf_counter() - began, time.perf_counter()
                rows.append(
                    {
                        "operator": "hessian",
                        "scope": scope,
                        "estimator": "directional",
                        "derivative": hessian.derivative,
                        # θ - θ' is ηu, and u stands twice above the line and once below.
                        "value": None if value is None else value / unit,
                        "threshold": self._threshold(scope),
                        "hvps": None if value is None else 1,
                        "loss": hessian.loss,
                        "n_tokens": probe.n_tokens,
                        "seconds": seconds,
                    }
                )
        return rows

    def _rate(self, attachment: Attachment) -> float | None:
        """The learning rate of the step; None, with an event, if its update cannot be looked along."""
        rate = None if self._reading is None else self._reading.learning_rate
        if rate is None:
            missing = "no step of a known optimizer was seen: give `optimizer`, so that its update can be looked along"
        elif rate <= 0:
            missing = f"a step of learning rate {rate} has no direction"
        elif attachment.parameters.previous is None:
            missing = "the parameters before the update are not held, or not all of them for want of memory"
        else:
            return rate
        # A warmup that begins at 0 takes steps of no length; that is nobody's fault.
        attachment.event("info" if rate == 0 else "warning", "update_not_looked_along", missing)
        return None

    def _threshold(self, scope: str) -> float | None:
        if self._reading is None or (scope == "gradient" and self._reading.kind != "sgd"):
            return None
        return self._reading.threshold("critical")


def _ratio(hessian: CurvatureOperator, direction: Tensor) -> float | None:
    """Curvature over slope, d'Hd / g'd; None where the loss does not fall along -d."""
    size = float(direction.norm())
    descent = float(hessian.gradient @ direction)
    if not descent > 0:
        return None
    unit = direction / size  # a product rounds least at unit length
    return size**2 * float(unit @ hessian.matvec(unit)) / descent


def _exchange(parameter: Tensor, copy: Tensor) -> None:
    """Swap the values of two tensors, bit by bit; through `.data`, so that no version is raised."""
    kept = parameter.data.clone()
    parameter.data.copy_(copy)
    copy.copy_(kept)
