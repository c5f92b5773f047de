"""Leave a model as it was found: the frame around everything that is evaluated beside the training.

A probe must not be seen by the run it looks at. Inside `preserved` a forward or a derivative may draw random numbers,
switch modes, accumulate gradients or update running statistics; afterwards, also after an exception, all of it is as
before, bit by bit:

* random states of `random`, NumPy, torch on the CPU, and of the CUDA devices the model lives on;
* the `training` flag of each module for itself (a frozen sub-module in eval mode stays in eval mode);
* `.grad` of each parameter: the objects are put aside and put back, so nothing inside can reach them;
* buffers, which stay the same objects. Their content is written back always: batch normalisation updates its running
  statistics without raising a version counter, and a comparison would wait for the device;
* whether gradients are recorded.

Left out: parameter values (nothing here writes them; copying them would double the memory), Python attributes of the
model, and generators other than the global ones. Buffers above 1 MiB are not copied; a write to one is refused aloud.
"""

from __future__ import annotations

import random
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from lm_telemetry.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

COPIED_BUFFER_BYTES = 2**20
"""Buffers up to this size are copied; larger ones (packed weights, caches) are only watched."""


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore the state around `model` when the block is left, in whatever way.

    Raises:
        ModelError: a buffer too large to be copied was written to inside.
    """
    with ExitStack() as stack:
        # Undone in reverse order, each even if an earlier one fails.
        _keep_random_state(stack, model)
        stack.callback(torch.set_grad_enabled, torch.is_grad_enabled())
        _keep_modes(stack, model)
        _keep_buffers(stack, model)
        _keep_gradients(stack, model)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`preserved`, with every module in eval mode inside.

    The flags are set one by one: `model.eval()` is a method that models override, to merge adapters for example.
    """
    with preserved(model):
        for module in model.modules():
            module.training = False
        yield


def _keep_random_state(stack: ExitStack, model: nn.Module) -> None:
    stack.callback(random.setstate, random.getstate())
    stack.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002  the global state is what is kept
    stack.callback(torch.set_rng_state, torch.get_rng_state())
    for device in {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}:
        stack.callback(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device)


def _keep_modes(stack: ExitStack, model: nn.Module) -> None:
    flags = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, flag in flags:
            if module.training is not flag:
                module.training = flag

    stack.callback(restore)


def _keep_gradients(stack: ExitStack, model: nn.Module) -> None:
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in kept:
        parameter.grad = None

    def restore() -> None:
        for parameter, gradient in kept:
            parameter.grad = gradient

    stack.callback(restore)


def _keep_buffers(stack: ExitStack, model: nn.Module) -> None:
    # The registry itself is read, since a forward may put another tensor in place of a buffer.
    slots = [(module, dict(module._buffers)) for module in model.modules()]
    copies: list[tuple[Tensor, Tensor]] = []
    watched: list[tuple[str, Tensor, int]] = []
    for name, buffer in model.named_buffers():
        if not _writable(buffer):
            continue
        if buffer.numel() * buffer.element_size() <= COPIED_BUFFER_BYTES:
            copies.append((buffer, buffer.detach().clone()))
        else:
            watched.append((name, buffer, buffer._version))

    def restore() -> None:
        for module, buffers in slots:
            if list(map(id, module._buffers.values())) != list(map(id, buffers.values())):
                module._buffers.clear()
                module._buffers.update(buffers)
        for buffer, copy in copies:
            # Through `.data`, so that the version stays and no graph that saved the buffer becomes stale.
            buffer.data.copy_(copy)
        written = [name for name, buffer, version in watched if buffer._version != version]
        if written:
            raise ModelError(
                f"the forward pass in eval mode wrote to large buffers ({', '.join(written)}), which are not copied; "
                "the training may differ from a run without probes: switch the probing instruments off for this model"
            )

    stack.callback(restore)


def _writable(buffer: Tensor) -> bool:
    """Whether anything can write to it in place: not without storage, in inference mode, or expanded."""
    if buffer.is_meta or buffer.is_inference() or buffer.layout != torch.strided:
        return False
    return all(stride != 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True) if size > 1)
