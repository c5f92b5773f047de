"""The gradient of one micro-batch, as autograd hands it to the parameters: local, before it is added to anything.

At the end of a step `.grad` holds the mean over all micro-batches and, under DDP, over all ranks. The gradient of one
micro-batch, whose scatter tells the noise, was there for a moment only. Hooks on the parameters see it: each is called
once in a backward pass, with the sum over all uses of the parameter (a tied weight counts once), before it is
accumulated into `.grad` and so before DDP reduces it. Only norms are kept, on the device; nothing is waited for.

What a loop does to a micro-batch's loss before `backward` (divide it by the number of micro-batches, multiply it by
the number of ranks, scale it for float16) is in that gradient too. It is read off at the loss itself: the derivative
of what `backward` was called on, with respect to the loss that the model returned, is that factor, whatever made it.

The hooks return None, so that autograd goes on with the tensors it had. They are hung on the model's output while the
tap is armed. Inside `torch.compile` they do nothing, so that compiled code is what it would be without them; such a
model is not seen, and neither is a loss that is computed outside the model.

Left out, and said in `problem`: sharded and sparse gradients, and a gradient that comes in several parts (a weight used
inside and outside of reentrantly checkpointed blocks, `DataParallel`, a second backward pass over the same loss).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lm_telemetry.hooks.inert import Inert

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.utils.hooks import RemovableHandle


class GradientTap:
    """Listens to the backward pass of the first micro-batch of a step, and to the factors of all.

    Attributes:
        problem: what kept the gradient from being seen, in words; None if nothing is known to have.
        half: whether the model computes in float16, so that the loss is to be taken for scaled.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self._model = model
        self._parameters = parameters
        self._handles: list[RemovableHandle] = []
        self._bare: list[nn.Parameter] = []  # hooked now, and without any hook before
        self._gradient_handles: list[RemovableHandle] = []
        self._batch = -1
        self._norms: dict[int, Tensor] = {}
        self._factors: dict[int, Tensor] = {}
        self.problem: str | None = None
        self.half = False

    def arm(self) -> None:
        """A step to be listened to begins."""
        self.disarm()
        self._batch = -1
        self._norms, self._factors = {}, {}
        self.problem, self.half = None, False
        self._handles = [self._model.register_forward_hook(_AtOutput(self))]
        # Autocast may be entered inside the model's own forward, as accelerate has it, where only a part sees it.
        part = next((m for m in self._model.modules() if next(m.parameters(recurse=False), None) is not None), None)
        if part is not None:
            self._handles.append(part.register_forward_pre_hook(_AtPart(self)))

    def next_batch(self) -> None:
        """A micro-batch goes into the model; the backward pass of the one before is over."""
        self._batch += 1
        if self._batch == 1:
            self._release_gradients()

    def disarm(self) -> None:
        """Take all hooks off; what was seen stays until the tap is armed again."""
        self._release_gradients()
        while self._handles:
            self._handles.pop().remove()

    @property
    def complete(self) -> bool:
        """Whether the first micro-batch's gradient was seen, and the factors of all."""
        return self.problem is None and bool(self._norms) and len(self._factors) == self._batch + 1

    def norm(self) -> Tensor:
        """L2 norm of the first micro-batch's gradient as it came, a float64 scalar on the first parameter's device."""
        norms = list(self._norms.values())
        device = self._parameters[0].device
        return torch.stack([norm.to(device, torch.float64) for norm in norms]).square().sum().sqrt()

    def factors(self) -> Tensor:
        """What the loop multiplied each micro-batch's loss by, float64 (n,), on the first parameter's device."""
        device = self._parameters[0].device
        return torch.stack([self._factors[i].to(device, torch.float64) for i in range(self._batch + 1)])

    # -- what the hooks see ------------------------------------------------------------------------------------------

    def saw_part(self, module: nn.Module) -> None:
        """A part of the model computes."""
        device = next(module.parameters(recurse=False)).device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            self.half = True

    def saw_output(self, output: Any) -> None:
        """The model returned."""
        loss = _loss_of(output)
        if self._batch < 0 or loss is None or not loss.requires_grad:
            return
        if self._batch in self._factors:  # its backward pass is over: this one is a probe of somebody's, not the step's
            self._release_gradients()
            return
        loss.register_hook(_AtLoss(self, self._batch))  # type: ignore[no-untyped-call]
        if self._batch == 0 and not self._gradient_handles:
            for index, parameter in enumerate(self._parameters):
                if parameter.requires_grad:
                    if parameter._backward_hooks is None:
                        self._bare.append(parameter)
                    self._gradient_handles.append(parameter.register_hook(_AtParameter(self, index)))  # type: ignore[no-untyped-call]

    def saw_factor(self, batch: int, factor: Tensor) -> None:
        """The backward pass of a micro-batch begins."""
        if batch in self._factors or factor.numel() != 1:
            self.problem = "the model was called several times for one micro-batch, or its loss differentiated twice"
            return
        self._factors[batch] = factor.detach().reshape(()).clone()

    def saw_gradient(self, index: int, gradient: Tensor) -> None:
        """A parameter's gradient has been computed."""
        if index in self._norms:
            self.problem = "the gradient of a parameter came in several parts (reentrant checkpointing?)"
        elif hasattr(gradient, "placements") or gradient.layout != torch.strided:
            self.problem = "gradients are sharded (DTensor) or sparse"
        else:
            self._norms[index] = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32)

    def _release_gradients(self) -> None:
        while self._gradient_handles:
            self._gradient_handles.pop().remove()
        for parameter in self._bare:
            if not parameter._backward_hooks:  # nobody else has hung anything there meanwhile
                parameter._backward_hooks = None
        self._bare = []


class _Hook(Inert):
    __slots__ = ("tap",)

    def __init__(self, tap: GradientTap) -> None:
        self.tap = tap


class _AtOutput(_Hook):
    __slots__ = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.tap.saw_output(output)


class _AtPart(_Hook):
    __slots__ = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self.tap.saw_part(module)


class _AtLoss(_Hook):
    __slots__ = ("batch",)

    def __init__(self, tap: GradientTap, batch: int) -> None:
        super().__init__(tap)
        self.batch = batch

    def __call__(self, gradient: Tensor) -> None:
        self.tap.saw_factor(self.batch, gradient)


class _AtParameter(_Hook):
    __slots__ = ("index",)

    def __init__(self, tap: GradientTap, index: int) -> None:
        super().__init__(tap)
        self.index = index

    def __call__(self, gradient: Tensor) -> None:
        # An error here would end the training's backward pass.
        try:
            self.tap.saw_gradient(self.index, gradient)
        except RuntimeError as error:
            self.tap.problem = f"the norm of a gradient could not be taken: {error}"


def _loss_of(output: Any) -> Tensor | None:
    if isinstance(output, tuple):
        output = output[0] if output else None
    if not isinstance(output, Tensor):
        output = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return output if isinstance(output, Tensor) and output.numel() == 1 else None
