"""Products of the generalised Gauss-Newton matrix of a language model's loss with vectors.

    G = J' H J,   J = d logits / d parameters (N V, P),   H = d² loss / d logits² (N V, N V), block diagonal over tokens

(Schraudolph 2002; arXiv 1412.1193). For cross-entropy H is positive semidefinite, so G is, and it is the Fisher matrix;
it differs from the Hessian by the curvature of the logits themselves, weighted with the errors p - y.

A product is three steps: u = Jv, then H u in its place (`cross_entropy_hvp`), then J'(Hu). How, and why so:

* J' of a logits-sized tensor is a backward pass. It is linear in that tensor, so J is its transpose: the backward pass
  is itself recorded once, for a tensor of zeros, and differentiated by that tensor. A product then costs 1.4 gradients,
  where forward-mode differentiation of the model costs 2 to 3 and stops at custom functions (Bloom's GELU);
* most of what that record saves is zero like the tensor that went in, and is not needed, since a linear map has the
  same transpose everywhere. Zeros are saved as one number: on a Llama the record then adds a third to the memory of the
  graph, where it would add one and a half (the retained Hessian: 1.6);
* the output layer's two contributions to Jv, x dW' + dx W', are added up in one buffer (`_Linear`), not in two.

Held while the context is open: the graph of the logits under the math backend of `scaled_dot_product_attention`, and
the logits, once. During a product: one more tensor of the logits' size and dtype, the tangent. Anything between the
output layer and the logits (softcapping, the conversion that accelerate makes under autocast) takes another one for the
duration of its own step. Entering costs what a training step's forward and backward pass hold, a softmax included.

Which tokens count, and whether labels are shifted by one, differs between models. Every convention is tried until one
gives the model's own loss and its gradient; if none does, the loss is not a plain mean of cross-entropies (label
smoothing, class weights, a router's auxiliary loss), and is refused. Left out, as in `differentiate`: sharded
parameters, and averaging over ranks. Vectors are flat, as there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.nn import functional as F  # noqa: N812  -- its usual name
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lm_telemetry.errors import ProbeError
from lm_telemetry.hooks.differentiate import (
    _require_derivatives,
    flat_dtype,
    flatten,
    require_second_derivative,
    require_trainable,
    unflatten,
)
from lm_telemetry.hooks.probe import IGNORED_LABEL, eager
from lm_telemetry.kernels.cross_entropy_hvp import cross_entropy_hvp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from lm_telemetry.hooks.probe import Probe

LOSS_TOLERANCE = 1e-4
"""Relative difference of the loss from the mean of cross-entropies; coarser where the model's own is bfloat16."""

LOSS_FLOOR = 1e-6
"""Absolute difference that rounding of the logits leaves when the loss itself goes to zero."""

GRADIENT_TOLERANCE = 0.05
"""Relative difference of its gradient. bfloat16 makes up to 1 %; a loss of other logits than the output's, 100 %."""

_BLOCK = 2**22
"""Logits of which a softmax is formed at a time while labels are looked for."""


class GaussNewton:
    """The generalised Gauss-Newton matrix G of a model's loss on the probe, as a context manager.

    To be entered inside `preserve.evaluating(model)`, like the probe's loss.

    Example:
        with evaluating(model), GaussNewton(model, probe, parameters) as gauss_newton:
            product = gauss_newton.matvec(vector)

    Args:
        model: the bare model; its output has `logits` (..., V) and `loss`, the mean cross-entropy over labels.
        probe: the frozen batch, with `labels` (...).
        parameters: the P coordinates, leaf tensors that require gradients.

    Attributes:
        loss: value of the loss.
        gradient: its gradient, (P,).
        hvps: products computed so far.

    Raises:
        ProbeError: on entering: nothing trainable, sharded parameters, attention without a second derivative, no
            labels or logits, a loss that is not the cross-entropy of the logits, or a gradient that is not finite.
    """

    def __init__(self, model: nn.Module, probe: Probe, parameters: Sequence[Tensor]) -> None:
        self._model = model
        self._probe = probe
        self._parameters = [p for p in parameters if p.requires_grad]
        self._logits: Tensor | None = None
        self._labels = torch.empty(0)
        self._scale = float("nan")
        self._zeros = torch.empty(0)
        self._pulled: list[GradientEdge | None] = []
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
        require_second_derivative(self._model)
        require_trainable(self._parameters)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), eager():
            loss, logits, remark = self._evaluate()
            gradient = self._pull(loss)
            self.loss, self.gradient = float(loss.detach()), gradient
            tolerance = max(LOSS_TOLERANCE, torch.finfo(loss.dtype).eps)
            del loss  # and with it the softmax
            if not bool(torch.isfinite(gradient).all()):
                raise ProbeError("the gradient on the probe is not finite: no curvature there means anything")
            self._labels = self._find_labels(logits, tolerance, remark)
            self._scale = 1 / _count(self._labels)
            # A leaf that looks like the logits and takes no memory.
            self._zeros = logits.new_zeros(()).expand(logits.shape).requires_grad_()
            with saved_tensors_hooks(_pack, lambda packed: packed):
                pulled: Sequence[Tensor | None] = torch.autograd.grad(
                    logits, self._parameters, self._zeros, create_graph=True, allow_unused=True
                )
        if any(p is not None and not p.requires_grad for p in pulled):
            raise ProbeError("a part of the model hides its backward pass from autograd: J cannot be had from J'")
        _require_derivatives([p for p in pulled if p is not None])
        # Edges of the graph only: the tensors there are as large as the parameters, and zero.
        self._pulled = [None if p is None else get_gradient_edge(p) for p in pulled]
        self._logits = logits
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._logits = None
        self._zeros = torch.empty(0)
        self._pulled = []

    def matvec(self, vector: Tensor) -> Tensor:
        """Gv for v of shape (P,), as a new tensor."""
        logits = self._logits
        if logits is None:
            raise RuntimeError("GaussNewton: the graph lives inside the `with` block only; call matvec there")
        self.hvps += 1
        with eager():
            tangent = self._push(vector)
            z, u = (t.detach().reshape(-1, logits.shape[-1]) for t in (logits, tangent))
            cross_entropy_hvp(z, u, self._labels, scale=self._scale, ignore_index=IGNORED_LABEL)
            return self._pull(logits, tangent)

    def _push(self, vector: Tensor) -> Tensor:
        """Jv for v of shape (P,), in the logits' shape; contiguous, and nobody else's."""
        pairs = [
            (edge, piece)
            for edge, piece in zip(self._pulled, unflatten(vector, self._parameters), strict=True)
            if edge is not None  # a parameter that does not reach the logits
        ]
        if not pairs:
            return self._zeros.detach().clone(memory_format=torch.contiguous_format)
        (tangent,) = torch.autograd.grad(
            [edge for edge, _ in pairs], self._zeros, [piece for _, piece in pairs], retain_graph=True
        )
        if tangent.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr():
            return tangent.clone(memory_format=torch.contiguous_format)  # a parameter that is a logit
        return tangent.contiguous()

    def _pull(self, output: Tensor, tangent: Tensor | None = None) -> Tensor:
        """J'u, (P,), for u like the output; its gradient if that is a scalar."""
        products = torch.autograd.grad(
            output, self._parameters, tangent, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return flatten(products, dtype=self.dtype, device=self.device)

    def _evaluate(self) -> tuple[Tensor, Tensor, str]:
        """Loss, logits, and what a refusal of the loss should mention."""
        seen: list[Any] = []
        handle = self._model.register_forward_hook(lambda *call: seen.append(call[-1]))
        try:
            with _OneBuffer(self._model):
                loss = self._probe.loss(self._model)
        finally:
            handle.remove()
        if not loss.requires_grad:
            raise ProbeError("the loss does not depend on any trainable parameter (was it computed without grad?)")
        logits = getattr(seen[-1], "logits", None)
        if not isinstance(logits, Tensor) or not logits.requires_grad:
            raise ProbeError(
                f"{type(self._model).__name__} returned no logits beside its loss, or logits that no trainable "
                "parameter reaches: the Gauss-Newton matrix needs them (a fused loss, as Liger's, does not form any)"
            )
        auxiliary = getattr(seen[-1], "aux_loss", None) is not None
        return loss, logits, "; it has a router's `aux_loss`: add output_router_logits=False to the probe" * auxiliary

    def _find_labels(self, logits: Tensor, tolerance: float, remark: str) -> Tensor:
        """The labels (N,), under the convention that gives the model's own loss and gradient."""
        flat = logits.detach().reshape(-1, logits.shape[-1])
        conventions = list(_conventions(self._probe.batch, logits))
        if not conventions:
            raise ProbeError(
                f"the probe has no labels of shape {tuple(logits.shape[:-1])}, one for each of the logits of "
                f"{type(self._model).__name__}: the Gauss-Newton matrix needs to know which tokens count"
            )
        means = [_cross_entropy(flat, labels) for _, labels in conventions]
        told = ", ".join(f"{mean:.6g} with labels {name}" for (name, _), mean in zip(conventions, means, strict=True))
        refusal = (
            f"expected a loss that is the mean cross-entropy of logits and labels ({told}); "
            f"{type(self._model).__name__} gives {self.loss:.6g}"
        )
        best, found = float("inf"), None
        for (_, labels), mean in zip(conventions, means, strict=True):
            if abs(mean - self.loss) <= tolerance * abs(self.loss) + LOSS_FLOOR:
                difference = self._difference(logits, _errors(flat, labels).view(logits.shape))
                if difference < best:
                    best, found = difference, labels
        if found is None:
            raise ProbeError(refusal + remark)
        if best > GRADIENT_TOLERANCE:
            raise ProbeError(f"{refusal}, with a gradient that differs by {best:.2g} of its norm{remark}")
        return found

    def _difference(self, logits: Tensor, errors: Tensor) -> float:
        """Of J'(p - y)/n from the loss's gradient, relative to it."""
        missing, size = (self._pull(logits, errors) - self.gradient).norm(), self.gradient.norm()
        if missing > GRADIENT_TOLERANCE * size:
            # Near a minimum the tokens cancel and rounding is left; under random signs they do not.
            signs = torch.randint(2, errors.shape[:-1], generator=torch.Generator().manual_seed(0)) * 2 - 1
            size = torch.maximum(size, self._pull(logits, errors.mul_(signs[..., None].to(errors.device))).norm())
        return float(missing / size) if missing else 0.0


def _conventions(batch: Mapping[str, Any], logits: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Ways in which models read labels: the name, and (N,) labels of the logits (N, V)."""
    for name in ("labels", "shift_labels"):
        labels = batch.get(name)
        if isinstance(labels, Tensor) and labels.shape == logits.shape[:-1]:
            labels = labels.to(logits.device)
            if name == "labels" and labels.ndim > 1:  # position s predicts token s + 1
                yield "shifted", F.pad(labels[..., 1:], (0, 1), value=IGNORED_LABEL).reshape(-1)
            yield "as given", labels.reshape(-1)


def _count(labels: Tensor) -> int:
    return int((labels != IGNORED_LABEL).sum())


def _cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """The mean over labels, without a softmax of all rows."""
    rows = max(1, _BLOCK // logits.shape[1])
    parts = [
        F.cross_entropy(z.to(flat_dtype([z])), y, ignore_index=IGNORED_LABEL, reduction="sum").double()
        for z, y in zip(torch.split(logits, rows), torch.split(labels, rows), strict=True)
    ]
    return float(torch.stack(parts).sum()) / max(1, _count(labels))


def _errors(logits: Tensor, labels: Tensor) -> Tensor:
    """(p - y) / (number of labels), the gradient of the mean cross-entropy in logits (N, V); 0 without a label."""
    errors = torch.empty_like(logits)
    rows = max(1, _BLOCK // logits.shape[1])
    count = _count(labels)
    for start in range(0, len(logits), rows):
        here = slice(start, start + rows)
        y = labels[here]
        used = y != IGNORED_LABEL
        p = torch.softmax(logits[here], -1, dtype=flat_dtype([logits]))
        p[used, y[used]] -= 1
        errors[here] = p.mul_((used / count)[:, None])
    return errors


def _pack(saved: Tensor) -> Tensor:
    """One number for a tensor of zeros. Detached: a graph that holds its own output is never freed."""
    saved = saved.detach()
    if saved.numel() and saved.is_floating_point() and not saved.count_nonzero():
        return saved.new_zeros(()).expand(saved.shape)
    return saved


class _OneBuffer(TorchFunctionMode):
    """Runs the output layer of a model as `_Linear` inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        find = getattr(model, "get_output_embeddings", None)
        self._weight = getattr(find() if callable(find) else None, "weight", None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.linear or len(args) < 2 or args[1] is not self._weight or kwargs:
            return func(*args, **(kwargs or {}))
        device = args[0].device.type
        if torch.is_autocast_enabled(device) and args[0].dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            args = tuple(None if a is None else a.to(dtype) for a in args)
        x, weight, bias = (*args, None)[:3]
        return _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]


class _Linear(torch.autograd.Function):
    """y = x W' + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return _LinearTranspose.apply(u, x.detach(), weight.detach(), ctx.needs_input_grad)  # type: ignore[no-untyped-call]


class _LinearTranspose(torch.autograd.Function):
    """(u W, u'x, sum u) of u like y: the gradient of `_Linear`, to be differentiated by u only, where it is linear."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, ...]) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        rows = u.flatten(0, -2)
        return (
            u @ weight if needed[0] else None,
            rows.T @ x.flatten(0, -2) if needed[1] else None,
            rows.sum(0) if needed[2] else None,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None) -> Any:
        x, weight = ctx.saved_tensors
        total: Tensor | None = None
        if dweight is not None:
            total = x.flatten(0, -2) @ dweight.T
        if dx is not None:
            rows = dx.flatten(0, -2)
            total = rows @ weight.T if total is None else total.addmm_(rows, weight.T)
        if dbias is not None:
            total = dbias.repeat(len(x.flatten(0, -2)), 1) if total is None else total.add_(dbias)
        return None if total is None else total.view(*x.shape[:-1], len(weight)), None, None, None
