"""Where attention goes, by head: is it spread over the keys, or do a few of them receive nearly all?

Fills `key_mass` from every query of a few sequences of the step's first micro-batch. What a key receives is a sum over
queries, so none is left out: two passes over the scores, as many products as attention's own forward (on a CPU about
three times its time), at O(S) memory. 2306.14048 calls the keys that receive the most heavy hitters. Queries of padding
give nothing, and keys that no real query may see are not counted.

A mask that is a function (FlexAttention) is evaluated for a block of queries at a time. A layer that the tap cannot
reach or describe is named in one event and left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from lm_telemetry.catalogue import Cost
from lm_telemetry.instruments.base import Attachment, Columns, Harvest, Instrument, Tap
from lm_telemetry.kernels.attention_columns import SUMMARY_COLUMNS, broken_rows, received_mass, summary, visible_keys
from lm_telemetry.kernels.attention_rows import attention_lse
from lm_telemetry.kernels.attention_rows_geometry import four_axes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from lm_telemetry.hooks.attention_call import AttentionCall
    from lm_telemetry.hooks.topology import AttentionModule

_QUERIES = 256
"""Queries for which a mask that is a function is evaluated at a time."""


@dataclass(kw_only=True)
class KeyMass(Instrument):
    """Mean and largest received attention, its Gini coefficient, and the heaviest keys, by layer and head."""

    name: ClassVar[str] = "key_mass"
    tables: ClassVar[tuple[str, ...]] = ("key_mass",)
    taps: ClassVar[frozenset[Tap]] = frozenset({Tap.ATTENTION})
    cost: ClassVar[Cost] = Cost.REDUCTION
    usual_every: ClassVar[int | None] = 100

    sequences: int = 1
    """Sequences of the batch that are looked at."""

    top: int = 16
    """Keys of the first sequence that are named, those that receive the most."""

    _attentions: tuple[AttentionModule, ...] = field(default=(), init=False, repr=False)
    _event: Callable[..., None] | None = field(default=None, init=False, repr=False)
    _told: set[str] = field(default_factory=set, init=False, repr=False)
    _found: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    _refused: dict[int, str] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        Instrument.__post_init__(self)
        for name in ("sequences", "top"):
            value = getattr(self, name)
            self.require(name, type(value) is int and value >= 1, "at least 1")

    def attach(self, attachment: Attachment) -> None:
        """Keep which attention modules there are."""
        self._attentions = attachment.topology.attentions
        self._event = attachment.event
        self._told = set()

    def begin(self, step: int) -> None:
        """Forget what an abandoned capture has left."""
        self._found, self._refused = {}, {}

    def on_attention(self, call: AttentionCall) -> None:
        """Reduce one layer; a layer called twice in a pass keeps its last call."""
        index = call.attention.index
        if call.unsupported is not None:
            self._refused[index] = call.unsupported
            return
        n, heads, length = min(self.sequences, len(call.query)), call.query.shape[1], call.query.shape[2]
        keep = call.forward.mask(call.attention.stack, len(call.query), length)
        keep = None if keep is None else keep[:n]
        key = call.key[:n]
        mass = torch.zeros(n, heads, key.shape[2], dtype=torch.float32, device=key.device)
        broken = torch.zeros(n, heads, dtype=torch.int64, device=key.device)
        for rows, geometry in _pieces(call, n):
            query = call.query[:n, :, rows]
            logits: dict[str, Any] = {"scale": call.scale, "bias": _cut(call.bias, n, rows), "softcap": call.softcap}
            kept = None if keep is None else keep[:, rows]
            lse = attention_lse(query, key, sinks=call.sinks, **logits, **geometry)
            mass += received_mass(query, key, lse, keep=kept, **logits, **geometry)
            broken += broken_rows(lse, kept)
        columns = summary(mass, self._visible(call, n, keep), top=self.top)
        self._found[index] = torch.cat((broken.sum(0)[:, None].double(), columns), dim=1)

    def harvest(self) -> Harvest | None:
        """The summaries of all layers."""
        self._tell_of_missing()
        found, self._found = self._found, {}
        return Harvest(tensors={str(i): found[i] for i in sorted(found)}) if found else None

    def rows(self, host: Mapping[str, np.ndarray[Any, Any]], note: Any) -> Mapping[str, Columns]:
        """One row a head."""
        attentions = [self._attentions[int(i)] for i, of_layer in host.items() for _ in of_layer]
        broken, *summaries = np.concatenate(list(host.values())).T
        raw = dict(zip(SUMMARY_COLUMNS, summaries, strict=False))
        positions, masses = np.split(np.stack(summaries[len(SUMMARY_COLUMNS) :], axis=1), 2, axis=1)
        there = positions >= 0
        nothing = raw["n_sequences"] == 0
        columns: dict[str, Any] = {
            "stack": [a.stack for a in attentions],
            "layer": [a.layer for a in attentions],
            "kind": [a.kind for a in attentions],
            "head": np.concatenate([np.arange(len(of_layer)) for of_layer in host.values()]),
            "nonfinite": broken.astype(np.int64),
            "top_positions": [p[t].astype(np.int32).tolist() for p, t in zip(positions, there, strict=True)],
            "top_mass": [m[t].tolist() for m, t in zip(masses, there, strict=True)],
        }
        for name, values in raw.items():
            counts = name.startswith("n_")
            columns[name] = values.astype(np.int64) if counts else np.ma.array(values, mask=nothing)
        return {"key_mass": columns}

    def detach(self) -> None:
        """Let go of what was found."""
        self._found = {}

    @staticmethod
    def _visible(call: AttentionCall, n: int, keep: Tensor | None) -> Tensor:
        """Keys that a real query of the first n sequences may see: the same in all layers that share a mask."""
        length, n_keys, device = call.query.shape[2], call.key.shape[2], call.key.device

        def make() -> Tensor:
            seen = torch.zeros(1, 1, n_keys, dtype=torch.bool, device=device)
            for rows, geometry in _pieces(call, n):
                kept = None if keep is None else keep[:, rows]
                seen = seen | visible_keys(len(range(length)[rows]), n_keys, keep=kept, device=device, **geometry)
            return seen

        plain = (call.attention.stack, n, length, n_keys, call.causal, call.query_offset, call.window, str(device))
        return call.forward.once(
            ("visible keys", *plain), (call.mask, call.mask_mod, call.own_keys, call.segments), make
        )

    def _tell_of_missing(self) -> None:
        assert self._event is not None
        missing = {
            a.name: self._refused.get(a.index, "not reached") for a in self._attentions if a.index not in self._found
        }
        for why in sorted(set(missing.values()) - self._told):
            self._told.add(why)
            names = [name for name, reason in missing.items() if reason == why]
            reason = (
                "the model computes attention itself instead of asking transformers' AttentionInterface"
                if why == "not reached"
                else f"what they compute cannot be told: {why}"
            )
            self._event(
                "warning",
                "key_mass_not_measured",
                f"{len(names)} of {len(self._attentions)} attention layers have no rows in `key_mass`: {reason}",
                layers=names,
            )


def _pieces(call: AttentionCall, n: int) -> Iterator[tuple[slice, dict[str, Any]]]:
    """Queries of a call, and what they may see of the first n sequences; one piece unless a mask is a function."""
    length = call.query.shape[2]
    step = max(1, length) if call.mask_mod is None else _QUERIES
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        if call.mask_mod is None:
            mask = _cut(call.mask, n, rows)
        else:
            mask = _cut(call.mask_rows(torch.arange(start, rows.stop, device=call.query.device)), n, slice(None))
        yield (
            rows,
            {
                "causal": call.causal,
                "query_offset": call.query_offset + start,
                "own_keys": None if call.own_keys is None else call.own_keys[:n, rows],
                "window": call.window,
                "mask": mask,
                "segments": None if call.segments is None else call.segments[:n],
            },
        )


def _cut(tensor: Tensor | None, n: int, rows: slice) -> Tensor | None:
    """The first n sequences and some queries of what is broadcastable to (B, Hq, Sq, Sk)."""
    if tensor is None:
        return None
    tensor = four_axes(tensor)[:n]
    return tensor if tensor.shape[2] == 1 else tensor[:, :, rows]
