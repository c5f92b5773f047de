"""Taps in a compiled graph: one opaque operator through which a graph shows its tensors to plain Python.

`torch.compile` traces the code around a model, hooks included, so a tap cannot do there what it does outside: a tensor
put in a Python container, a value read or a function kept from being traced each break the graph. An operator that the
compiler cannot look into does not. At run time `lm_telemetry::show` is called between the graph's own kernels with the
real tensors, finds the tap that was traced there, and lets it call its listener as in eager mode.

* The operator gives nothing back and would be removed as dead code; it therefore declares that it writes to a tensor
  that lasts, the *ticket*, and by that is also kept in order and is not run again when a checkpointed forward is
  recomputed. Nothing is written.
* Which tap it is travels as a tensor on the host, not as a constant. Blocks that are compiled one by one share one
  graph as before, where constants would compile one for each block.
* The tag `cudagraph_unsafe` has Inductor split a CUDA graph around the operator, whose Python cannot be replayed.
* Inputs are detached, so the graph of gradients does not know of it.

Reading a tensor keeps the compiler from fusing it away. The result is equal to rounding, not bit by bit; with the taps
silent the operator is not in the graph at all.

What it cannot do: reach a graph that was compiled without taps. torch does not guard on whether a module has hooks, and
keeps graphs by code, not by model, so one that was called before, or another of its class that is called without taps
in the same process, may lend its graph. Nothing is shown then, which whoever armed the taps can see. And each graph is
compiled twice, which counts against `torch._dynamo.config.recompile_limit`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence  # noqa: TC003  torch reads the operator's annotations
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lm_telemetry.hooks.inert import Inert


def _host_integer(value: int) -> Tensor:
    with torch.inference_mode(False):  # whoever attaches in inference mode may train afterwards
        return torch.tensor(value, dtype=torch.int64, device="cpu")


_ticket = _host_integer(0)
_numbers = itertools.count()
_taps: WeakValueDictionary[int, GraphTap] = WeakValueDictionary()


class GraphTap(Inert):
    """A tap that a compiled graph can name.

    Attributes:
        number: int64 `()` on the host, by which the operator finds the tap.
    """

    __slots__ = ("__weakref__", "number")

    def __init__(self) -> None:
        number = next(_numbers)
        self.number = _host_integer(number)
        _taps[number] = self

    def receive(self, arguments: dict[str, Any]) -> None:
        """Called by the graph at run time, with what was given to `show` where the tap was traced."""
        raise NotImplementedError


class Opaque:
    """Stands for an argument of which only the type could be shown; its class has the name of that type."""


def show(tap: GraphTap, arguments: dict[str, Any]) -> None:
    """Have the graph that is being traced call `tap.receive(arguments)` whenever it runs.

    Tensors arrive detached; None, bool, int, float and str arrive as they are, anything else as an `Opaque`.
    """
    layout: list[str] = []
    tensors: list[Tensor] = []
    integers: list[int] = []
    floats: list[float] = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            layout.append(f"tensor {name}")
            tensors.append(value.detach())
        elif isinstance(value, bool):
            layout.append(f"bool {name}")
            integers.append(int(value))
        elif isinstance(value, int):
            layout.append(f"int {name}")
            integers.append(value)
        elif isinstance(value, float):
            layout.append(f"float {name}")
            floats.append(value)
        elif isinstance(value, str):
            layout.append(f"str {name} {value}")
        elif value is None:
            layout.append(f"none {name}")
        else:
            layout.append(f"opaque {name} {type(value).__name__}")
    torch.ops.lm_telemetry.show(
        tap.number, _ticket, tensors, integers=integers, floats=floats, layout="\n".join(layout)
    )


@torch.library.custom_op("lm_telemetry::show", mutates_args=("ticket",), tags=(torch.Tag.cudagraph_unsafe,))
def _show(
    number: Tensor,
    ticket: Tensor,  # noqa: ARG001  declared as written to, see above
    tensors: Sequence[Tensor],
    *,
    integers: Sequence[int],
    floats: Sequence[float],
    layout: str,
) -> None:
    tap = _taps.get(int(number))  # on the host: nothing is waited for
    if tap is not None:
        tap.receive(_arguments(tensors, integers, floats, layout))


_show.register_fake(lambda *_lists, **_rest: None)


def _arguments(
    tensors: Sequence[Tensor], integers: Sequence[int], floats: Sequence[float], layout: str
) -> dict[str, Any]:
    """What `show` was given, from the lists it has sorted it into."""
    of_tensors, of_integers, of_floats = iter(tensors), iter(integers), iter(floats)
    arguments: dict[str, Any] = {}
    for line in layout.split("\n"):
        kind, name, *rest = line.split(" ", 2)
        match kind:
            case "tensor":
                arguments[name] = next(of_tensors)
            case "bool":
                arguments[name] = bool(next(of_integers))
            case "int":
                arguments[name] = next(of_integers)
            case "float":
                arguments[name] = next(of_floats)
            case "str":
                arguments[name] = rest[0]
            case "opaque":
                arguments[name] = type(rest[0], (Opaque,), {})()
            case _:
                arguments[name] = None
    return arguments
