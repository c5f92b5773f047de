"""The Hessian of a model on its probe, by whichever derivative the model allows.

    with curvature_operator(model, probe, parameters) as hessian:
        result = lanczos(hessian.matvec, dimension=hessian.dimension, dtype=hessian.dtype, device=hessian.device)

| derivative | gradients a product | peak memory, in peaks of one gradient | error |
| --- | --- | --- | --- |
| `double_backward` | 2.4 | 4 to 5: the graph is kept | that of rounding; bfloat16 autocast 0.4 % to 0.7 % |
| same, micro-batches that do not fit | 3.6 | 4 to 5 of one micro-batch | the same |
| `finite_difference` | 2 to 6 | 1, and twice the parameters | `errors`: up to 0.7 %; bfloat16 autocast 1.4 % to 9 % |

`auto` takes the first where it can, and turns to the last, for good, when the attention or another operation is known
to have no second derivative, or when memory runs out; `reason` says why. A kernel that hides its lack of one it cannot
see: there Lanczos reports the asymmetry.

`parameters` may be any subset; the operator is then the diagonal block of the Hessian for these. Left out: averaging
over ranks.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from lm_telemetry.errors import ProbeError
from lm_telemetry.hooks.differentiate import Operator, Preconditioned, RetainedHessian, require_second_derivative
from lm_telemetry.hooks.finite_difference import FiniteDifferenceHessian
from lm_telemetry.hooks.preserve import evaluating

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from lm_telemetry.hooks.probe import Probe

Derivative = Literal["auto", "double_backward", "finite_difference"]

DERIVATIVES = ("auto", "double_backward", "finite_difference")

SHARE_OF_FREE_MEMORY = 0.5
"""Graphs of all micro-batches are kept if they take at most this share of what the device has free."""

NO_SECOND_DERIVATIVE = ("no second derivative", "double backward")
"""What is said, by this package or by an operation itself, where there is none."""


class ProbeOperator(Operator, Protocol):
    """An operator that lives in a `with` block and knows the loss it belongs to."""

    loss: float
    hvps: int

    @property
    def gradient(self) -> Tensor:
        """Gradient of the loss, (P,)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the flat vectors."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the flat vectors."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class MicroBatched:
    """Sum of w_i A_i over micro-batches of the probe, for an operator A that is linear in the loss.

    The A_i are kept open if, judged by the first, all of them take at most half of the device's free memory. Else,
    and always on the CPU, which has no such count, each product opens them anew, one at a time.

    Args:
        make: the operator on a probe.
        pieces: weights and probes, from `Probe.micro_batches`.

    Attributes:
        loss: value of the loss.
        gradient: its gradient, (P,).
        hvps: products computed so far.
    """

    def __init__(self, make: Callable[[Probe], Any], pieces: Sequence[tuple[float, Probe]]) -> None:
        self._make, self._pieces = make, pieces
        self._open: list[tuple[float, ProbeOperator]] = []
        self._stack = ExitStack()
        self._inside = False
        self.loss = float("nan")
        self.gradient = torch.empty(0)
        self.hvps = 0
        self._dimension = 0

    @property
    def dimension(self) -> int:
        """P, the number of coordinates."""
        return self._dimension

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the flat vectors."""
        return self.gradient.dtype

    @property
    def device(self) -> torch.device:
        """Device of the flat vectors."""
        return self.gradient.device

    def __enter__(self) -> Self:
        loss, total, keep = 0.0, None, False
        with ExitStack() as stack:
            for i, (weight, piece) in enumerate(self._pieces):
                operator = self._make(piece)
                before = _memory(operator.device)
                with ExitStack() as own:
                    own.enter_context(operator)
                    loss += weight * operator.loss
                    gradient, operator.gradient = operator.gradient, torch.empty(0)
                    total = gradient.mul_(weight) if total is None else total.add_(gradient, alpha=weight)
                    del gradient
                    if i == 0:
                        keep = _fits(before, _memory(operator.device), len(self._pieces))
                    if keep:
                        self._open.append((weight, operator))
                        stack.push(own.pop_all())
            assert total is not None
            stack.callback(self._open.clear)
            self._stack = stack.pop_all()
        self.loss, self.gradient, self._dimension, self._inside = loss, total, total.numel(), True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside = False
        self._stack.close()

    def matvec(self, vector: Tensor) -> Tensor:
        """Av for v of shape (P,), as a new tensor."""
        if not self._inside:
            raise RuntimeError("MicroBatched: call matvec inside the `with` block only")
        self.hvps += 1
        total = torch.zeros_like(vector)
        for weight, operator in self._open:
            total.add_(operator.matvec(vector), alpha=weight)
        if not self._open:
            for weight, piece in self._pieces:
                with self._make(piece) as operator:
                    total.add_(operator.matvec(vector), alpha=weight)
        return total


class CurvatureOperator:
    """The Hessian on the probe; made by `curvature_operator`, used as a context manager.

    Attributes:
        reason: why `auto` turned to finite differences; None while it has not.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        parameters: Sequence[Tensor],
        *,
        derivative: Derivative = "auto",
        micro_batch: int | None = None,
    ) -> None:
        if derivative not in DERIVATIVES:
            raise ValueError(f"derivative: expected one of {', '.join(DERIVATIVES)}; got {derivative!r}")
        self._model, self._probe, self._parameters = model, probe, parameters
        self._wanted, self._micro_batch = derivative, micro_batch
        self._inner: ProbeOperator | None = None
        self._stack = ExitStack()
        self.reason: str | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(evaluating(self._model))
            stack.callback(self._close)
            if self._wanted == "finite_difference":
                self._open(self._finite_difference())
            else:
                self._guarded(self._open_double_backward)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def matvec(self, vector: Tensor, *, weight: Tensor | None = None) -> Tensor:
        """Hv for v of shape (P,), as a new tensor; `weight` is for finite differences, see there."""
        if self.derivative == "double_backward":
            product: Tensor | None = self._guarded(lambda: self._operator.matvec(vector))
            if product is not None:
                return product
        operator = self._operator
        if isinstance(operator, FiniteDifferenceHessian):
            return operator.matvec(vector, weight=weight)
        return operator.matvec(vector)

    def preconditioned(self, diagonal: Tensor) -> Preconditioned:
        """P^-1/2 H P^-1/2 for a positive diagonal P, (P,), with finite differences that are accurate after scaling."""
        return Preconditioned(_Weighted(operator=self, weight=diagonal.rsqrt()), diagonal)

    @property
    def derivative(self) -> Literal["double_backward", "finite_difference"]:
        """What is used; `auto` may still turn to finite differences at a product."""
        return "finite_difference" if isinstance(self._operator, FiniteDifferenceHessian) else "double_backward"

    @property
    def errors(self) -> Sequence[float]:
        """Estimated error |Δ(Hv)| of each finite difference, scaled for preconditioned ones; otherwise none."""
        return self._operator.errors if isinstance(self._operator, FiniteDifferenceHessian) else ()

    @property
    def loss(self) -> float:
        """Value of the loss."""
        return self._operator.loss

    @property
    def gradient(self) -> Tensor:
        """Its gradient, (P,)."""
        return self._operator.gradient

    @property
    def dimension(self) -> int:
        """P, the number of coordinates."""
        return self._operator.dimension

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the flat vectors."""
        return self._operator.dtype

    @property
    def device(self) -> torch.device:
        """Device of the flat vectors."""
        return self._operator.device

    @property
    def hvps(self) -> int:
        """Products computed so far."""
        return self._operator.hvps

    @property
    def _operator(self) -> ProbeOperator:
        if self._inner is None:
            raise RuntimeError("CurvatureOperator: it lives inside its `with` block only")
        return self._inner

    def _guarded(self, attempt: Callable[[], Any]) -> Any:
        """What `attempt` returns; None after `auto` has turned to finite differences instead."""
        try:
            return attempt()
        except (ProbeError, RuntimeError) as error:
            reason = _obstacle(error)
            if self._wanted != "auto" or reason is None:
                raise
        # Outside the handler, so that the error no longer holds the graph.
        self._close()
        self.reason = reason
        self._open(self._finite_difference())
        return None

    def _open_double_backward(self) -> None:
        require_second_derivative(self._model)

        def on(probe: Probe) -> RetainedHessian:
            return RetainedHessian(lambda: probe.loss(self._model), self._parameters)

        pieces = self._probe.micro_batches(self._micro_batch, model=self._model)
        self._open(on(self._probe) if len(pieces) == 1 else MicroBatched(on, pieces))

    def _finite_difference(self) -> FiniteDifferenceHessian:
        return FiniteDifferenceHessian(self._model, self._probe, self._parameters, micro_batch=self._micro_batch)

    def _open(self, operator: ProbeOperator) -> None:
        self._inner = operator.__enter__()

    def _close(self) -> None:
        inner, self._inner = self._inner, None
        if inner is not None:
            inner.__exit__(None, None, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Weighted:
    """The Hessian, for a product that will be scaled by `weight`."""

    operator: CurvatureOperator
    weight: Tensor

    @property
    def dimension(self) -> int:
        return self.operator.dimension

    def matvec(self, vector: Tensor) -> Tensor:
        return self.operator.matvec(vector, weight=self.weight)


def curvature_operator(
    model: nn.Module,
    probe: Probe,
    parameters: Sequence[Tensor],
    *,
    derivative: Derivative = "auto",
    micro_batch: int | None = None,
) -> CurvatureOperator:
    """The Hessian of `model`'s loss on `probe`, to be used in a `with` block, in which the model is in eval mode.

    Args:
        model: the bare model.
        probe: the frozen batch.
        parameters: the P coordinates, all trainable ones or a block of them.
        derivative: `double_backward`, `finite_difference`, or `auto` (see the module).
        micro_batch: sequences differentiated at a time, so that these bound the memory; None for all at once.

    Raises:
        ProbeError: on entering or at a product: what cannot be differentiated, with the reason.
    """
    return CurvatureOperator(model, probe, parameters, derivative=derivative, micro_batch=micro_batch)


def _obstacle(error: Exception) -> str | None:
    """Why there is no second derivative, if `error` says that; None for any other error."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the retained graph does not fit in the device's memory"
    said = str(error).splitlines()[0] if str(error) else ""
    return said if any(phrase in said for phrase in NO_SECOND_DERIVATIVE) else None


def _memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes in use by tensors and bytes that could still be; None where nobody counts."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    return used, free + torch.cuda.memory_reserved(device) - used


def _fits(before: tuple[int, int] | None, after: tuple[int, int] | None, pieces: int) -> bool:
    if before is None or after is None:
        return False
    return (after[0] - before[0]) * pieces <= SHARE_OF_FREE_MEMORY * before[1]
