"""Take one attention head out of a model for a while, and see what the model is without it.

An attention's output projection is given the heads' outputs side by side, o = [o_1; ...; o_H], so that head h adds
o_h W_h to the residual stream and nothing else. Replacing o_h alone, by zero or by its mean, knocks the head out and
leaves the rest of the model as it is (*zero* and *mean ablation*, 2211.00593). Zero takes away what the head adds
always, too, which later layers rely on like a bias; its mean keeps that, and takes away only what depends on the input.

Decisions:

- The intervention is a forward pre-hook on the projection: it works for any attention implementation, and for linear
  maps, transformers' `Conv1D` and either within LoRA, whose adapters are then given the same. The tensor the model
  computed is not written to. However the block is left, the hook is taken off.
- A head is a slice of the projection's input, so its keys and values may be shared with other heads (grouped queries).
- A layer that is called more than once in a pass (shared weights) is without the head in every call, and a mean is over
  all of them.

Left out: replacing a head at some positions only, and patching in what it gave for another input.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lm_telemetry.errors import ModelError
from lm_telemetry.hooks.activation_taps import aside

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lm_telemetry.hooks.forward_pass import ForwardPass
    from lm_telemetry.hooks.topology import AttentionModule


@contextmanager
def without_head(attention: AttentionModule, head: int, *, replacement: Tensor | None = None) -> Iterator[None]:
    """Knock a head out of the model while the block is open.

    Args:
        attention: where the head is.
        head: index of the query head, from 0.
        replacement: `(Dv,)`, what stands for the head's output at every position; None for zero.

    Raises:
        ModelError: the attention's heads are not known, or, in a forward pass, the projection is given something else
            than all of them (as where heads are spread over ranks).
        ValueError: there is no such head, or the replacement has another width than it.
    """
    if attention.output is None or attention.heads is None or attention.head_dim is None:
        raise ModelError(
            f"{attention.name}: a known number of heads and an output projection that takes them side by side were "
            "expected; not both were found, so its heads cannot be told apart"
        )
    if not 0 <= head < attention.heads:
        raise ValueError(f"{attention.name}: expected a head from 0 to {attention.heads - 1}; got {head}")
    size, width = attention.head_dim, attention.heads * attention.head_dim
    if replacement is not None and replacement.shape != (size,):
        raise ValueError(f"{attention.name}: expected ({size},) for a head; got {tuple(replacement.shape)}")

    def replace(hidden: Tensor) -> Tensor:
        if hidden.shape[-1] != width:
            raise ModelError(
                f"{attention.name}: the output projection was expected to be given {width} features; got "
                f"{hidden.shape[-1]}"
            )
        changed = hidden.clone()
        changed[..., head * size : (head + 1) * size] = 0 if replacement is None else replacement.to(hidden)
        return changed

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (replace(args[0]), *args[1:]), kwargs
        name, hidden = next(iter(kwargs.items()))
        return args, {**kwargs, name: replace(hidden)}

    handle = attention.output.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class HeadMeans:
    """Mean output of each head over the real tokens of some forward passes, all layers at once.

    Sums are float32, or float64 for float64 outputs. Tokens that a two-dimensional mask calls padding are left out.
    """

    def __init__(self, attentions: Sequence[AttentionModule]) -> None:
        self._attentions = [a for a in attentions if a.output is not None and a.head_dim is not None]
        self._sums: dict[int, tuple[Tensor, Tensor | int]] = {}

    @contextmanager
    def reading(self, forward: ForwardPass) -> Iterator[None]:
        """Take in the model's passes while the block is open; `forward` holds their arguments."""
        with ExitStack() as exits:
            for attention in self._attentions:
                assert attention.output is not None
                hook = partial(self._see, attention, forward)
                exits.callback(attention.output.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def of(self, attention: AttentionModule) -> Tensor | None:
        """`(Hq, Dv)`, head by head; None where the heads are not known, or the projection was not given them all."""
        if attention.index not in self._sums or attention.heads is None:
            return None
        total, count = self._sums[attention.index]
        return (total / count).view(attention.heads, -1)

    def _see(
        self,
        attention: AttentionModule,
        forward: ForwardPass,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        hidden: Tensor = args[0] if args else next(iter(kwargs.values()))
        width = hidden.shape[-1]
        assert attention.heads is not None
        assert attention.head_dim is not None
        if width != attention.heads * attention.head_dim:  # this rank's heads only
            return
        batch_size, length = hidden.shape[:2] if hidden.dim() == 3 else (1, hidden.numel() // width)
        with aside(hidden):
            tokens = hidden.reshape(-1, width).to(torch.promote_types(hidden.dtype, torch.float32))
            real = forward.mask(attention.stack, batch_size, length)
            count: Tensor | int = len(tokens)
            if real is not None:
                real = real.to(hidden.device).reshape(-1, 1)
                tokens, count = torch.where(real, tokens, 0), real.sum()
            total = tokens.sum(0)
            if attention.index in self._sums:
                before, counted = self._sums[attention.index]
                total, count = total + before, count + counted
            self._sums[attention.index] = (total, count)
