"""What each head writes into the residual stream: its output through its own rows of the output projection.

    W_O = [W_1; ...; W_H]        write_h = o_h W_h        sum_h write_h = output - bias

An attention module's output projection takes the heads' outputs side by side, so its weight, `Dv` rows at a time, is a
head's own map into the stream (2112.00114 calls W_V W_h its OV circuit). The norm of a write says how loudly the head
speaks, which the norm of o_h does not: W_h may amplify or annul it (2004.10102 finds that attention weights mislead
without it).

Decisions:

- The bias belongs to no head and is left out of the writes.
- The write is what leaves the projection. A norm after it (Gemma 2, OLMo 2), a residual multiplier (Granite) or a layer
  scale acts on the sum of all heads and is not part of it: such models add less, or more, than these norms say. Of a
  norm after it only the common factor is missing, so heads of one token still compare.
- Two ways to a norm. Few tokens: the product o_h W_h itself. Many: |o_h W_h|^2 = o_h G_h o_h with G_h = W_h W_h', which
  is built once and costs Dv instead of D a token and entry. The cheaper one by count of multiplications is taken. The
  second squares the condition of W_h: its error is up to sqrt(eps) |o_h| |W_h| = 3e-4 |o_h| |W_h| where a head's output
  lies in the kernel of its map, and of order eps elsewhere.
- Sums are float32, or float64 for float64 inputs. What the projection cannot tell exactly and without synchronising
  (quantised, sharded or absent weights; adapters other than plain LoRA) is None.

Left out: LoRA's dropout, which changes what a training forward writes from call to call; the weight used here is its
expectation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lm_telemetry.hooks.activation_taps import aside

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK = 1 << 24
"""Entries of the largest intermediate: 64 MiB in float32."""


def head_slices(output: nn.Module, n_heads: int) -> Tensor | None:
    """An output projection's weight head by head, `(Hq, Dv, D)`: head h writes `o_h @ slices[h]`.

    Args:
        output: `nn.Linear`, transformers' `Conv1D`, or one of them within peft's LoRA, whose active adapters count.
        n_heads: number of query heads, Hq; the projection takes Hq * Dv features.

    Returns:
        A view of the weight, or a new tensor where adapters are added to it; None for any other module, for weights
        that are quantised, sharded or elsewhere, and where the features do not divide among the heads.
    """
    with torch.no_grad():
        weight = _input_major(output)
        if weight is None or n_heads < 1 or weight.shape[0] % n_heads:
            return None
        return weight.view(n_heads, weight.shape[0] // n_heads, weight.shape[1])


def write_norms(hidden: Tensor, output: nn.Module, n_heads: int, *, index: Tensor | None) -> Tensor | None:
    """Norms |o_h W_h| of what each head writes, `(n, Hq)`, in the stream's unit.

    Args:
        hidden: the projection's input, `(..., Hq * Dv)`: the heads' outputs side by side.
        output: the projection.
        n_heads: number of query heads, Hq.
        index: int64 rows of `hidden` with its leading axes flattened; None for all.

    Returns:
        float32 on the device of `hidden` (float64 if that is float64); None where `head_slices` is, or where `hidden`
        is not the projection's input. A non-finite output gives a non-finite norm. Nothing synchronises, and the
        largest intermediate has 2^24 entries or one head's map.
    """
    slices = head_slices(output, n_heads)
    if slices is None or slices.shape[0] * slices.shape[1] != hidden.shape[-1] or slices.device != hidden.device:
        return None
    exact = torch.promote_types(hidden.dtype, torch.float32)
    with aside(hidden):
        rows = hidden.detach().flatten(0, -2)
        rows = rows if index is None else rows[index]
        norms = rows.new_empty(rows.shape[0], n_heads, dtype=exact)
        for heads in _parts(n_heads, slices[0].numel()):
            maps = slices[heads].to(exact)  # (h, Dv, D)
            h, dv, width = maps.shape
            gram = maps @ maps.mT if rows.shape[0] * (width - dv) > dv * width else None
            for part in _parts(rows.shape[0], h * (width if gram is None else dv)):
                outputs = rows[part].view(-1, n_heads, dv)[:, heads].to(exact).transpose(0, 1)  # (h, r, Dv)
                if gram is None:
                    found = torch.linalg.vector_norm(outputs @ maps, dim=-1)
                else:
                    found = ((outputs @ gram) * outputs).sum(-1).clamp_min(0).sqrt()
                norms[part, heads] = found.mT
    return norms


def _parts(n: int, entries: int) -> Iterator[slice]:
    """Slices of `range(n)`, so that a part of items of so many entries each stays within the chunk."""
    step = max(1, _CHUNK // max(entries, 1))
    return (slice(start, start + step) for start in range(0, n, step))


def _input_major(module: nn.Module) -> Tensor | None:
    """The weight as (in, out), or None where it cannot be told."""
    if hasattr(module, "base_layer"):
        return _adapted(module)
    weight: Any = getattr(module, "weight", None)
    # subclasses of tensors are quantised or sharded, and 8-bit entries need scales that are kept elsewhere
    if type(weight) not in {Tensor, nn.Parameter} or not weight.is_floating_point() or weight.element_size() < 2:
        return None
    if isinstance(module, nn.Linear):
        shape = (module.out_features, module.in_features)
        return weight.t() if weight.shape == shape and not weight.is_meta else None
    if type(module).__name__ == "Conv1D":
        return weight if weight.ndim == 2 and not weight.is_meta else None
    return None


def _adapted(layer: Any) -> Tensor | None:
    """The weight of a linear map within peft's LoRA, W + sum over active adapters of scaling A' B'."""
    weight = _input_major(layer.base_layer)
    disabled, merged = getattr(layer, "disable_adapters", False), getattr(layer, "merged", False)
    if weight is None or (disabled and merged):  # the next forward unmerges
        return None
    if disabled or merged:
        return weight
    if not hasattr(layer, "lora_A"):
        return None
    for name in layer.active_adapters:
        if name in layer.lora_variant:  # DoRA and others are no sum
            return None
        if name in layer.lora_A:
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight  # (r, in), (out, r)
            exact = torch.promote_types(weight.dtype, torch.float32)
            weight = weight.to(exact) + layer.scaling[name] * (down.t().to(exact) @ up.t().to(exact))
    return weight
