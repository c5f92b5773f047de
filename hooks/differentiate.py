"""Products of a loss's Hessian with vectors, without the Hessian.

`RetainedHessian` builds the graph of the gradient once and repeats only the second backward pass: 2.4 gradients a
product where rebuilding costs 3.6. The price is memory, about four times the peak of one gradient, held while the
context is open. Facts that shaped it:

* flash and memory-efficient attention have no second derivative, so the graph is built under the math backend of
  `scaled_dot_product_attention`; attention implementations outside torch are refused (`require_second_derivative`);
* an operation marked as differentiable once stands in the graph as a node that would raise, but `autograd.grad` walks
  only what leads to the parameters, and leaves that part of the product out in silence. So the graph is looked through;
* `torch.autograd.grad` is used and never `.backward()`: it fills no `.grad` and fires no hook of DDP;
* an in-place write to a parameter makes the graph stale; torch refuses the next product aloud.

Vectors are flat, (P,), in the order of the parameters given, in float32 or, for float64 parameters, float64; each
piece is cast to its parameter's dtype on the way in. Where there is no second derivative, or no room for its graph, see
`finite_difference`; `curvature_operator` chooses. Left out: sharded parameters (FSDP2, tensor parallel), which are
refused, and averaging products over ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lm_telemetry.errors import ProbeError
from lm_telemetry.hooks.probe import eager

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType


class Operator(Protocol):
    """A symmetric linear map of flat vectors."""

    @property
    def dimension(self) -> int:
        """P, the length of its vectors."""
        ...

    def matvec(self, vector: Tensor) -> Tensor:
        """(P,) -> (P,)."""
        ...


class RetainedHessian:
    """The Hessian H of a scalar loss over some parameters, as a context manager.

    Example:
        with RetainedHessian(lambda: probe.loss(model), parameters) as hessian:
            product = hessian.matvec(vector)

    Args:
        loss: evaluates the loss, with gradients; called once, when the context is entered.
        parameters: the P coordinates, leaf tensors that require gradients.

    Attributes:
        loss: value of the loss.
        gradient: its gradient, (P,).
        hvps: products computed so far.

    Raises:
        ProbeError: on entering: nothing trainable, sharded parameters, a loss that no parameter reaches, a gradient
            that is not finite, or one with an operation in it that is known to have no derivative.
    """

    def __init__(self, loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> None:
        self._evaluate = loss
        self._parameters = [p for p in parameters if p.requires_grad]
        self._graph: list[Tensor] = []
        self._inside = False
        self.loss = float("nan")
        self.gradient = torch.empty(0)
        self.hvps = 0

    @property
    def dimension(self) -> int:
        """P, the number of coordinates."""
        return sum(p.numel() for p in self._parameters)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the flat vectors."""
        return flat_dtype(self._parameters)

    @property
    def device(self) -> torch.device:
        """Device of the flat vectors: that of the first parameter."""
        return self._parameters[0].device

    def __enter__(self) -> Self:
        require_trainable(self._parameters)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), eager():
            loss = self._evaluate()
            if not loss.requires_grad:
                raise ProbeError("the loss does not depend on any trainable parameter (was it computed without grad?)")
            gradients = torch.autograd.grad(
                loss, self._parameters, create_graph=True, allow_unused=True, materialize_grads=True
            )
        self.loss = float(loss.detach())
        self.gradient = flatten([g.detach() for g in gradients], dtype=self.dtype, device=self.device)
        if not bool(torch.isfinite(self.gradient).all()):
            raise ProbeError("the gradient on the probe is not finite: no second derivative of it means anything")
        _require_derivatives(gradients)
        self._graph = list(gradients)
        self._inside = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._graph = []
        self._inside = False

    def matvec(self, vector: Tensor) -> Tensor:
        """Hv for v of shape (P,), as a new tensor."""
        if not self._inside:
            raise RuntimeError("RetainedHessian: the graph lives inside the `with` block only; call matvec there")
        self.hvps += 1
        # A parameter the loss is linear in has a gradient without a graph, and a zero row.
        pairs = [
            (gradient, piece)
            for gradient, piece in zip(self._graph, unflatten(vector, self._parameters), strict=True)
            if gradient.requires_grad
        ]
        if not pairs:
            return torch.zeros_like(vector)
        with eager():
            products = torch.autograd.grad(
                [gradient for gradient, _ in pairs],
                self._parameters,
                grad_outputs=[piece for _, piece in pairs],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        return flatten(products, dtype=self.dtype, device=self.device)


class Preconditioned:
    """P^-1/2 H P^-1/2 for a positive diagonal P: similar to P^-1 H, and symmetric.

    Args:
        operator: H.
        diagonal: P, (P,); an infinite entry takes its coordinate out.

    Raises:
        ProbeError: an entry of the diagonal is not positive.
    """

    def __init__(self, operator: Operator, diagonal: Tensor) -> None:
        if not bool((diagonal > 0).all()):
            raise ProbeError(
                "the preconditioner has entries that are not positive (a second moment of 0 with eps = 0, or NaN)"
            )
        self._operator = operator
        self._scale = diagonal.rsqrt()

    @property
    def dimension(self) -> int:
        """P, the number of coordinates."""
        return self._operator.dimension

    def matvec(self, vector: Tensor) -> Tensor:
        """P^-1/2 H P^-1/2 v for v of shape (P,)."""
        return self._operator.matvec(vector * self._scale) * self._scale


def require_second_derivative(model: nn.Module) -> None:
    """Refuse a model whose attention is known to have no second derivative (ProbeError).

    Such kernels may fail aloud or leave their part out in silence.
    """
    config: Any = getattr(model, "config", None)
    implementation = getattr(config, "_attn_implementation", None) or ""
    if "flash" in implementation or "flex" in implementation:
        raise ProbeError(
            f"attention implementation {implementation!r} has no second derivative: load the model with "
            "attn_implementation='sdpa' or 'eager', or use the derivative 'finite_difference'"
        )


def _require_derivatives(gradients: Sequence[Tensor]) -> None:
    """Refuse gradients (ProbeError) whose graph holds an operation that torch knows to be without derivative."""
    todo = [g.grad_fn for g in gradients if g.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node.name() in ("torch::autograd::Error", "torch::autograd::NotImplemented"):
            raise ProbeError(
                "the loss has no second derivative: its gradient passes through an operation that is differentiable "
                "once only (a fused kernel, or a function marked so); use the derivative 'finite_difference'"
            )
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        todo += new


def require_trainable(parameters: Sequence[Tensor]) -> None:
    """Refuse an empty or a sharded list of parameters (ProbeError)."""
    if not parameters:
        raise ProbeError("no parameter requires gradients: the loss has no curvature in what is trained")
    if any(hasattr(p, "placements") for p in parameters):
        raise ProbeError("the parameters are sharded (DTensor): Hessian-vector products need whole parameters")


def flat_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 if any of them is, else float32: a flat vector of bfloat16 would lose what Lanczos needs."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def flatten(tensors: Sequence[Tensor], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Concatenate tensors of any shapes to one vector (P,)."""
    return torch.cat([t.reshape(-1).to(device=device, dtype=dtype) for t in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor], *, cast: bool = True) -> list[Tensor]:
    """Cut a vector (P,) into tensors like `like`: shapes, dtypes, devices. Without `cast` they are views of it."""
    pieces = torch.split(vector, [t.numel() for t in like])
    shaped = [piece.view(t.shape) for piece, t in zip(pieces, like, strict=True)]
    return [piece.to(device=t.device, dtype=t.dtype) for piece, t in zip(shaped, like, strict=True)] if cast else shaped
