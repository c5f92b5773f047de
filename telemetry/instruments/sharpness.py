"""`sharpness`: extreme eigenvalues of the loss's curvature on the frozen probe, beside the edge of stability.

Fills `curvature` with estimator `lanczos`, one row per operator and eigenvalue:

* `hessian`: λ of H, to be compared with 2/η of SGD (arXiv 2103.00065);
* `preconditioned`: λ of P^-1/2 H P^-1/2 with Adam's own P, to be compared with (2 + 2β1)/((1 - β1) η) (2207.14484);
* `gauss_newton`: λ of the generalised Gauss-Newton matrix, H without the curvature of the model itself; no threshold.

`index` counts the algebraically largest eigenvalues 0, 1, ... and, with `smallest`, the smallest ones -1, -2, ...

`threshold` holds the number to compare with, and is NULL where there is none: raw curvature under Adam, groups of
different learning rates, an unknown optimizer, the smallest eigenvalues. The first two operators share one graph; its
cost is in the `seconds` of the first. `hvps` and `seconds` belong to a solve and stand at its index 0 or -1.

`derivative` says how H was applied. By finite differences its products have an error of their own, which is estimated
and counted into `residual`. Where the model has no second derivative, or no room for its graph, they are used without
being asked for, from then on, which is told once as an event.

What cannot be measured (no labels, a loss that is not finite) leaves an event and no row. Left out: layers (scope is
`all`), and averaging over ranks: each rank writes its own probe's curvature.
"""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch

from lm_telemetry.errors import ProbeError
from lm_telemetry.hooks.curvature_operator import MicroBatched
from lm_telemetry.hooks.optimizer import preconditioner
from lm_telemetry.hooks.preserve import evaluating
from lm_telemetry.instruments.probing import Differentiating, Row, is_share
from lm_telemetry.kernels.lanczos import RESIDUAL_FACTOR, EigenResult, lanczos

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from lm_telemetry.hooks.differentiate import Operator
    from lm_telemetry.hooks.probe import Probe
    from lm_telemetry.instruments.base import Attachment

OPERATORS = ("hessian", "preconditioned", "gauss_newton")

WARM_STEPS = 20
"""A solve starts from the last one's vectors if they are at most this many steps old; at rarer cadences none are kept.
On an 82,240-parameter Llama under AdamW 1e-3 a warm solve took 6.8 products where a cold one took 10.6 after one step,
9.5 for 13.6 after ten and 11.3 for 14.1 after fifty; its worst error was 1.4 %, 0.8 % and 3.1 %."""

MOST_ERROR = 0.1
"""Estimated error of finite differences, as a share of an eigenvalue, beyond which it does not count as converged."""

WARM_SLOPE, WARM_NOISE, WARM_RESIDUAL = 0.3, 0.1, 3.0
"""How a warm solve for the largest eigenvalues begins and ends. The gradient, with this norm over that of the kept
vectors, leans towards a direction that has newly become the sharpest, before that could grow out of noise. After steps
of AdamW 1e-3 a start without it held on to the old eigenvalue once in twenty (17 % too small); with it, less noise and
a residual of 3 tolerances do: none of 69 was off by more than 0.3 %."""

ASYMMETRY_LIMIT = 0.02
"""Relative asymmetry above which a Hessian is reported as broken; rounding in bfloat16 makes at most 4e-4 of it."""


@dataclass(kw_only=True)
class Sharpness(Differentiating):
    """Extreme Hessian eigenvalues by Lanczos on the frozen probe."""

    name: ClassVar[str] = "sharpness"
    usual_every: ClassVar[int | None] = 500

    k: int = 1
    """Eigenvalues wanted, from the algebraically largest down."""

    smallest: int = 0
    """Eigenvalues wanted from the algebraically smallest up, in a solve of their own."""

    tolerance: float = 0.01
    """Relative error at which an eigenvalue counts as converged."""

    max_hvps: int = 40
    """Hessian-vector products a solve may cost; what was found by then is stored with converged = false."""

    operators: str | Sequence[str] = "auto"
    """Some of `hessian`, `preconditioned` and `gauss_newton`; `auto` takes the first, and the second when an Adam has
    state."""

    derivative: Literal["auto", "double_backward", "finite_difference"] = "auto"
    """How the Hessian is applied: by a second derivative (exact, the memory of a retained graph), or by differences of
    gradients (needs neither); `auto` takes the first where there is one."""

    _warm: dict[str, tuple[int, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _lap: float = field(default=0.0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("k", type(self.k) is int and self.k >= 1, "at least 1")
        self.require("smallest", type(self.smallest) is int and self.smallest >= 0, "at least 0")
        self.require("tolerance", is_share(self.tolerance), "a number between 0 and 1")
        least = max(2, self.k, self.smallest)
        self.require("max_hvps", type(self.max_hvps) is int and self.max_hvps >= least, f"at least {least}")
        if self.operators != "auto":
            given = (self.operators,) if isinstance(self.operators, str) else tuple(self.operators)
            known = bool(given) and all(name in OPERATORS for name in given) and len(set(given)) == len(given)
            self.require("operators", known, f"'auto' or some of {', '.join(OPERATORS)}")
            self.operators = given

    def attach(self, attachment: Attachment) -> None:
        """Keep the model, the probe and the way to the optimizer."""
        super().attach(attachment)
        self._warm.clear()

    def detach(self) -> None:
        """Let go of the model and of the warm starts."""
        super().detach()
        self._warm.clear()

    def estimate(self, attachment: Attachment, step: int) -> list[Row]:
        """One row per operator and eigenvalue."""
        wanted = ("hessian", "preconditioned") if self.operators == "auto" else tuple(self.operators)
        rows: list[Row] = []
        self._lap = time.perf_counter()
        if set(wanted) & {"hessian", "preconditioned"}:
            with self.hessian(attachment) as hessian:
                if "hessian" in wanted:
                    rows += self._solve(attachment, step, "hessian", hessian, hessian, lambda: hessian.gradient)
                diagonal = self._diagonal(attachment) if "preconditioned" in wanted else None
                if diagonal is not None:
                    scale, scaled = diagonal.rsqrt(), hessian.preconditioned(diagonal)
                    rows += self._solve(
                        attachment, step, "preconditioned", hessian, scaled, lambda: hessian.gradient * scale
                    )
        if "gauss_newton" in wanted:
            with self._gauss_newton(attachment) as matrix:
                rows += self._solve(attachment, step, "gauss_newton", matrix, matrix, lambda: matrix.gradient)
        return rows

    @contextmanager
    def _gauss_newton(self, attachment: Attachment) -> Iterator[Any]:
        from lm_telemetry.hooks.gauss_newton import GaussNewton

        model, parameters = attachment.model, attachment.parameters.parameters

        def on(probe: Probe) -> GaussNewton:
            return GaussNewton(model, probe, parameters)

        with evaluating(model):
            pieces = attachment.probe.micro_batches(self.micro_batch, model=model)
            with on(attachment.probe) if len(pieces) == 1 else MicroBatched(on, pieces) as matrix:
                yield matrix

    def _solve(  # noqa: PLR0917 one call a line, side by side
        self,
        attachment: Attachment,
        step: int,
        name: str,
        base: Any,
        operator: Operator,
        gradient: Callable[[], Tensor],
    ) -> list[Row]:
        """The rows of one operator; `base` is what knows the loss, `gradient` is in the operator's coordinates."""
        for setting, k in (("k", self.k), ("smallest", self.smallest)):
            if k > base.dimension:
                raise ProbeError(f"{setting} = {k} eigenvalues were asked for of {base.dimension} parameters")
        reading = self.reading()
        known = name in ("hessian", "preconditioned")
        threshold = reading.threshold(cast("Any", name)) if reading and known else None
        rows: list[Row] = []
        for which, k in (("largest", self.k), ("smallest", self.smallest)):
            if not k:
                continue
            solve = name if which == "largest" else f"{name} {which}"
            done = len(getattr(base, "errors", ()))
            start = self._start(solve, step)
            noise, residual_factor = 1.0, float(RESIDUAL_FACTOR)
            if start is not None and which == "largest":
                noise, residual_factor = WARM_NOISE, WARM_RESIDUAL
                slope = gradient()
                lean = slope / slope.norm().clamp(min=torch.finfo(slope.dtype).tiny)
                start = torch.cat([start, (WARM_SLOPE * len(start) ** 0.5 * lean)[None]])
            result = lanczos(
                operator.matvec,
                dimension=base.dimension,
                k=k,
                which=cast("Any", which),
                start=start,
                noise=noise,
                residual_factor=residual_factor,
                tolerance=self.tolerance,
                max_steps=self.max_hvps,
                dtype=base.dtype,
                device=base.device,
            )
            if (self.every or self.usual_every or 0) <= WARM_STEPS:
                self._warm[solve] = (step, result.vectors)
            error = max(getattr(base, "errors", ())[done:], default=0.0)
            sound = self._report_asymmetry(attachment, name, result, error)
            now = time.perf_counter()
            shared = {
                "operator": name,
                "scope": "all",
                "estimator": "lanczos",
                "threshold": threshold if which == "largest" else None,
                "derivative": getattr(base, "derivative", "double_backward"),
                "loss": base.loss,
                "n_tokens": attachment.probe.n_tokens,
            }
            rows += _rows(result, which, shared, error if sound else math.inf, now - self._lap)
            self._lap = now
        return rows

    def _diagonal(self, attachment: Attachment) -> Tensor | None:
        optimizer: Optimizer | None = attachment.optimizer()
        diagonal = None if optimizer is None else preconditioner(optimizer, attachment.parameters.parameters)
        if diagonal is None and self.operators != "auto":
            attachment.event(
                "warning",
                "no_preconditioner",
                "the preconditioned Hessian was asked for, which needs an Adam or AdamW that has stepped; the "
                f"optimizer is {type(optimizer).__name__}",
            )
        return diagonal

    def _start(self, solve: str, step: int) -> Tensor | None:
        then, vectors = self._warm.pop(solve, (step - WARM_STEPS - 1, None))
        return vectors if step - then <= WARM_STEPS else None

    def _report_asymmetry(self, attachment: Attachment, operator: str, result: EigenResult, error: float) -> bool:
        """Whether the operator was symmetric, as a Hessian is; an event if not."""
        largest = max(abs(pair.value) for pair in result.pairs)
        if result.asymmetry <= ASYMMETRY_LIMIT + (error / largest if largest else 0.0):
            return True
        attachment.event(
            "warning",
            "hessian_not_symmetric",
            f"the {operator} operator is not symmetric (relative asymmetry {result.asymmetry:.2g}): a part of the "
            "model has no second derivative, or rounds too coarsely; do not rely on this eigenvalue",
            asymmetry=result.asymmetry,
        )
        return False


def _rows(result: EigenResult, which: str, shared: Mapping[str, Any], error: float, seconds: float) -> list[Row]:
    return [
        {
            **shared,
            "index": rank if which == "largest" else -1 - rank,
            "value": pair.value,
            # Of A + E some eigenvalue lies within the residual of θ, and so one of A within |Ey| more.
            "residual": pair.residual + error if math.isfinite(error) else None,
            # Differences too coarse for the eigenvalue do not count, nor does an operator that is no Hessian.
            "converged": pair.converged and error <= MOST_ERROR * abs(pair.value),
            "hvps": result.hvps if rank == 0 else None,
            "seconds": seconds if rank == 0 else None,
        }
        for rank, pair in enumerate(result.pairs)
    ]
