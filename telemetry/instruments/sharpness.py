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

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from lm_telemetry.catalogue import Cost
from lm_telemetry.errors import ProbeError
from lm_telemetry.hooks.curvature_operator import DERIVATIVES, CurvatureOperator, MicroBatched, curvature_operator
from lm_telemetry.hooks.optimizer import OptimizerReading, preconditioner, read_optimizer
from lm_telemetry.hooks.preserve import evaluating
from lm_telemetry.instruments.base import Attachment, Columns, Harvest, Instrument, Tap
from lm_telemetry.kernels.lanczos import EigenResult, lanczos

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    from torch import Tensor
    from torch.optim import Optimizer

    from lm_telemetry.hooks.differentiate import Operator
    from lm_telemetry.hooks.probe import Probe

OPERATORS = ("hessian", "preconditioned", "gauss_newton")

WARM_STEPS = 20
"""A solve starts from the last one's vectors if they are at most this many steps old; at rarer cadences none are kept.
On an 82,240-parameter Llama under AdamW 1e-3 a warm solve took 6.8 products where a cold one took 10.6 after one step,
9.5 for 13.6 after ten and 11.3 for 14.1 after fifty; its worst error was 1.4 %, 0.8 % and 3.1 %."""

ASYMMETRY_LIMIT = 0.02
"""Relative asymmetry above which a Hessian is reported as broken; rounding in bfloat16 makes at most 4e-4 of it."""


@dataclass(kw_only=True)
class Sharpness(Instrument):
    """Extreme Hessian eigenvalues by Lanczos on the frozen probe."""

    name: ClassVar[str] = "sharpness"
    tables: ClassVar[tuple[str, ...]] = ("curvature",)
    taps: ClassVar[frozenset[Tap]] = frozenset({Tap.PROBE})
    cost: ClassVar[Cost] = Cost.GRADIENT
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

    micro_batch: int | None = None
    """Sequences of the probe differentiated at a time, so that these bound the memory; None for all at once."""

    _attachment: Attachment | None = field(default=None, init=False, repr=False, compare=False)
    _reading: OptimizerReading | None = field(default=None, init=False, repr=False, compare=False)
    _warm: dict[str, tuple[int, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _lap: float = field(default=0.0, init=False, repr=False, compare=False)
    _told: bool = field(default=False, init=False, repr=False, compare=False)
    _captured: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("k", type(self.k) is int and self.k >= 1, "at least 1")
        self.require("smallest", type(self.smallest) is int and self.smallest >= 0, "at least 0")
        self.require("tolerance", is_share(self.tolerance), "a number between 0 and 1")
        self.require("derivative", self.derivative in DERIVATIVES, f"one of {', '.join(DERIVATIVES)}")
        size = self.micro_batch
        self.require("micro_batch", size is None or (type(size) is int and size >= 1), "at least 1, or None")
        least = max(2, self.k, self.smallest)
        self.require("max_hvps", type(self.max_hvps) is int and self.max_hvps >= least, f"at least {least}")
        if self.operators != "auto":
            given = (self.operators,) if isinstance(self.operators, str) else tuple(self.operators)
            known = bool(given) and all(name in OPERATORS for name in given) and len(set(given)) == len(given)
            self.require("operators", known, f"'auto' or some of {', '.join(OPERATORS)}")
            self.operators = given

    def attach(self, attachment: Attachment) -> None:
        """Keep the model, the probe and the way to the optimizer."""
        self._attachment = attachment
        self._told = False
        self._warm.clear()

    def begin(self, step: int) -> None:
        """Forget the learning rate of the last capture."""
        self._reading = None
        self._captured = []

    def after_update(self) -> None:
        """Read the learning rate while it is the one of the step."""
        self._reading = self._read()

    def measure(self, step: int) -> None:
        """Solve for the eigenvalues."""
        assert self._attachment is not None
        try:
            self._captured = self._estimate(self._attachment, step)
        except (ProbeError, FloatingPointError) as error:
            self._attachment.event("warning", "sharpness_not_measured", str(error))

    def harvest(self) -> Harvest | None:
        """Hand over the estimates; they are plain numbers already."""
        captured, self._captured = self._captured, []
        return Harvest(note=tuple(captured)) if captured else None

    def rows(self, host: Mapping[str, np.ndarray[Any, Any]], note: Any) -> Mapping[str, Columns]:
        """One row per operator and eigenvalue."""
        return {"curvature": {name: [row[name] for row in note] for name in note[0]}}

    def detach(self) -> None:
        """Let go of the model and of the warm starts."""
        self._attachment = None
        self._warm.clear()

    def _estimate(self, attachment: Attachment, step: int) -> list[dict[str, Any]]:
        wanted = ("hessian", "preconditioned") if self.operators == "auto" else tuple(self.operators)
        rows: list[dict[str, Any]] = []
        self._lap = time.perf_counter()
        if set(wanted) & {"hessian", "preconditioned"}:
            with self._hessian(attachment) as hessian:
                if "hessian" in wanted:
                    rows += self._solve(attachment, step, "hessian", hessian, hessian)
                diagonal = self._diagonal(attachment) if "preconditioned" in wanted else None
                if diagonal is not None:
                    rows += self._solve(attachment, step, "preconditioned", hessian, hessian.preconditioned(diagonal))
        if "gauss_newton" in wanted:
            with self._gauss_newton(attachment) as matrix:
                rows += self._solve(attachment, step, "gauss_newton", matrix, matrix)
        return rows

    @contextmanager
    def _hessian(self, attachment: Attachment) -> Iterator[CurvatureOperator]:
        with curvature_operator(
            attachment.model,
            attachment.probe,
            attachment.parameters.parameters,
            derivative="finite_difference" if self._told else self.derivative,
            micro_batch=self.micro_batch,
        ) as hessian:
            yield hessian
        if hessian.reason and not self._told:
            self._told = True
            attachment.event("info", "finite_differences", f"the Hessian is applied by differences: {hessian.reason}")

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

    def _solve(
        self, attachment: Attachment, step: int, name: str, base: Any, operator: Operator
    ) -> list[dict[str, Any]]:
        """The rows of one operator; `base` is what knows the loss."""
        for setting, k in (("k", self.k), ("smallest", self.smallest)):
            if k > base.dimension:
                raise ProbeError(f"{setting} = {k} eigenvalues were asked for of {base.dimension} parameters")
        # A loop that shows no update leaves only what the optimizer says now, after the scheduler's step.
        reading = self._reading or self._read()
        known = name in ("hessian", "preconditioned")
        threshold = reading.threshold(cast("Any", name)) if reading and known else None
        rows: list[dict[str, Any]] = []
        for which, k in (("largest", self.k), ("smallest", self.smallest)):
            if not k:
                continue
            solve = name if which == "largest" else f"{name} {which}"
            done = len(getattr(base, "errors", ()))
            result = lanczos(
                operator.matvec,
                dimension=base.dimension,
                k=k,
                which=cast("Any", which),
                start=self._start(solve, step),
                tolerance=self.tolerance,
                max_steps=self.max_hvps,
                dtype=base.dtype,
                device=base.device,
            )
            if (self.every or self.usual_every or 0) <= WARM_STEPS:
                self._warm[solve] = (step, result.vectors)
            error = max(getattr(base, "errors", ())[done:], default=0.0)
            self._report_asymmetry(attachment, name, result, error)
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
            rows += _rows(result, which, shared, error, now - self._lap)
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

    def _read(self) -> OptimizerReading | None:
        optimizer = self._attachment.optimizer() if self._attachment else None
        return None if optimizer is None else read_optimizer(optimizer)

    def _report_asymmetry(self, attachment: Attachment, operator: str, result: EigenResult, error: float) -> None:
        largest = max(abs(pair.value) for pair in result.pairs)
        if result.asymmetry > ASYMMETRY_LIMIT + (error / largest if largest else 0.0):
            attachment.event(
                "warning",
                "hessian_not_symmetric",
                f"the {operator} operator is not symmetric (relative asymmetry {result.asymmetry:.2g}): a part of the "
                "model has no second derivative, or rounds too coarsely; do not rely on this eigenvalue",
                asymmetry=result.asymmetry,
            )


def _rows(
    result: EigenResult, which: str, shared: Mapping[str, Any], error: float, seconds: float
) -> list[dict[str, Any]]:
    return [
        {
            **shared,
            "index": rank if which == "largest" else -1 - rank,
            "value": pair.value,
            # Of A + E some eigenvalue lies within the residual of θ, and so one of A within |Ey| more.
            "residual": pair.residual + error,
            "converged": pair.converged,
            "hvps": result.hvps if rank == 0 else None,
            "seconds": seconds if rank == 0 else None,
        }
        for rank, pair in enumerate(result.pairs)
    ]


def is_share(value: Any) -> bool:
    """Whether a setting is a number strictly between 0 and 1."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1
