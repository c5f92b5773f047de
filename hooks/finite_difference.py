"""Products of a loss's Hessian with vectors from differences of gradients, where no second derivative can be had.

Hv = (g(θ + εv) - g(θ - εv)) / 2ε for a unit vector v: two gradients a product, and nothing is asked of the model but
gradients. So it works under flash attention, with reentrant checkpointing, and without the memory of a retained graph.

**The step ε.** The error of a product, relative to h = |Hv|, has two parts; h and K change with v, σ does not:

    truncation   ε²|D³g[v,v,v]| / 6h ~ c q²   a term of the Taylor series is left out
    rounding     σ / (√2 ε h)                 σ, the norm of one gradient's rounding error, enters twice

Their sum is least where rounding is twice truncation. Both show in the second difference g(θ+εv) + g(θ-εv) - 2g(θ),
whose norm is √6 σ where it is rounding, and ε²K, K = |D²g[v,v]|, where it is not. So σ is at most 1/√6 of the smallest
one seen; q is the rest of it relative to |g(θ+εv) - g(θ-εv)|; and c, 0.5 to 5 on most models and 20 near interpolation,
is measured whenever one product is evaluated at two steps. Each product moves the next one's ε, in units of 1/√h, to
where its own parts balance. A product is evaluated again, twice at most, if its error comes out above `ACCEPTED` and a
better step is known. The first ε is a short one: h is taken for 30 |g|²/L and σ from the dtype the model computes in.

**Accuracy**, relative to |Hv|. float32: 0.01 % to 0.7 %, with one evaluation for nearly every product. bfloat16
autocast: 1.4 % to 2.1 % near the top of a Llama of 1.3 M parameters; on smaller ones, whose gradients average fewer
tokens, 2 % to 9 %, with two to three evaluations for a product of a solve, and 0.5 % to 3 % in the top eigenvalue.
(The second derivative has 0.4 % to 0.7 %.) Where there is little curvature, rounding is all there is to see. `errors`
tells, within a factor 3. Parameters that are bfloat16 or float16 themselves cannot be moved by so small a step, and
are refused.

**Memory** beside one gradient's own peak: a copy of the parameters, and the product being summed. The parameters are
written in place and come back from the copy, bit by bit, whatever happens; through `.data`, so that no graph kept
elsewhere becomes stale. Gradients are taken with `autograd.grad`; where reentrant checkpointing forbids it, with
`.backward()`, whose `.grad` is moved away as soon as it is there. Gradient checkpointing stays on.

Left out: other threads that read the parameters meanwhile, and losses that are not smooth. The router of a mixture of
experts jumps where two experts tie: a token that changes its expert between θ - εv and θ + εv adds a term of order
1/ε. `double_backward` sees one side only and is to be preferred there.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from lm_telemetry.errors import ProbeError
from lm_telemetry.hooks.differentiate import flat_dtype, require_trainable, unflatten
from lm_telemetry.hooks.probe import checkpointing, eager

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from lm_telemetry.hooks.probe import Probe

GRADIENT_NOISE: dict[torch.dtype, float] = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 3e-3}
"""Rounding error of a gradient relative to its norm, by the dtype it is computed in: a first guess, within 5 times."""

COARSEST_NOISE = 0.03
"""The same in bfloat16: measured 0.6 % to 13 %."""

ACCEPTED = 0.005
"""Relative error at which a product is taken as it is."""

MAX_EVALUATIONS = 3
"""Pairs of gradients a product may cost."""

TRUNCATION, MAX_TRUNCATION = 3.0, 30.0
"""Relative truncation error over the square of the relative second difference: at first, and at most."""

LARGEST_BEND = 0.5
"""Relative second difference beyond which a Taylor series says nothing."""

FIRST_TRUNCATION = 10.0
"""Relative truncation error over ε²h, before anything was measured; 0.06 to 38 on the models measured."""

FIRST_SIZE = 30.0
"""|Hv| of the first product in units of |g|²/L: 1 to 3 for a random direction, 100 for the top one."""

SAMPLE = 1 << 14
"""Coordinates from which the second difference is estimated."""


class FiniteDifferenceHessian:
    """The Hessian H of a model's loss on the probe over some parameters, as a context manager.

    To be used inside `preserve.evaluating(model)`. Gradient checkpointing that is switched on stays on.

    Args:
        model: the bare model.
        probe: the frozen batch.
        parameters: the P coordinates, float32 or float64.
        micro_batch: sequences differentiated at a time; None for the whole probe.

    Attributes:
        loss: value of the loss at θ.
        hvps: products computed so far.
        errors: the error |Δ(Hv)| of each product, an estimate and no bound; of S·Hv where a weight S was given.

    Raises:
        ProbeError: on entering: as `RetainedHessian`, and for parameters of less than 32 bits.
    """

    def __init__(
        self, model: nn.Module, probe: Probe, parameters: Sequence[Tensor], *, micro_batch: int | None = None
    ) -> None:
        self._model, self._probe, self._micro_batch = model, probe, micro_batch
        self._parameters = [p for p in parameters if p.requires_grad]
        self._stack = ExitStack()
        self._copies: list[Tensor] = []
        self._through_grad_field = False
        self.loss = float("nan")
        self._gradient: Tensor | None = None
        self.hvps = 0
        self.errors: list[float] = []

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

    @property
    def gradient(self) -> Tensor:
        """The gradient at θ, (P,). Not kept for the products: computed when first asked for, and held from then on."""
        if not self._copies:
            raise RuntimeError("FiniteDifferenceHessian: ask for the gradient inside the `with` block only")
        if self._gradient is None:
            self._gradient = self._zeros()
            self._add_gradient(self._gradient, 1.0)
        return self._gradient

    def __enter__(self) -> Self:
        require_trainable(self._parameters)
        coarse = sorted({str(p.dtype) for p in self._parameters if p.dtype not in (torch.float32, torch.float64)})
        if coarse:
            raise ProbeError(
                f"parameters of {', '.join(coarse)} cannot be moved by the small step of a finite difference: expected "
                "float32 or float64 (with autocast, if need be), or the derivative 'double_backward'"
            )
        self._parts = self._probe.micro_batches(self._micro_batch, model=self._model)
        with ExitStack() as stack:
            stack.enter_context(checkpointing(self._model))
            gradient = self._zeros()
            self.loss = self._add_gradient(gradient, 1.0)
            norm = float(gradient.norm())
            if not math.isfinite(norm):
                raise ProbeError("the gradient on the probe is not finite: no second derivative of it means anything")
            with torch.no_grad():
                precision = self._parts[0][1].precision(self._model)
            self._copies = [p.detach().clone() for p in self._parameters]
            stack.callback(self._copies.clear)
            noise = GRADIENT_NOISE.get(precision, COARSEST_NOISE)
            self._steps = [_Steps(loss=self.loss, gradient=norm, noise=noise) for _ in ("plain", "weighted")]
            self._sample = _sample(self.dimension, self.device)
            self._here = gradient[self._sample].clone()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def matvec(self, vector: Tensor, *, weight: Tensor | None = None) -> Tensor:
        """Hv for v of shape (P,), of any length, as a new tensor.

        With `weight` S, (P,), the step is chosen for an accurate S·Hv, entry by entry, instead of Hv.
        """
        if not self._copies:
            raise RuntimeError("FiniteDifferenceHessian: call matvec inside the `with` block only")
        self.hvps += 1
        length = float(vector.norm())
        if length == 0.0 or not math.isfinite(length):
            self.errors.append(length)
            return torch.zeros_like(vector) * length
        steps = self._steps[weight is not None]
        while True:
            step = steps.next
            product, slope, bend = self._difference(vector, step / length, weight)
            if not steps.learn(step, size=float(product.norm()) / (2 * step), slope=slope.div_(2 * step), bend=bend):
                break
        product.mul_(length / (2 * step))
        seen = product if weight is None else product * weight
        self.errors.append(steps.error * float(seen.norm()))
        return product

    def _difference(self, vector: Tensor, step: float, weight: Tensor | None) -> tuple[Tensor, Tensor, float]:
        """g(θ+εv) - g(θ-εv); a sample of its coordinates; and |g(θ+εv) + g(θ-εv) - 2g(θ)| relative to it, there."""
        total = self._zeros()
        pieces = unflatten(vector, self._parameters)
        try:
            self._move(pieces, step)
            self._add_gradient(total, 1.0)
            ahead = total[self._sample].clone()
            self._move(pieces, -step)
            self._add_gradient(total, -1.0)
        finally:
            self._move(pieces, 0.0)
        difference = total[self._sample].clone()
        bend = ahead.sub_(self._here).mul_(2).sub_(difference)
        if weight is not None:
            bend.mul_(weight[self._sample])
            difference.mul_(weight[self._sample])
        size = float(difference.norm())
        return total, difference, float(bend.norm()) / size if size > 0 else 0.0

    def _zeros(self) -> Tensor:
        return torch.zeros(self.dimension, dtype=self.dtype, device=self.device)

    def _move(self, pieces: Sequence[Tensor], step: float) -> None:
        for parameter, copy, piece in zip(self._parameters, self._copies, pieces, strict=True):
            parameter.data.copy_(copy)
            if step:
                parameter.data.add_(piece, alpha=step)

    def _add_gradient(self, total: Tensor, weight: float) -> float:
        """Add weight·g at the present parameters to `total`; the loss."""
        value = 0.0
        pieces = unflatten(total, self._parameters, cast=False)
        for share, part in self._parts:
            with torch.enable_grad(), eager():
                loss = part.loss(self._model)
                if not loss.requires_grad:
                    raise ProbeError(
                        "the loss does not depend on any trainable parameter (was it computed without grad?)"
                    )
                if not self._through_grad_field:
                    try:
                        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
                    except RuntimeError as error:
                        if "checkpoint" not in str(error):
                            raise
                        self._through_grad_field = True
                        loss = part.loss(self._model)
                if self._through_grad_field:
                    self._backward(loss, pieces, weight * share)
                else:
                    for piece, gradient in zip(pieces, gradients, strict=True):
                        if gradient is not None:
                            piece.add_(gradient.to(piece), alpha=weight * share)
                    del gradients
            value += share * float(loss.detach())
        return value

    def _backward(self, loss: Tensor, pieces: Sequence[Tensor], weight: float) -> None:
        """The same by `.backward()`: each `.grad` is moved to its piece, or dropped, as soon as it is complete."""
        trainable = [p for p in self._model.parameters() if p.requires_grad]
        if any(p._post_accumulate_grad_hooks for p in trainable):
            raise ProbeError(
                "reentrant checkpointing needs `.backward()`, which would fire the hooks on the parameters' gradients "
                "(an optimizer in the backward pass?): use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if any(p.grad is not None for p in trainable):
            raise RuntimeError("FiniteDifferenceHessian: expected no `.grad`; use it inside `evaluating(model)`")
        piece_of = {id(p): piece for p, piece in zip(self._parameters, pieces, strict=True)}

        def take(parameter: Tensor) -> None:
            piece = piece_of.get(id(parameter))
            if piece is not None and parameter.grad is not None:
                piece.add_(parameter.grad.to(piece), alpha=weight)
            parameter.grad = None

        with ExitStack() as stack:
            for parameter in trainable:
                stack.callback(parameter.register_post_accumulate_grad_hook(take).remove)  # type: ignore[no-untyped-call]
            loss.backward()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Evaluation:
    """One central difference of a product."""

    step: float
    slope: Tensor  # a sample of Hv
    rounding: float  # error relative to |Hv|
    bend: float  # the part of the relative second difference that is no rounding


class _Steps:
    """Chooses the step ε, and estimates the error, from what the products so far have shown (see the module)."""

    def __init__(self, *, loss: float, gradient: float, noise: float) -> None:
        self.error = math.nan  # of the last product, relative to |Hv|
        self._noise = math.inf  # of one gradient: σ
        self._truncation = TRUNCATION
        self._curve = 2.0  # relative truncation error over ε²h
        size = FIRST_SIZE * gradient**2 / abs(loss) if loss else gradient
        self._size = size or 1.0  # h of the last product
        self._ratio = _balanced(noise * gradient, self._size, FIRST_TRUNCATION) or 1e-3  # ε in units of 1/√h
        self._tried: list[_Evaluation] = []  # of the product at hand

    @property
    def next(self) -> float:
        """ε for a unit vector."""
        return self._ratio / math.sqrt(self._size)

    def learn(self, step: float, *, size: float, slope: Tensor, bend: float) -> bool:
        """Take in |Hv| = `size`, a sample of Hv, and the relative second difference; whether to evaluate it again."""
        first = math.isinf(self._noise)
        self._noise = min(self._noise, bend * 2 * step * size / math.sqrt(6))
        if size == 0.0 or not math.isfinite(size):
            self.error = 0.0 if size == 0.0 else math.inf
            self._tried = []
            return False
        noise = self._noise / (math.sqrt(2) * step)
        measured, size = size, max(math.sqrt(max(size**2 - noise**2, 0.0)), size / 10)  # noise adds in squares
        # Of the second difference, noise may be twice the least seen (in squares).
        curved = max((bend * measured / size) ** 2 - 6 * (noise / size) ** 2, 0.0)
        now = _Evaluation(step=step, slope=slope, rounding=noise / size, bend=math.sqrt(curved))
        for other in self._tried:
            self._truncation = max(self._truncation, _seen_truncation(now, other))
        self._tried.append(now)
        truncation = min(self._truncation, MAX_TRUNCATION) * curved
        self.error = now.rounding + truncation
        ratio = step * math.sqrt(size)
        if truncation > 0:
            self._curve = truncation / ratio**2
            factor = max((now.rounding / (2 * truncation)) ** (1 / 3), 1 / 16)
        else:
            self._curve = max(self._curve / 2, 0.01)  # unseen here; what was seen in other directions fades
            factor = min(max(_balanced(self._noise, size, self._curve) / ratio, 1.0), 16.0)
            if first and factor < 2:
                factor = 1 / 4  # what passes for rounding may be truncation: a smaller step tells
        best = 0.0 if first else now.rounding / factor + truncation * factor**2
        again = self.error > ACCEPTED and best < self.error / 2 and len(self._tried) < MAX_EVALUATIONS
        if again or not first:
            self._ratio = ratio * factor
        self._size = size
        if not again:
            self._tried = []
        return again


def _balanced(noise: float, size: float, truncation: float) -> float:
    """ε √h where rounding is twice a truncation error of `truncation` ε²h."""
    return float((noise / (math.sqrt(8) * truncation * math.sqrt(size))) ** (1 / 3))


def _seen_truncation(a: _Evaluation, b: _Evaluation) -> float:
    """Relative truncation error over `bend`² that two evaluations of one product show; 0 where they cannot tell."""
    long, short = (a, b) if a.step > b.step else (b, a)
    if not 0 < long.bend < LARGEST_BEND:
        return 0.0
    change = float((long.slope - short.slope).norm() / short.slope.norm())
    beyond = change**2 - 2 * (long.rounding**2 + short.rounding**2)
    return math.sqrt(max(beyond, 0.0)) / ((1 - (short.step / long.step) ** 2) * long.bend**2)


def _sample(dimension: int, device: torch.device) -> Tensor | slice:
    if dimension <= SAMPLE:
        return slice(None)
    generator = torch.Generator(device=device).manual_seed(0)
    return torch.randint(dimension, (SAMPLE,), generator=generator, device=device)
