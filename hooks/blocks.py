"""What is inside a block: its attention, its MLP, the maps by which they write to the stream, and the stream's width.

By structure; of names only fragments that mean the same everywhere (attention, norm, expert, q, k, v, gate) are read.

* The *width* of a stack is the size of the norms that stand directly in its blocks. Where these are elsewhere (BERT,
  T5) or carry no weight, it is the number that most linear maps begin or end with. A configuration is not asked: it
  has one width where a model with a vision tower has two, and Qwen2-VL's `hidden_size` is not that of its vision
  blocks.
* An *attention root* is the outermost module of attention class that is not a block itself: one that holds attention
  and, outside it, experts or more than one linear map (Zamba2's `AttentionDecoderLayer`) is a block.
* The *attention write* is the last linear map of attention that ends in the width. Maps named as inputs (q, k, v, gate)
  are passed over, since they may be as wide and some classes register the output before them (Afmoe, MiniMax, Phi-3).
  Where only these are left (JetMoE, whose output is a map of experts) there is none.
* A *mixer* is a module that owns a one-dimensional convolution: state-space models, gated delta nets, short
  convolutions and recurrent blocks all begin with one. It is neither attention nor MLP.
* The *MLP* is what is left of a block: experts before anything else, else the part with the largest maps, which sets
  it off from low-rank paths beside it (Gemma 3n's per-layer inputs and LAuReL). Its *write* is the last of its maps
  that ends in the width, whatever its name.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_INPUTS = {"q", "k", "v", "kv", "qkv", "query", "key", "value", "gate"}
"""Words in the names of maps that lead into attention."""

_HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_attn_heads", "n_heads", "n_head")


def is_attention(module: nn.Module) -> bool:
    """Whether a module's class is named after attention; norms and adapters of attention are not."""
    name = type(module).__name__.lower()
    return ("attention" in name or "attn" in name) and "norm" not in name and "adapter" not in name


def attention_roots(block: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Outermost attention modules inside a block, with their names in it."""
    for name, child in block.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if is_attention(child) and not _holds_more_than_attention(child):
            yield path, child
        else:
            yield from attention_roots(child, path)


def is_cross(name: str, module: nn.Module) -> bool:
    """Whether an attention module of that name takes its keys from another stack."""
    words = (name + "." + type(module).__name__).lower()
    return bool(getattr(module, "is_cross_attention", False)) or any(
        mark in words for mark in ("cross", "encoder_attn", "encdec", "enc_dec")
    )


def stream_width(blocks: Iterable[nn.Module]) -> int | None:
    """Width of the stream through some blocks; None if they have neither norms nor linear maps."""
    blocks = list(blocks)
    norms = Counter(size for block in blocks for size in _norm_sizes(block.children()))
    # in order of appearance, so that of numbers met equally often the first map's input wins
    ends = Counter(
        end
        for block in blocks
        for _, linear in linears(block)
        for end in dict.fromkeys((in_features(linear), out_features(linear)))
    )
    most = (norms or ends).most_common(1)
    return most[0][0] if most else None


def in_features(module: nn.Module) -> int | None:
    """Width of a linear map's input."""
    return _features(module, ("in_features", "nx"))


def out_features(module: nn.Module) -> int | None:
    """Width of a linear map's output, for `nn.Linear`, transformers' `Conv1D`, quantised and adapted ones."""
    return _features(module, ("out_features", "nf"))


def linears(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Linear maps below a module in order of registration, adapters not descended into."""
    for name, child in root.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if out_features(child) is not None:
            yield path, child
        else:
            yield from linears(child, path)


def attention_write(root: nn.Module, width: int | None) -> nn.Module | None:
    """The linear map by which an attention module writes to a stream of that width; None where none is known."""
    ending = _ending(linears(root), width)
    writes = [m for name, m in ending if not _INPUTS & set(re.split(r"[._]", name.lower()))]
    return writes[-1] if writes else None


def mlp_write(block: nn.Module, roots: Iterable[nn.Module], width: int | None) -> nn.Module | None:
    """The module whose output a block adds as its MLP write: a map, or a whole module of experts; None without either.

    Args:
        block: the block.
        roots: its attention modules.
        width: width of its stream.
    """
    others = {id(m) for m in (*roots, *_mixers(block))}
    best, largest = None, (False, -1)
    for part, maps in _parts(block, others):
        has_experts = part is not None and _has_experts(part)
        ending = _ending(maps, width)
        write = part if has_experts else ending[-1][1] if ending else None
        size = (has_experts, sum((in_features(m) or 0) * (out_features(m) or 0) for _, m in maps))
        if write is not None and size >= largest:
            best, largest = write, size
    return best


def head_count(root: nn.Module) -> int | None:
    """Number of query heads of an attention module, as it or the configuration it keeps tells; None if neither does."""
    modules = [m for m in root.modules() if is_attention(m)]
    for source in (*modules, *(getattr(m, "config", None) for m in modules)):
        for name in _HEAD_COUNTS:
            value = getattr(source, name, None)
            if isinstance(value, int):
                return value
    return None


def _parts(node: nn.Module, others: set[int]) -> Iterator[tuple[nn.Module | None, list[tuple[str, nn.Module]]]]:
    """A module without `others`: each child with its linear maps, and those that it owns itself together, as None."""
    own = []
    for name, child in node.named_children():
        if id(child) in others:
            continue
        if out_features(child) is not None:
            own.append((name, child))
        elif any(id(m) in others for m in child.modules()):
            yield from _parts(child, others)
        else:
            yield child, list(linears(child))
    yield None, own


def _ending(maps: Iterable[tuple[str, nn.Module]], width: int | None) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in maps if width is None or out_features(m) == width]


def _mixers(block: nn.Module) -> Iterator[nn.Module]:
    return (m for m in block.modules() if any(isinstance(child, nn.Conv1d) for child in m.children()))


def _has_experts(module: nn.Module) -> bool:
    names = (name for name, _ in (*module.named_modules(), *module.named_parameters()))
    classes = (type(m).__name__ for m in module.modules())
    return any("expert" in name.lower() for name in (*names, *classes))


def _holds_more_than_attention(module: nn.Module) -> bool:
    inner = {id(m) for _, root in attention_roots(module) for m in root.modules()}
    if not inner:
        return False
    outside = sum(id(linear) not in inner for _, linear in linears(module))
    return outside > 1 or _has_experts(module)


def _norm_sizes(modules: Iterable[nn.Module]) -> Iterator[int]:
    for module in modules:
        if "norm" in type(module).__name__.lower():
            weight, shape = getattr(module, "weight", None), getattr(module, "normalized_shape", None)
            if isinstance(weight, Tensor) and weight.dim() == 1 and len(weight):
                yield len(weight)
            elif isinstance(shape, tuple):
                yield shape[-1]


def _features(module: nn.Module, names: Iterable[str]) -> int | None:
    if hasattr(module, "base_layer"):  # an adapter around a linear map stands for it
        return _features(module.base_layer, names)  # type: ignore[arg-type]
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return None
