"""Which module is which: the stacks of a model, their blocks, and the sites where the stream is read and written.

Found by structure, not by a list of model names:

* a *stack* is the module that owns a `ModuleList` of blocks, and a list of blocks is one whose members contain
  attention (or, where nothing in the model does, the longest list of one class of module);
* every stack has a width of its own, since a vision tower's is not the text's; `blocks` tells how it is found;
* in a block, the *attention write* is the linear map of an attention module that ends in that width, and the *MLP
  write* that of the MLP. A block of experts has many, so there the whole expert module is the write.

So `attn_out` and `mlp_out` are what the block adds to the stream, before dropout, residual addition and any norm,
multiplier or gate that follows; they mean the same in pre-norm and post-norm models. Where nothing follows, what a
block adds is their sum (and cross attention's).

Left out: models without a list of blocks, which have no sites; convolutions and the state-space, linear-attention or
recurrent mixers that begin with one, which count as part of the block; a second MLP beside the first (shared experts
outside the expert module, Gemma 4's dense MLP beside its experts). ALBERT's blocks share their weights: they are one
block, passed many times. Gemma 3n's stream is several side by side, `(streams, B, S, D)`.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from lm_telemetry.hooks.blocks import (
    attention_roots,
    attention_write,
    head_count,
    in_features,
    is_attention,
    is_cross,
    mlp_write,
    stream_width,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SiteName = Literal["embed", "resid", "attn_out", "mlp_out", "final", "head_out"]

_TOWERS = {"vision": "vision", "visual": "vision", "audio": "audio", "encoder": "encoder", "decoder": "decoder"}
"""Names of stacks by the beginning of a word in their path. What a tower sees tells more than that it is an encoder."""

_OTHER_SENSES = ("vision", "audio")


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
        heads: number of query heads; None if neither the module nor its configuration tells.
        head_dim: width of a head's output, which may differ from that of its queries; None without `heads` or `output`.
    """

    index: int
    stack: str
    layer: int
    kind: Literal["self", "cross"]
    name: str
    modules: tuple[nn.Module, ...]
    output: nn.Module | None
    heads: int | None
    head_dim: int | None


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
    """of the main stack; as configured where its blocks do not tell"""
    sites: tuple[Site, ...]
    attentions: tuple[AttentionModule, ...]
    head_outputs: tuple[Site, ...]
    """the inputs of output projections, heads' outputs side by side; `index` is that of the attention module"""
    stacks: dict[str, int]
    """number of blocks by name of stack"""
    widths: dict[str, int | None]
    """width of the stream by name of stack"""
    main: str | None
    """the stack that predicts: the decoder, the text's where there are towers of other senses; None without stacks"""
    is_encoder_decoder: bool
    """whether encoder and decoder have tokens of their own in a batch, as the configuration says"""
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
    sites: list[Site] = []
    attentions: list[AttentionModule] = []
    stacks: dict[str, int] = {}
    widths: dict[str, int | None] = {}
    prefixes: list[tuple[str, str, int]] = []
    for path, owner, blocks in _block_lists(model):
        stack = _stack_name(path, blocks, stacks)
        width = stream_width(blocks)
        stacks[stack], widths[stack] = len(blocks), width
        places: list[tuple[int, SiteName, nn.Module]] = [(-1, "embed", blocks[0])]
        for layer, block in enumerate(blocks):
            prefixes.append((f"{path}.{layer}", stack, layer))
            found = [(name, root, attention_write(root, width)) for name, root in attention_roots(block)]
            own = [write for name, root, write in found if write is not None and not is_cross(name, root)]
            mlp = mlp_write(block, [root for _, root, _ in found], width)
            places += [(layer, "attn_out", write) for write in own[:1]]
            places += [(layer, "mlp_out", mlp)] if mlp is not None else []
            places += [(layer, "resid", block)]
            for name, root, write in found:
                attentions.append(
                    _attention(
                        root, write, index=len(attentions), place=(stack, layer), names=(f"{path}.{layer}", name)
                    )
                )
        places += [(len(blocks), "final", owner)]
        for layer, site, module in places:
            sites.append(
                Site(
                    index=len(sites),
                    stack=stack,
                    layer=layer,
                    site=site,
                    module=module,
                    reads_input=site == "embed",
                )
            )
    main = _main_stack(stacks)
    return Topology(
        width=(widths[main] if main is not None else None) or model_width(model),
        sites=tuple(sites),
        attentions=tuple(attentions),
        head_outputs=tuple(
            Site(index=a.index, stack=a.stack, layer=a.layer, site="head_out", module=a.output, reads_input=True)
            for a in attentions
            if a.output is not None
        ),
        stacks=stacks,
        widths=widths,
        main=main,
        is_encoder_decoder=bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)),
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


def _attention(
    root: nn.Module, write: nn.Module | None, *, index: int, place: tuple[str, int], names: tuple[str, str]
) -> AttentionModule:
    heads = head_count(root)
    features = None if write is None else in_features(write)
    whole = heads is None or features is None or features % heads == 0
    return AttentionModule(
        index=index,
        stack=place[0],
        layer=place[1],
        kind="cross" if is_cross(names[1], root) else "self",
        name=".".join(names),
        modules=tuple(m for m in root.modules() if is_attention(m)),
        output=write if whole else None,
        heads=heads,
        head_dim=features // heads if features is not None and heads is not None and whole else None,
    )


def _block_lists(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.ModuleList]]:
    """(dotted name of the list, the module that owns it, the list), outermost lists only."""
    owners = dict(model.named_modules())
    lists = [(n, m) for n, m in owners.items() if isinstance(m, nn.ModuleList) and len(m) > 0]
    with_attention = [(n, m) for n, m in lists if any(True for b in m for _ in attention_roots(b))]
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
    name = next((tower for mark, tower in _TOWERS.items() if any(word.startswith(mark) for word in words)), None)
    if name is None:
        causal = [getattr(m, "is_causal", None) for m in blocks.modules() if is_attention(m)]
        bidirectional = any(flag is False for flag in causal) and not any(causal)
        name = "encoder" if bidirectional else "decoder"
    return path if name in taken else name


def _main_stack(stacks: dict[str, int]) -> str | None:
    """The stack that predicts: the decoder, else the first that is no tower of another sense."""
    if "decoder" in stacks:
        return "decoder"
    return next((name for name in stacks if name not in _OTHER_SENSES), next(iter(stacks), None))
