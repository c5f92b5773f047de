"""The tap on the whole model: what it is called with, and that the call is over.

It sits on the module the training loop calls, which may be a wrapper (DDP, a compiled module), so that it runs in plain
Python, outside any compiled graph. A model compiled in place (`model.compile()`) has no wrapper; there the compiled
callable on the instance is replaced by one that calls it.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lm_telemetry.hooks.inert import Inert

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.utils.hooks import RemovableHandle


def is_compiled(module: nn.Module) -> bool:
    """Whether a module, or any part of it, runs through `torch.compile`."""
    optimized = torch._dynamo.eval_frame.OptimizedModule
    return any(isinstance(m, optimized) or m._compiled_call_impl is not None for m in module.modules())


class OuterTap:
    """Tells `begin(batch)` before a call of `outer` and `end(output)` after it."""

    def __init__(
        self,
        outer: nn.Module,
        model: nn.Module,
        begin: Callable[[Mapping[str, Any]], None],
        end: Callable[[Any], None],
    ) -> None:
        self._outer = outer
        self._names = _argument_names(model)
        self._begin = begin
        self._end = end
        self._handles: list[RemovableHandle] = []
        self._compiled_call: Any = None

    def install(self) -> None:
        """Put the tap on."""
        if self._outer._compiled_call_impl is not None:
            self._compiled_call = self._outer._compiled_call_impl
            self._outer._compiled_call_impl = _CompiledCall(self, self._compiled_call)
            return
        self._handles = [
            self._outer.register_forward_pre_hook(_Before(self), with_kwargs=True),
            self._outer.register_forward_hook(_After(self)),
        ]

    def remove(self) -> None:
        """Take it off."""
        if self._compiled_call is not None:
            self._outer._compiled_call_impl = self._compiled_call
            self._compiled_call = None
        while self._handles:
            self._handles.pop().remove()

    def before(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A call begins."""
        self._begin({**dict(zip(self._names, args, strict=False)), **kwargs})

    def after(self, output: Any) -> None:
        """A call has ended."""
        self._end(output)


class _Hook(Inert):
    __slots__ = ("tap",)

    def __init__(self, tap: OuterTap) -> None:
        self.tap = tap


class _Before(_Hook):
    __slots__ = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tap.before(args, kwargs)


class _After(_Hook):
    __slots__ = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.tap.after(output)


class _CompiledCall(Inert):
    __slots__ = ("call", "tap")

    def __init__(self, tap: OuterTap, call: Callable[..., Any]) -> None:
        self.tap = tap
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.tap.before(args, kwargs)
        output = self.call(*args, **kwargs)
        self.tap.after(output)
        return output


def _argument_names(model: nn.Module) -> list[str]:
    """Names of the positional arguments of a model's forward, adapters looked through."""
    base = getattr(model, "get_base_model", None)
    inner = base() if callable(base) else model
    parameters = list(inspect.signature(type(inner).forward).parameters.values())[1:]
    positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return [p.name for p in parameters if p.kind in positional]
