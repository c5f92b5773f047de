"""Chooses, for given tensors, between a Triton kernel and its torch twin, and can say why.

Decisions:

- The kernel is taken where it can run and is known to be right: an accelerator that Triton compiles for, a dtype it
  loads, a shape its author allows. Everything else takes the twin, which is correct everywhere and quick on CPUs.
- Triton is imported only when a tensor on an accelerator asks for it, so a machine without Triton never notices.
- Triton's interpreter is a testing tool, thousands of times slower than the twin. It is never chosen; a test that
  wants it says `force("triton")` in a process started with TRITON_INTERPRET=1.

Left out: choosing by measured speed. The two paths serve different machines.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

Path = Literal["triton", "torch"]

LOADABLE = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes the kernels read. Others (float64, float8) go to the twin, which converts."""

MIN_CAPABILITY = (8, 0)
"""Oldest CUDA compute capability the kernels are compiled for in the tests."""

_forced: ContextVar[Path | None] = ContextVar("lm_telemetry_forced_path", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which path was chosen, and why.

    Attributes:
        path: `triton` for the kernel, `torch` for the twin.
        reason: one clause that finishes "because ...".
    """

    path: Path
    reason: str


def choose(*tensors: torch.Tensor, refusal: str | None = None) -> Choice:
    """The path for `tensors`, which share one device.

    Args:
        tensors: what the kernel would read, at least one.
        refusal: why the kernel itself cannot take this input (a head too wide, say); None if it can.

    Raises:
        RuntimeError: `force("triton")` is in effect, and the kernel cannot run here.
    """
    forced = _forced.get()
    if forced == "torch":
        return Choice(path="torch", reason="the twin was forced")
    device = tensors[0].device.type
    interpreted = forced == "triton" and device == "cpu" and interpreting()
    obstacle = refusal or _dtype_obstacle(tensors) or (None if interpreted else _device_obstacle(tensors[0].device))
    if forced == "triton":
        if obstacle is not None:
            raise RuntimeError(
                f"expected inputs a Triton kernel can run on, since it was forced; but {obstacle}: move the tensors to "
                "a GPU, or start the process with TRITON_INTERPRET=1, or drop force('triton')"
            )
        return Choice(path="triton", reason="the kernel was forced")
    if obstacle is not None:
        return Choice(path="torch", reason=obstacle)
    return Choice(path="triton", reason=f"the tensors are on {tensors[0].device} and Triton compiles for it")


@contextmanager
def force(path: Path) -> Iterator[None]:
    """Take `path` for every call inside the `with` block, in this thread or task; for tests and comparisons.

    Raises:
        ValueError: `path` is neither "triton" nor "torch".
    """
    if path not in {"triton", "torch"}:
        raise ValueError(f"expected 'triton' or 'torch'; got {path!r}")
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)


def launching_on(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes `tensor`'s device the current one for a launch: Triton launches on the current device, whatever it is."""
    return nullcontext() if tensor.device.type == "cpu" else torch.cuda.device(tensor.device)


@cache
def triton_error() -> str | None:
    """Why Triton cannot be imported here; None if it can. Imports it."""
    try:
        import triton  # noqa: F401  -- whether it imports is the question
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return None


def interpreting() -> bool:
    """Whether this process runs kernels under Triton's interpreter (TRITON_INTERPRET=1 before Triton was imported)."""
    if triton_error() is not None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _dtype_obstacle(tensors: tuple[torch.Tensor, ...]) -> str | None:
    for tensor in tensors:
        if tensor.dtype not in LOADABLE:
            return f"{tensor.dtype} is not a dtype the kernels read"
    return None


def _device_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":  # HIP devices are "cuda" to torch, too
        return f"the tensors are on the device type {device.type!r}, where the twin runs"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"{device} is older than compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
    return triton_error()
