"""Queries and keys as a kernel's operands: which the attention kernels take, and how a launch passes a tensor."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

MAX_HEAD_DIM = 256
"""Widest head the kernels take: a block of queries and one of keys lie in shared memory."""


def head_obstacle(query: torch.Tensor, key: torch.Tensor) -> str | None:
    """Why the kernels cannot take these heads (B, H, S, D) and the twin must; None if they can."""
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"heads of {query.shape[-1]} channels are wider than the kernel's {MAX_HEAD_DIM}"
    if query.stride(-1) != 1 or key.stride(-1) != 1:
        return "the channels of a head are not adjacent"
    if query.dtype != key.dtype:
        return f"queries are {query.dtype} and keys {key.dtype}"
    return None


def full_precision(device: str) -> torch.autocast | nullcontext[None]:
    """Autocast, in which a training step runs, would multiply in bfloat16; inside this nothing is rounded."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def with_strides(tensor: torch.Tensor | None, shape: tuple[int, ...], absent: torch.Tensor) -> tuple[Any, ...]:
    """What a launch passes for `tensor` seen as `shape`: it and its strides, or `absent` and zeros."""
    if tensor is None:
        return (absent, *(0 for _ in shape))
    tensor = tensor.expand(shape)
    return (tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor, *tensor.stride())
