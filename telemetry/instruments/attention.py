"""Statistics of attention rows by head: which heads are sinks, which look back one token, which have collapsed?

Fills `heads` from a few evenly spaced queries of each sequence in the step's first micro-batch, at O(queries x keys)
memory and with the model's own fast attention left alone. Rows of padding are not counted. A layer that the tap
cannot reach, or whose logits hold more than queries and keys (attention-sink logits), is named in one event and
left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lm_telemetry.catalogue import Cost
from lm_telemetry.instruments.base import Attachment, Columns, Harvest, Instrument, Tap
from lm_telemetry.kernels.attention_rows import RAW_COLUMNS, RowGeometry, attention_rows_at, row_geometry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lm_telemetry.hooks.attention_call import AttentionCall
    from lm_telemetry.hooks.topology import AttentionModule

_AVERAGED = tuple(name for name in RAW_COLUMNS if name not in {"n_queries", "max_logit", "nonfinite"})


@dataclass(kw_only=True)
class Attention(Instrument):
    """Entropy, log-sum-exp, largest logit, sink, previous-token and local mass by layer and head."""

    name: ClassVar[str] = "attention"
    tables: ClassVar[tuple[str, ...]] = ("heads",)
    taps: ClassVar[frozenset[Tap]] = frozenset({Tap.ATTENTION})
    cost: ClassVar[Cost] = Cost.REDUCTION

    queries: int | None = 32
    """Queries sampled in each sequence; None takes every one, at the cost of another half of attention's forward."""

    _attentions: tuple[AttentionModule, ...] = field(default=(), init=False, repr=False)
    _event: Callable[..., None] | None = field(default=None, init=False, repr=False)
    _told: set[str] = field(default_factory=set, init=False, repr=False)
    _raw: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    _seen: set[int] = field(default_factory=set, init=False, repr=False)
    _refused: dict[int, str] = field(default_factory=dict, init=False, repr=False)
    _lasting: dict[tuple[Any, ...], RowGeometry] = field(default_factory=dict, init=False, repr=False)
    _passing: dict[tuple[Any, ...], tuple[Any, RowGeometry]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        Instrument.__post_init__(self)
        self.require(
            "queries", self.queries is None or (type(self.queries) is int and self.queries >= 1), "at least 1, or None"
        )

    def attach(self, attachment: Attachment) -> None:
        """Keep which attention modules there are."""
        self._attentions = attachment.topology.attentions
        self._event = attachment.event
        self._told = set()
        self._raw, self._lasting = {}, {}

    def begin(self, step: int) -> None:
        """Forget what an abandoned capture has left."""
        self._seen, self._refused, self._passing = set(), {}, {}

    def on_attention(self, call: AttentionCall) -> None:
        """Reduce the sampled rows of one layer; a layer called twice in a pass keeps its last call."""
        index = call.attention.index
        if call.unsupported is not None:
            self._refused[index] = call.unsupported
            return
        raw = self._raw.get(index)
        if raw is not None and (raw.shape[0] != call.query.shape[1] or raw.device != call.query.device):
            raw = None
        self._raw[index] = attention_rows_at(
            call.query,
            call.key,
            self._geometry(call),
            scale=call.scale,
            bias=call.bias,
            softcap=call.softcap,
            out=raw,
        )
        self._seen.add(index)

    def harvest(self) -> Harvest | None:
        """The raw statistics of all layers."""
        self._passing = {}
        self._tell_of_missing()
        if not self._seen:
            return None
        return Harvest(tensors={str(i): self._raw[i] for i in sorted(self._seen)})

    def rows(self, host: Mapping[str, np.ndarray[Any, Any]], note: Any) -> Mapping[str, Columns]:
        """One row a head."""
        attentions = [self._attentions[int(i)] for i in host]
        heads = [len(raw) for raw in host.values()]
        raw = dict(zip(RAW_COLUMNS, np.concatenate(list(host.values())).T, strict=True))
        count = raw["n_queries"]
        nothing = count == 0
        columns: dict[str, Any] = {
            "stack": [a.stack for a, n in zip(attentions, heads, strict=True) for _ in range(n)],
            "layer": [a.layer for a, n in zip(attentions, heads, strict=True) for _ in range(n)],
            "kind": [a.kind for a, n in zip(attentions, heads, strict=True) for _ in range(n)],
            "head": np.concatenate([np.arange(n) for n in heads]),
            "n_queries": count.astype(np.int64),
            "max_logit": np.ma.array(raw["max_logit"], mask=nothing),
            "nonfinite": raw["nonfinite"].astype(np.int64),
        }
        for name in _AVERAGED:
            columns[name] = np.ma.array(raw[name] / np.where(nothing, 1.0, count), mask=nothing)
        return {"heads": columns}

    def detach(self) -> None:
        """Let go of the buffers."""
        self._raw, self._lasting, self._passing = {}, {}, {}

    def _geometry(self, call: AttentionCall) -> RowGeometry:
        """Sampled rows and what they see: the same for all layers of a stack, and without a mask for all steps."""
        stack, length, n_keys = call.attention.stack, call.query.shape[2], call.key.shape[2]
        sample = call.forward.queries(stack, call.query.shape[0], length, self.queries, call.query.device)
        first = None
        if call.attention.kind == "self":
            first = call.forward.first_token(stack, call.query.shape[0], n_keys)
        key = (call.attention.kind, length, n_keys, call.causal, call.query_offset, call.window, str(call.query.device))

        def make() -> RowGeometry:
            return row_geometry(
                positions=sample.index,
                n_keys=n_keys,
                causal=call.causal,
                query_offset=call.query_offset,
                window=call.window,
                keep=sample.keep,
                mask=None if call.mask is None else call.mask[..., :n_keys],
                first_key=first,
            )

        if call.mask is None and sample.keep is None and first is None:
            if key not in self._lasting:
                if len(self._lasting) >= 8:  # lengths that keep changing (decoding) would fill memory
                    self._lasting.clear()
                self._lasting[key] = make()
            return self._lasting[key]
        own = (stack, id(call.mask), *key)
        if own not in self._passing:
            self._passing[own] = (call.mask, make())  # holding the mask keeps its id from being used again
        return self._passing[own][1]

    def _tell_of_missing(self) -> None:
        assert self._event is not None
        missing = {
            a.name: self._refused.get(a.index, "not reached") for a in self._attentions if a.index not in self._seen
        }
        for why in sorted(set(missing.values()) - self._told):
            self._told.add(why)
            names = [n for n, w in missing.items() if w == why]
            reason = (
                "the model computes attention itself instead of asking transformers' AttentionInterface"
                if why == "not reached"
                else f"their logits hold {why}"
            )
            self._event(
                "warning",
                "attention_not_measured",
                f"{len(names)} of {len(self._attentions)} attention layers have no rows in `heads`: {reason}",
                layers=names,
            )
