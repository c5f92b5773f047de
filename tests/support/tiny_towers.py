"""What a configuration says of a model's stacks, for holding a topology to it.

A case gives a model with random weights, a batch that passes all of its stacks, and per stack the dotted names, inside
a block, of the modules that write to the stream, as the class's source has them. Depths, widths and heads are read from
the configuration. Sizes differ wherever a class allows it, so that one cannot be taken for another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers as hf

if TYPE_CHECKING:
    from collections.abc import Callable

VOCAB, BATCH, LENGTH, IMAGE = 64, 2, 24, 60

POST_NORM = "a norm stands after the addition"
SANDWICH = "a norm stands between the write and the addition"
SCALED = "what is added is a multiple of the write"
PARALLEL_MLP = "a second MLP beside the experts is added"
OTHER_PATHS = "other paths write to the stream too"

BASE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
UNGROUPED = {k: v for k, v in BASE.items() if k != "num_key_value_heads"}
O_PROJ, DOWN = "self_attn.o_proj", "mlp.down_proj"


def text(**changes):
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(3, IMAGE - 4, (BATCH, LENGTH), generator=generator), **changes}


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A stack as its configuration has it; `writes` are the names of (attention, MLP) writes, block by block."""

    blocks: int
    width: int
    heads: int | None
    head_dim: int | None
    writes: tuple[tuple[str | None, str | None], ...]
    cross: str | None = None
    sum_fails: str | None = None
    """why what a block adds is not the sum of its writes; None where it is"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One class."""

    build: Callable[[], Any]
    towers: Callable[[Any], dict[str, Tower]]
    main: str = "decoder"
    inputs: Callable[[], dict[str, Any]] = text


def tower(config, attention, mlp, *, head_dim=None, blocks=None, width=None, heads=None, **settings):
    """A stack as a configuration has it; MLP writes in a list are one a block, attention writes in a dict by block."""
    blocks = blocks or config.num_hidden_layers
    width = width or config.hidden_size
    heads = heads or config.num_attention_heads
    attentions = attention if isinstance(attention, dict) else dict.fromkeys(range(blocks), attention)
    mlps = mlp if isinstance(mlp, list) else [mlp] * blocks
    return Tower(
        blocks=blocks,
        width=width,
        heads=heads,
        head_dim=head_dim or getattr(config, "head_dim", None) or width // heads,
        writes=tuple((attentions.get(layer), mlps[layer]) for layer in range(blocks)),
        **settings,
    )


def one(family, attention, mlp, settings, *, head="ForCausalLM", stack="decoder", config="Config", **expected):
    """A model of one stack."""
    return Case(
        build=lambda: getattr(hf, family + head)(getattr(hf, family + config)(**settings)),
        towers=lambda c: {stack: tower(c, attention, mlp, **expected)},
        main=stack,
    )


def llama_like(family, mlp=DOWN, attention=O_PROJ, *, config="Config", expected=None, **settings):
    return one(family, attention, mlp, {**BASE, **settings}, config=config, **(expected or {}))
