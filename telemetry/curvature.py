"""Curvature of a loss outside a run: what the instruments measure, of any model on any batch.

    from lm_telemetry import Curvature
    estimate = Curvature(model, batch).sharpness(k=3)
    print(estimate.value, estimate.residual, estimate.converged, estimate.hvps)

`batch` maps the model's argument names to tensors, and the model returns its loss (a Hugging Face model does, given
`labels`); any other model needs `loss`, a function of model and batch. All trainable parameters are the coordinates, so
that of a model with adapters only these are. Inside a method the model is in eval mode and dropout is off; afterwards
parameters, gradients, modes and random states are as before, bit by bit, also after an exception.

| method | estimates | source |
| --- | --- | --- |
| `sharpness` | largest or smallest eigenvalues, by Lanczos | arXiv 2103.00065, 2207.14484 |
| `block_sharpness` | largest eigenvalue of each block's own Hessian | ditto |
| `trace` | sum of the eigenvalues, by Hutchinson or Hutch++ | 2010.09649 |
| `density` | distribution of the eigenvalues, by stochastic Lanczos quadrature | 1901.10159 |

All raise ProbeError where there is no curvature to speak of: no labels, a loss that is NaN, nothing trainable, more
eigenvalues asked for than there are parameters, an optimizer without a preconditioner; and ValueError for settings that
make no sense. Left out: critical sharpness, which belongs to an optimizer's step, and averaging over ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from lm_telemetry.errors import ModelError, ProbeError
from lm_telemetry.hooks.curvature_operator import DERIVATIVES, Derivative, MicroBatched, curvature_operator
from lm_telemetry.hooks.gauss_newton import GaussNewton
from lm_telemetry.hooks.optimizer import preconditioner, read_optimizer
from lm_telemetry.hooks.parameter_tap import ParameterTap
from lm_telemetry.hooks.preserve import evaluating
from lm_telemetry.hooks.probe import Probe
from lm_telemetry.hooks.topology import discover, scopes
from lm_telemetry.instruments.sharpness import ASYMMETRY_LIMIT
from lm_telemetry.kernels.density import SpectralDensity, spectral_density
from lm_telemetry.kernels.lanczos import EigenPair, lanczos
from lm_telemetry.kernels.trace import hutch_pp, hutchinson, own_generator
from lm_telemetry.observation import bare

if TYPE_CHECKING:
    from torch.optim import Optimizer

OperatorName = Literal["hessian", "preconditioned", "gauss_newton"]
OPERATORS = ("hessian", "preconditioned", "gauss_newton")
TRACE_METHODS = {"hutchinson": hutchinson, "hutch++": hutch_pp}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What every estimate says of itself.

    Attributes:
        operator: `hessian`, `preconditioned` (P^-1/2 H P^-1/2 with Adam's P) or `gauss_newton`.
        scope: `all` trainable parameters; a layer as `stack.layer`, `embedding`, or `other` for the rest.
        derivative: how the operator was applied, `double_backward` or `finite_difference`.
        remark: why finite differences stand in for a second derivative that was not excluded; else None.
        dimension: P, the parameters in scope.
        loss: loss on the batch.
        n_tokens: tokens in the batch; None for a batch without tokens.
        hvps: products with the operator that were spent.
        seconds: wall time.
    """

    operator: OperatorName
    scope: str
    derivative: str
    remark: str | None
    dimension: int
    loss: float
    n_tokens: int | None
    hvps: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Eigenvalues(Estimate):
    """Extreme eigenvalues.

    Attributes:
        pairs: (value, residual, converged) of each, the most extreme first. Some eigenvalue lies within `residual` of
            `value`; of finite differences their estimated error is counted in.
        threshold: the edge of stability that the largest may be compared with; None where there is none, or without an
            optimizer.
        asymmetry: what symmetry forbids, relative to the largest magnitude. Above some 0.02 a part of the model has no
            second derivative, or rounds too coarsely; then nothing counts as converged.
    """

    pairs: tuple[EigenPair, ...]
    threshold: float | None
    asymmetry: float

    @property
    def value(self) -> float:
        """The most extreme eigenvalue."""
        return self.pairs[0].value

    @property
    def residual(self) -> float:
        """Its residual."""
        return self.pairs[0].residual

    @property
    def converged(self) -> bool:
        """Whether all of them converged."""
        return all(pair.converged for pair in self.pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace(Estimate):
    """The sum of all eigenvalues.

    Attributes:
        value: unbiased estimate.
        stderr: its standard error, from the scatter of the probes; None where there is no scatter.
        probes: random vectors that the scatter was taken over.
    """

    value: float
    stderr: float | None
    probes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Density(Estimate):
    """The distribution of the eigenvalues.

    Attributes:
        spectrum: `grid`, `density` and `density_stderr`, each (grid_points,), and the quadrature they come from, in
            float64 on the host.
    """

    spectrum: SpectralDensity


class Curvature:
    """The curvature of a model's loss on a batch, at the parameters the model has when a method is called.

    Args:
        model: any module; a wrapper (DDP, `torch.compile`) is looked through.
        batch: the model's arguments by name, or, with `loss`, whatever that takes. A copy is kept.
        loss: (model, batch) -> scalar; None for the loss that the model returns.
        operator: the matrix.
        optimizer: gives the threshold, and for `preconditioned` the P of an Adam that has stepped.
        derivative: how the Hessian is applied; `auto` takes `double_backward` where the model has a second derivative.
        micro_batch: sequences differentiated at a time, to bound the memory; None for all at once.

    Raises:
        ModelError: the model is no module.
        ProbeError: the batch is nothing the model can be given.
        ValueError: another operator or derivative.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        *,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
        operator: OperatorName = "hessian",
        optimizer: Optimizer | None = None,
        derivative: Derivative = "auto",
        micro_batch: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
        for setting, value, known in (("operator", operator, OPERATORS), ("derivative", derivative, DERIVATIVES)):
            if value not in known:
                raise ValueError(f"{setting}: expected one of {', '.join(known)}; got {value!r}")
        if operator == "gauss_newton" and (loss is not None or derivative == "finite_difference"):
            raise ValueError("gauss_newton: it is of a model's own loss, by double backward; no `loss`, no differences")
        model = bare(model)
        if loss is None and not isinstance(batch, Mapping):
            raise ProbeError(
                f"batch: expected a mapping from argument names of {type(model).__name__} to tensors; got "
                f"{type(batch).__name__}. For anything else give `loss`, a function of model and batch"
            )
        self._bare = model
        self._model = model if loss is None else _WithLoss(model, loss)
        self._tap, self._topology = ParameterTap(model), discover(model)
        self._probe = Probe()
        self._probe.freeze(batch if isinstance(batch, Mapping) else {_WHOLE: batch}, model=model)
        self._operator, self._optimizer = operator, optimizer
        self._derivative, self._micro_batch = derivative, micro_batch

    def sharpness(
        self,
        *,
        k: int = 1,
        which: Literal["largest", "smallest"] = "largest",
        tolerance: float = 0.01,
        max_hvps: int = 100,
    ) -> Eigenvalues:
        """The k algebraically largest (or smallest) eigenvalues.

        Args:
            k: eigenvalues wanted.
            which: from which end.
            tolerance: relative error at which an eigenvalue counts as converged.
            max_hvps: products to spend at most; what was found by then is returned with `converged` false.
        """
        return self._eigenvalues("all", self._tap.parameters, k=k, which=which, tolerance=tolerance, max_hvps=max_hvps)

    def block_sharpness(self, *, tolerance: float = 0.01, max_hvps: int = 100) -> tuple[Eigenvalues, ...]:
        """The largest eigenvalue of each block's own Hessian, in the order of the model; none exceeds the whole's.

        A block is a layer, the input embedding (with a tied output head), or what is left. `max_hvps` is for each.
        """
        tap = self._tap
        parts = scopes(self._bare, self._topology, tap.names, tap.parameters)
        blocks = {scope: [tap.parameters[i] for i in indices] for scope, indices in parts.items()}
        return tuple(
            self._eigenvalues(scope, parameters, k=1, which="largest", tolerance=tolerance, max_hvps=max_hvps)
            for scope, parameters in blocks.items()
        )

    def trace(
        self, *, probes: int = 30, method: Literal["hutchinson", "hutch++"] = "hutchinson", seed: int = 0
    ) -> Trace:
        """The sum of the eigenvalues.

        Args:
            probes: products to spend.
            method: Hutch++ pays where few eigenvalues carry the trace; it holds a vector for every third product,
                Hutchinson one.
            seed: of the random signs.
        """
        if method not in TRACE_METHODS:
            raise ValueError(f"method: expected one of {', '.join(TRACE_METHODS)}; got {method!r}")
        with self._applied(self._tap.parameters) as applied:
            found = TRACE_METHODS[method](applied.matvec, probes=probes, **applied.space(seed))
            return Trace(value=found.value, stderr=found.stderr, probes=found.probes, **applied.about("all"))

    def density(
        self,
        *,
        probes: int = 4,
        steps: int = 40,
        grid_points: int = 200,
        width: float | None = None,
        seed: int = 0,
    ) -> Density:
        """The density of the eigenvalues.

        Args:
            probes: random vectors.
            steps: products from each; that many vectors are held.
            grid_points: points at which the density is given.
            width: standard deviation of the Gaussians that broaden it; None takes 1 % of the span.
            seed: of the random vectors.
        """
        with self._applied(self._tap.parameters) as applied:
            found = spectral_density(
                applied.matvec, probes=probes, steps=steps, grid_points=grid_points, width=width, **applied.space(seed)
            )
            return Density(spectrum=found, **applied.about("all"))

    def _eigenvalues(
        self,
        scope: str,
        parameters: Sequence[Tensor],
        *,
        k: int,
        which: Literal["largest", "smallest"],
        tolerance: float,
        max_hvps: int,
    ) -> Eigenvalues:
        with self._applied(parameters) as applied:
            dimension = applied.base.dimension
            if k > dimension:
                raise ProbeError(f"k = {k} eigenvalues were asked for of {dimension} trainable parameters")
            found = lanczos(
                applied.matvec, k=k, which=which, tolerance=tolerance, max_steps=max_hvps, **applied.space(0)
            )
            # Of A + E some eigenvalue lies within |Ay - θy| of θ, and so of A within |Ey| more.
            error = max(getattr(applied.base, "errors", ()), default=0.0)
            about = applied.about(scope)
        largest = max(abs(p.value) for p in found.pairs)
        sound = found.asymmetry <= ASYMMETRY_LIMIT + (error / largest if largest else 0.0)
        pairs = (
            EigenPair(value=p.value, residual=p.residual + error, converged=p.converged and sound) for p in found.pairs
        )
        threshold = None
        if self._optimizer is not None and which == "largest" and self._operator != "gauss_newton":
            threshold = read_optimizer(self._optimizer).threshold(self._operator)
        return Eigenvalues(pairs=tuple(pairs), threshold=threshold, asymmetry=found.asymmetry, **about)

    @contextmanager
    def _applied(self, parameters: Sequence[Tensor]) -> Iterator[_Applied]:
        """The operator over some parameters, open."""
        began = time.perf_counter()
        try:
            with ExitStack() as stack:
                base = self._open(parameters, stack)
                preconditioned = self._operator == "preconditioned"
                matvec = base.preconditioned(self._diagonal(parameters)).matvec if preconditioned else base.matvec
                tokens = self._probe.n_tokens
                yield _Applied(name=self._operator, base=base, matvec=matvec, n_tokens=tokens, began=began)
        except FloatingPointError as error:
            raise ProbeError(str(error)) from error

    def _open(self, parameters: Sequence[Tensor], stack: ExitStack) -> Any:
        model, probe, size = self._model, self._probe, self._micro_batch
        if self._operator != "gauss_newton":
            return stack.enter_context(
                curvature_operator(model, probe, parameters, derivative=self._derivative, micro_batch=size)
            )
        stack.enter_context(evaluating(model))
        pieces = probe.micro_batches(size, model=model)
        if len(pieces) == 1:
            return stack.enter_context(GaussNewton(model, probe, parameters))
        return stack.enter_context(MicroBatched(lambda piece: GaussNewton(model, piece, parameters), pieces))

    def _diagonal(self, parameters: Sequence[Tensor]) -> Tensor:
        optimizer = self._optimizer
        diagonal = None if optimizer is None else preconditioner(optimizer, parameters)
        if diagonal is None:
            got = (
                "none"
                if optimizer is None
                else type(optimizer).__name__ + ("" if optimizer.state else " without state")
            )
            raise ProbeError(
                "the preconditioned Hessian takes P from an `optimizer` that is an Adam or AdamW and has stepped these "
                f"parameters; got {got}"
            )
        return diagonal


_WHOLE = "batch"
"""Name under which a batch that is no mapping reaches the loss."""


class _WithLoss(nn.Module):
    """A model that returns the loss of a function."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self._loss = model, loss
        # So that attention without a second derivative is refused; the rest of a configuration would not hold here.
        implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
        self.config = SimpleNamespace(_attn_implementation=implementation)

    def forward(self, **batch: Any) -> Tensor:
        return self._loss(self.model, batch[_WHOLE] if list(batch) == [_WHOLE] else batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Applied:
    """An open operator and what is known of it."""

    name: OperatorName
    base: Any
    matvec: Callable[[Tensor], Tensor]
    n_tokens: int | None
    began: float

    def space(self, seed: int) -> dict[str, Any]:
        """Where its vectors live, and what they are drawn from."""
        dimension, dtype, device = self.base.dimension, self.base.dtype, self.base.device
        generator = own_generator(seed, device)
        return {"dimension": dimension, "dtype": dtype, "device": device, "generator": generator}

    def about(self, scope: str) -> dict[str, Any]:
        """The fields of `Estimate`."""
        return {
            "operator": self.name,
            "scope": scope,
            "derivative": getattr(self.base, "derivative", "double_backward"),
            "remark": getattr(self.base, "reason", None),
            "dimension": self.base.dimension,
            "loss": self.base.loss,
            "n_tokens": self.n_tokens,
            "hvps": self.base.hvps,
            "seconds": time.perf_counter() - self.began,
        }
