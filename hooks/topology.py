"""Which module is which: the stacks of a model, their blocks, and the sites where the stream is read and written.

Found by structure, not by a list of model names:

* a *stack* is the module that owns a `ModuleList` of blocks, and a list of blocks is one whose members contain
  attention (or, where nothing in the model does, the longest list of one class of module);
* in a block, the *attention write* is the last linear map of an attention module that ends in the model's width, and
  the *MLP write* the last such map outside attention. A block of experts has many, so there the whole expert module
  is the write.

So `attn_out` and `mlp_out` are what the block adds to the stream, before dropout, residual addition and any norm that
follows it; they mean the same in pre-norm and post-norm models. Left out: models without a list of blocks, which have
no sites, and linear-attention or state-space mixers, which count as part of the block.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SiteName = Literal["embed", "resid", "attn_out", "mlp_out", "final", "head_out"]

_TOWERS = ("encoder", "decoder", "vision", "visual", "audio")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionModule:
    """A module that may call the attention interface.

    Attributes:
        index: position among all attention modules of the model.
        stack: name of its stack.
        layer: index of its block.
        kind: whether its keys come from its own stack or from another.
        name: dotted name in the model.
        modules: the module and its submodules of attention class; one of them makes the call.
        output: the output projection, whose input is the heads' outputs side by side; None if there is no such map.
    """

    index: int
    stack: str
    layer: int
    kind: Literal["self", "cross"]
    name: str
    modules: tuple[nn.Module, ...]
    output: nn.Module | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A place where activations are read.

    Attributes:
        index: position among all sites of the model, the row of its statistics.
        stack: name of its stack.
        layer: index of its block; -1 for `embed`, the number of blocks for `final`.
        site: which place (see the catalogue's table `layers`).
        module: the module that is hooked.
        reads_input: whether the tensor is what the module is given rather than what it gives.
    """

    index: int
    stack: str
    layer: int
    site: SiteName
    module: nn.Module
    reads_input: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """What was found in a model."""

    width: int | None
    sites: tuple[Site, ...]
    attentions: tuple[AttentionModule, ...]
    head_outputs: tuple[Site, ...]
    """the inputs of output projections, heads' outputs side by side; `index` is that of the attention module"""
    stacks: dict[str, int]
    """number of blocks by name of stack"""
    block_prefixes: tuple[tuple[str, str, int], ...]
    """(dotted name of a block, stack, layer), for placing parameters"""

    def place(self, parameter_name: str) -> tuple[str | None, int | None]:
        """Stack and layer a parameter belongs to; (None, None) outside the blocks."""
        for prefix, stack, layer in self.block_prefixes:
            if parameter_name.startswith(prefix + "."):
                return stack, layer
        return None, None


def discover(model: nn.Module) -> Topology:
    """The topology of a model. A model without blocks gives one without sites."""
    width = model_width(model)
    sites: list[Site] = []
    attentions: list[AttentionModule] = []
    stacks: dict[str, int] = {}
    prefixes: list[tuple[str, str, int]] = []
    for path, owner, blocks in _block_lists(model):
        stack = _stack_name(path, blocks, stacks)
        stacks[stack] = len(blocks)

        def add(
            layer: int, site: SiteName, module: nn.Module, *, reads_input: bool = False, stack: str = stack
        ) -> None:
            sites.append(
                Site(index=len(sites), stack=stack, layer=layer, site=site, module=module, reads_input=reads_input)
            )

        add(-1, "embed", blocks[0], reads_input=True)
        for layer, block in enumerate(blocks):
            block_name = f"{path}.{layer}"
            prefixes.append((block_name, stack, layer))
            found = list(_attention_roots(block))
            for name, module in found:
                if not _is_cross(name, module):
                    write = _last_linear(module, width)
                    if write is not None:
                        add(layer, "attn_out", write)
                        break
            for name, module in found:
                attentions.append(
                    AttentionModule(
                        index=len(attentions),
                        stack=stack,
                        layer=layer,
                        kind="cross" if _is_cross(name, module) else "self",
                        name=f"{block_name}.{name}" if name else block_name,
                        modules=tuple(m for m in module.modules() if _is_attention(m)),
                        output=_last_linear(module, width),
                    )
                )
            mlp = _mlp_write(block, {id(m) for _, root in found for m in root.modules()}, width)
            if mlp is not None:
                add(layer, "mlp_out", mlp)
            add(layer, "resid", block)
        add(len(blocks), "final", owner)
    return Topology(
        width=width,
        sites=tuple(sites),
        attentions=tuple(attentions),
        head_outputs=tuple(
            Site(index=a.index, stack=a.stack, layer=a.layer, site="head_out", module=a.output, reads_input=True)
            for a in attentions
            if a.output is not None
        ),
        stacks=stacks,
        block_prefixes=tuple(prefixes),
    )


def scopes(
    model: nn.Module, topology: Topology, names: Sequence[str], parameters: Sequence[nn.Parameter]
) -> dict[str, list[int]]:
    """Indices of parameters by the part of the model they belong to, parts in the order they appear.

    A part is a block as `stack.layer`, the input `embedding` (with an output head that is tied to it), or `other`.
    """
    embedding = None
    with suppress(AttributeError, NotImplementedError):  # no language model, or one that does not tell
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    embedded = set() if embedding is None else {id(p) for p in embedding.parameters()}
    parts: dict[str, list[int]] = {}
    for index, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        stack, layer = topology.place(name)
        outside = "embedding" if id(parameter) in embedded else "other"
        parts.setdefault(outside if stack is None else f"{stack}.{layer}", []).append(index)
    return parts


def text_config(model: nn.Module) -> Any:
    """The configuration of the model's text part, or None for a module without one."""
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def model_width(model: nn.Module) -> int | None:
    """Width of the residual stream as configured, or None for a module without a configuration."""
    config = text_config(model)
    for name in ("hidden_size", "d_model", "n_embd"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def _block_lists(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.ModuleList]]:
    """(dotted name of the list, the module that owns it, the list), outermost lists only."""
    owners = dict(model.named_modules())
    lists = [(n, m) for n, m in owners.items() if isinstance(m, nn.ModuleList) and len(m) > 0]
    with_attention = [(n, m) for n, m in lists if any(True for b in m for _ in _attention_roots(b))]
    if not with_attention and lists:
        alike = [(n, m) for n, m in lists if len({type(b) for b in m}) == 1]
        with_attention = [max(alike, key=lambda item: len(item[1]))] if alike else []
    taken: list[str] = []
    for name, blocks in with_attention:
        if any(name.startswith(outer + ".") for outer in taken):
            continue
        taken.append(name)
        yield name, owners[name.rpartition(".")[0]], blocks


def _stack_name(path: str, blocks: nn.ModuleList, taken: dict[str, int]) -> str:
    words = re.split(r"[._]", path.lower())
    name = next((tower for tower in _TOWERS if any(word.startswith(tower) for word in words)), None)
    if name is None:
        causal = [getattr(m, "is_causal", None) for m in blocks.modules() if _is_attention(m)]
        bidirectional = any(flag is False for flag in causal) and not any(causal)
        name = "encoder" if bidirectional else "decoder"
    return path if name in taken else name


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return ("attention" in name or "attn" in name) and "norm" not in name


def _attention_roots(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Outermost attention modules inside a block, with their names in it."""
    taken: list[str] = []
    for name, module in block.named_modules():
        if name and _is_attention(module) and not any(name.startswith(outer + ".") for outer in taken):
            taken.append(name)
            yield name, module


def _is_cross(name: str, module: nn.Module) -> bool:
    words = (name + "." + type(module).__name__).lower()
    return bool(getattr(module, "is_cross_attention", False)) or any(
        mark in words for mark in ("cross", "encoder_attn", "encdec", "enc_dec")
    )


def _out_features(module: nn.Module) -> int | None:
    """Width of a linear map's output, for `nn.Linear`, transformers' `Conv1D`, quantised and adapted ones."""
    if hasattr(module, "base_layer"):  # an adapter around a linear map stands for it
        return _out_features(module.base_layer)  # type: ignore[arg-type]
    for name in ("out_features", "nf"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return None


def _linears(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Linear maps below a module in order of registration, adapters not descended into."""
    for name, child in root.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if _out_features(child) is not None:
            yield path, child
        else:
            yield from _linears(child, path)


def _last_linear(root: nn.Module, width: int | None) -> nn.Module | None:
    found = [m for _, m in _linears(root) if width is None or _out_features(m) == width]
    return found[-1] if found else None


def _mlp_write(block: nn.Module, attention_ids: set[int], width: int | None) -> nn.Module | None:
    """The module whose output the block adds as its MLP write."""
    for child in block.children():
        has_experts = any("expert" in name.lower() for name, _ in (*child.named_modules(), *child.named_parameters()))
        if has_experts and id(child) not in attention_ids:
            return child
    outside = [
        module
        for _, module in _linears(block)
        if id(module) not in attention_ids and (width is None or _out_features(module) == width)
    ]
    return outside[-1] if outside else None
