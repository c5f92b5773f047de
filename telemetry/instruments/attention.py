"""Statistics of attention rows by head: which heads are sinks, which look back one token, which have collapsed?

Fills `heads` from a few evenly spaced queries of each sequence in the step's first micro-batch, at O(queries x keys)
memory and with the model's own fast attention left alone. Rows of padding are not counted.

- Induction is looked for in self-attention whose keys are the tokens of the batch, one by one: not in cross-attention,
  with keys of earlier calls in a cache, or without token ids.
- `output_norm` is that of the heads' writes at the same queries, through the output projection.

A layer that the tap cannot reach, or whose logits cannot be told, is named in one event and left out; so are layers
whose projection is not a plain matrix, of `output_norm` only. On a GPU, one event says why a model's attention goes to
the torch twin instead of the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from lm_telemetry.catalogue import Cost
from lm_telemetry.hooks.head_writes import write_norms
from lm_telemetry.instruments.base import Attachment, Columns, Harvest, Instrument, Tap
from lm_telemetry.kernels.attention_rows import RAW_COLUMNS, RowGeometry, attention_rows_at, refusal, row_geometry
from lm_telemetry.kernels.induction import induction_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from lm_telemetry.hooks.activation_taps import Activation
    from lm_telemetry.hooks.attention_call import AttentionCall
    from lm_telemetry.hooks.forward_pass import Sample
    from lm_telemetry.hooks.topology import AttentionModule

_NOT_AVERAGED = {"n_queries", "max_logit", "n_induction", "induction_score", "nonfinite"}
_AVERAGED = tuple(name for name in RAW_COLUMNS if name not in _NOT_AVERAGED)

_N = len(RAW_COLUMNS)
_COLUMNS = (*RAW_COLUMNS, "output_norm", "n_outputs")
"""What a layer's buffer holds of each head: sums over rows, and over writes with a finite norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """The sampled rows of layers that share a mask, in one pass.

    Attributes:
        geometry: what they may see.
        induction: (B, n), their induction keys; None where they cannot be told.
        tokens: (B * n,), their places among the flattened tokens of the batch.
        keep: (B * n, 1) bool, False where a place is not to be counted; None for all.
        n_tokens: number of the batch's tokens, B * Sq.
    """

    geometry: RowGeometry
    induction: Tensor | None
    tokens: Tensor
    keep: Tensor | None
    n_tokens: int


@dataclass(kw_only=True)
class Attention(Instrument):
    """Entropy, log-sum-exp, largest logit, sink, previous-token, local and induction mass, and norm of the write."""

    name: ClassVar[str] = "attention"
    tables: ClassVar[tuple[str, ...]] = ("heads",)
    taps: ClassVar[frozenset[Tap]] = frozenset({Tap.ATTENTION, Tap.HEADS})
    cost: ClassVar[Cost] = Cost.REDUCTION

    queries: int | None = 32
    """Queries sampled in each sequence; None takes every one, at the cost of another half of attention's forward."""

    _attentions: tuple[AttentionModule, ...] = field(default=(), init=False, repr=False)
    _event: Callable[..., None] | None = field(default=None, init=False, repr=False)
    _told: set[str] = field(default_factory=set, init=False, repr=False)
    _raw: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    _seen: dict[int, _Rows] = field(default_factory=dict, init=False, repr=False)
    _normed: set[int] = field(default_factory=set, init=False, repr=False)
    _refused: dict[int, str] = field(default_factory=dict, init=False, repr=False)
    _lasting: dict[tuple[Any, ...], RowGeometry] = field(default_factory=dict, init=False, repr=False)

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
        self._seen, self._normed, self._refused = {}, set(), {}

    def on_attention(self, call: AttentionCall) -> None:
        """Reduce the sampled rows of one layer; a layer called twice in a pass keeps its last call."""
        index = call.attention.index
        if call.unsupported is not None:
            self._refused[index] = call.unsupported
            return
        heads, device = call.query.shape[1], call.query.device
        raw = self._raw.get(index)
        if raw is None or raw.shape[0] != heads or raw.device != device:
            raw = self._raw[index] = torch.empty(heads, len(_COLUMNS), dtype=torch.float64, device=device)
        rows = self._sampled(call)
        attention_rows_at(
            call.query,
            call.key,
            rows.geometry,
            scale=call.scale,
            bias=call.bias,
            softcap=call.softcap,
            sinks=call.sinks,
            induction_key=rows.induction,
            out=raw[:, :_N],
        )
        raw[:, _N:] = 0
        self._seen[index] = rows
        self._tell_of_the_twin(call)

    def on_heads(self, activation: Activation) -> None:
        """Sum the norms of the heads' writes at the sampled queries of a layer whose rows were seen."""
        index, hidden = activation.site.index, activation.hidden
        rows, output = self._seen.get(index), self._attentions[index].output
        if rows is None or output is None or hidden.shape[:-1].numel() != rows.n_tokens:
            return
        raw = self._raw[index]
        norms = write_norms(hidden, output, len(raw), index=rows.tokens)
        if norms is None:
            return
        good = norms.isfinite() if rows.keep is None else norms.isfinite() & rows.keep
        raw[:, _N] = torch.where(good, norms, 0.0).sum(0, dtype=torch.float64)
        raw[:, _N + 1] = good.sum(0)
        self._normed.add(index)

    def harvest(self) -> Harvest | None:
        """The raw statistics of all layers, and in which of them induction was looked for."""
        self._tell_of_missing()
        if not self._seen:
            return None
        told = [i for i, rows in self._seen.items() if rows.induction is not None]
        harvest = Harvest(tensors={str(i): self._raw[i] for i in sorted(self._seen)}, note=told)
        self._seen = {}  # holds masks
        return harvest

    def rows(self, host: Mapping[str, np.ndarray[Any, Any]], note: Any) -> Mapping[str, Columns]:
        """One row a head."""
        attentions = [self._attentions[int(i)] for i in host]
        heads = [len(raw) for raw in host.values()]
        raw = dict(zip(_COLUMNS, np.concatenate(list(host.values())).T, strict=True))
        count, n_induction, n_outputs = raw["n_queries"], raw["n_induction"], raw["n_outputs"]
        nothing = count == 0
        unknown = np.repeat([int(i) not in note for i in host], heads)
        columns: dict[str, Any] = {
            "stack": [a.stack for a, n in zip(attentions, heads, strict=True) for _ in range(n)],
            "layer": [a.layer for a, n in zip(attentions, heads, strict=True) for _ in range(n)],
            "kind": [a.kind for a, n in zip(attentions, heads, strict=True) for _ in range(n)],
            "head": np.concatenate([np.arange(n) for n in heads]),
            "n_queries": count.astype(np.int64),
            "n_induction": np.ma.array(n_induction.astype(np.int64), mask=unknown),
            "induction_score": _mean(raw["induction_score"], n_induction),
            "output_norm": _mean(raw["output_norm"], n_outputs),
            "max_logit": np.ma.array(raw["max_logit"], mask=nothing),
            "nonfinite": raw["nonfinite"].astype(np.int64),
        }
        for name in _AVERAGED:
            columns[name] = _mean(raw[name], count)
        return {"heads": columns}

    def detach(self) -> None:
        """Let go of the buffers."""
        self._raw, self._seen, self._lasting = {}, {}, {}

    def _sampled(self, call: AttentionCall) -> _Rows:
        """The sampled rows of a call: the same for all layers of a stack that are called alike."""
        attention, (batch_size, _, length, _), device = call.attention, call.query.shape, call.query.device
        n_keys = call.key.shape[2]

        def make() -> _Rows:
            sample = call.forward.queries(attention.stack, batch_size, length, self.queries, device)
            geometry = self._geometry(call, sample)
            begins = torch.arange(batch_size, device=device)[:, None] * length
            return _Rows(
                geometry=geometry,
                induction=_induction(call, geometry),
                tokens=(begins + geometry.positions).flatten(),
                keep=None if sample.keep is None else sample.keep.expand(batch_size, -1).reshape(-1, 1),
                n_tokens=batch_size * length,
            )

        shape = (batch_size, length, n_keys, self.queries, str(device))
        alike = (attention.stack, attention.kind, call.causal, call.query_offset, call.window)
        parts = (call.mask, call.mask_mod, call.own_keys, call.segments)
        return call.forward.once(("attention rows", *shape, *alike), parts, make)

    def _geometry(self, call: AttentionCall, sample: Sample) -> RowGeometry:
        """What the sampled rows may see: without masks and padding the same at all steps."""
        n_keys, first = call.key.shape[2], None
        if call.attention.kind == "self":
            first = call.forward.first_token(call.attention.stack, call.query.shape[0], n_keys)
        every = (call.mask, call.mask_mod, call.own_keys, call.segments, sample.keep, first)
        lasts = all(part is None for part in every)
        key = (call.query.shape[2], n_keys, call.causal, call.query_offset, call.window, str(call.query.device))
        if lasts and key in self._lasting:
            return self._lasting[key]
        geometry = row_geometry(
            positions=sample.index,
            n_keys=n_keys,
            causal=call.causal,
            query_offset=call.query_offset,
            own_keys=call.own_keys,
            window=call.window,
            keep=sample.keep,
            mask=call.mask if call.mask_mod is None else call.mask_rows,
            segments=call.segments,
            first_key=first,
        )
        if lasts:
            if len(self._lasting) >= 8:  # lengths that keep changing (decoding) would fill memory
                self._lasting.clear()
            self._lasting[key] = geometry
        return geometry

    def _tell_of_the_twin(self, call: AttentionCall) -> None:
        why = refusal(call.query, call.key)
        if why is not None and "twin" not in self._told and self._event is not None:
            self._told.add("twin")
            self._event(
                "info",
                "attention_by_twin",
                f"attention rows are reduced by torch operations instead of the Triton kernel, since {why}",
                layer=call.attention.name,
            )

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
                else f"what they compute cannot be told: {why}"
            )
            self._event(
                "warning",
                "attention_not_measured",
                f"{len(names)} of {len(self._attentions)} attention layers have no rows in `heads`: {reason}",
                layers=names,
            )
        silent = [a.name for a in self._attentions if a.index in self._seen and a.index not in self._normed]
        if silent and "output_norm" not in self._told:
            self._told.add("output_norm")
            self._event(
                "info",
                "output_norm_not_measured",
                f"{len(silent)} of {len(self._attentions)} attention layers have no `output_norm` in `heads`: their "
                "output projection was not found, or is not a plain matrix",
                layers=silent,
            )


def _mean(total: np.ndarray[Any, Any], count: np.ndarray[Any, Any]) -> np.ma.MaskedArray[Any, Any]:
    """The mean, masked where nothing was counted."""
    return np.ma.array(total / np.maximum(count, 1), mask=count == 0)


def _induction(call: AttentionCall, geometry: RowGeometry) -> Tensor | None:
    """(B, n), the sampled rows' induction keys; None where the keys are not the batch's tokens, one by one."""
    stack, batch_size, n_keys = call.attention.stack, call.query.shape[0], call.key.shape[2]
    if call.attention.kind != "self":
        return None
    tokens = call.forward.token_ids(stack, batch_size, n_keys)
    if tokens is None:
        return None
    real = call.forward.mask(stack, batch_size, n_keys)
    return induction_keys(tokens.to(geometry.own.device), geometry.own, segments=call.segments, real=real)
