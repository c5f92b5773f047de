"""`pathways`: along which edges does what stands at the end of a frozen sentence come from its beginning?

Fills `edges`, the sparse graph that the view `pathways` walks. One forward pass of the first sequences of the probe, in
eval mode, shows each self-attention layer's queries, keys and values and the stream x that enters its block. An edge of
head h from key j to query i, and the residual edge by which a position passes the layer, have the flows

    mass_hij |W_O^h v_hj|        and        |x_i|

in the unit of the stream: attention alone would count much mass on keys that say nothing (2004.10102). An edge's share
is its flow over the sum of all flows into (layer, i), of every head and key and of the stream, so that the shares of
what is stored never exceed 1. The product of shares along a route says how much of the target it explains, as attention
rollout does (2005.00928), here by head and with measured writes.

Decisions:

- Only the neighbourhood of a few targets is kept: evenly spaced positions of the last layer, the last real token always
  among them. Going down, each position keeps its `top` edges over all heads and keys and its residual edge; the
  positions these come from are the next layer's, at most `beam`, those to which the largest share leads, summed over
  routes and targets. Routes to a position that the beam drops end there.
- A layer that cannot be measured (attention that is not reached, an output projection that is no plain dense matrix) is
  left out with an event. Its positions then pass it as if nothing moved between them.
- The write is what leaves the projection: a norm or multiplier after it, and gates before it, are not applied. MLPs
  stay in their position and are part of the residual edge.
- A position whose flows are not finite gets a residual edge without a share, and an event.
- Everything is decided on the host, one copy a layer: this is for rare captures.
- The tokens of the sequences go into `probe` with the first capture: ids, and what they spell (`probe_tokens`).

Left out: cross-attention (encoder and decoder are separate graphs), the sequences of the probe beyond `sequences`, and
stacks whose batch is not the sequences (image towers). Memory is O(S d) a layer for queries and keys.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lm_telemetry.catalogue import Cost
from lm_telemetry.hooks.activation_taps import Activation, ActivationTaps
from lm_telemetry.hooks.attention_tap import MARK, AttentionTap
from lm_telemetry.hooks.forward_pass import ForwardPass
from lm_telemetry.hooks.head_writes import write_norms
from lm_telemetry.hooks.preserve import evaluating
from lm_telemetry.hooks.topology import text_config
from lm_telemetry.instruments.base import Harvest
from lm_telemetry.instruments.probing import Probing, Row
from lm_telemetry.kernels.attention_edges import attention_edges_at
from lm_telemetry.kernels.attention_rows_geometry import four_axes, row_geometry, rows_of
from lm_telemetry.probe_tokens import speller, token_tables, tokens_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np

    from lm_telemetry.hooks.attention_call import AttentionCall
    from lm_telemetry.hooks.probe import Probe
    from lm_telemetry.hooks.topology import Topology
    from lm_telemetry.instruments.base import Attachment, Columns
    from lm_telemetry.probe_tokens import Spell

RESIDUAL = -1
"""The head that stands for the residual stream."""


@dataclass(kw_only=True)
class Pathways(Probing):
    """The sampled attention graph of the probe."""

    name: ClassVar[str] = "pathways"
    tables: ClassVar[tuple[str, ...]] = ("edges", "probe")
    cost: ClassVar[Cost] = Cost.FORWARD
    usual_every: ClassVar[int | None] = 500

    targets: int = 4
    """Positions of the last layer that routes are traced back from, in each sequence."""

    top: int = 4
    """Edges kept into each position of each layer, besides the residual one."""

    beam: int = 32
    """Positions of a layer that are followed at most."""

    sequences: int = 1
    """Sequences of the probe that are looked at."""

    text: bool = True
    """Whether the text of the probe's tokens is stored. Unless a probe was given, that is training data: where a store
    must not hold any in the clear, set this to False. The ids are stored all the same, which the tokenizer can read."""

    _spell: Spell | None = field(default=None, init=False, repr=False, compare=False)
    _tokens: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _first: bool = field(default=True, init=False, repr=False, compare=False)
    _told: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("targets", "top", "sequences"):
            value = getattr(self, name)
            self.require(name, type(value) is int and value >= 1, "at least 1")
        self.require("beam", type(self.beam) is int and self.beam >= self.targets, f"at least {self.targets} targets")
        self.require("text", isinstance(self.text, bool), "True or False")

    def attach(self, attachment: Attachment) -> None:
        """Keep the way to the model, the probe and what spells its tokens."""
        super().attach(attachment)
        vocab_size = getattr(text_config(attachment.model), "vocab_size", None)
        self._spell = speller(attachment.tokenizer, vocab_size) if self.text else None
        self._first = True
        self._told = set()

    def after_update(self) -> None:
        """The optimizer does not matter here."""

    def estimate(self, attachment: Attachment, step: int) -> list[Row]:
        """One forward pass, then the edges of every stack, from its last layer down."""
        topology = attachment.topology
        probe = attachment.probe.first(self.sequences)
        n = probe.n_sequences
        forward = ForwardPass(probe.batch, is_encoder_decoder=topology.is_encoder_decoder)
        seen = _observe(attachment.model, topology, probe, forward)
        self._tell_of_missing(attachment, seen)
        self._tokens = {}
        rows: list[Row] = []
        for stack in topology.stacks:
            layers = [layer for _, layer in sorted(seen.layers.items(), reverse=True) if layer.stack == stack]
            if layers and len(layers[0].call.query) == n:
                query = layers[0].call.query
                tokens = tokens_of(forward, stack, n, query.shape[2]) if self._first else None
                if tokens is not None:
                    self._tokens[stack] = tokens
                sample = forward.queries(stack, n, query.shape[2], self.targets, query.device)
                index = sample.index.expand(n, -1)
                keep = torch.ones_like(index, dtype=torch.bool) if sample.keep is None else sample.keep.expand(n, -1)
                for sequence in range(n):
                    rows += self._walk(layers, sequence, index[sequence][keep[sequence]].tolist())
        unknown = sum(row["share"] is None for row in rows)
        if unknown:
            attachment.event(
                "warning",
                "pathways_not_measured",
                f"{unknown} positions have flows that are not finite, or all 0: their edges have no shares, and routes "
                "end there",
            )
        return rows

    def harvest(self) -> Harvest | None:
        """Hand over the rows, the first time with the tokens."""
        captured = super().harvest()
        tokens, self._tokens = self._tokens, {}
        if captured is None:
            return None
        self._first = False
        return Harvest(tensors=tokens, note=(captured.note, self._spell))

    def rows(self, host: Mapping[str, np.ndarray[Any, Any]], note: Any) -> Mapping[str, Columns]:
        """The edges as columns, and the tokens if they are there."""
        edges, spell = note
        return {**super().rows(host, edges), **token_tables(host, spell)}

    def detach(self) -> None:
        """Let go of the model and the tokenizer."""
        super().detach()
        self._spell = None

    def _walk(self, layers: Sequence[_Layer], sequence: int, targets: Sequence[int]) -> Iterator[Row]:
        """Rows of one sequence, from its targets at the first of `layers`, which is the model's last, down."""
        followed = dict.fromkeys(targets, 1.0)
        for layer in layers:
            reached: dict[int, float] = {}
            for edge in layer.edges_into(sorted(followed), sequence, self.top):
                yield edge
                key, share = edge["key_position"], edge["share"]
                if share is not None and key >= 0:  # keys before the sequence (prefix tuning) are no queries
                    reached[key] = reached.get(key, 0.0) + share * followed[edge["query_position"]]
            followed = dict(sorted(reached.items(), key=lambda item: (-item[1], item[0]))[: self.beam])
            if not followed:
                return

    def _tell_of_missing(self, attachment: Attachment, seen: _Seen) -> None:
        own = [a for a in attachment.topology.attentions if a.kind == "self"]
        missing = {
            a.name: seen.refused.get(a.index, "their attention is not reached")
            for a in own
            if (a.stack, a.layer) not in seen.layers
        }
        for why in sorted(set(missing.values()) - self._told):
            self._told.add(why)
            names = [name for name, reason in missing.items() if reason == why]
            attachment.event(
                "warning",
                "pathways_not_measured",
                f"{len(names)} of {len(own)} self-attention layers are left out of `edges`, and routes pass them "
                f"without moving: {why}",
                layers=names,
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Layer:
    """What is kept of a layer.

    Attributes:
        stack: name of its stack.
        layer: index of its block.
        call: its self-attention's call.
        writes: (B, Hq, Sk) float32, norm of what each head writes for each key at mass 1.
        stream: (B, S) float32, norm of the stream that enters the block.
    """

    stack: str
    layer: int
    call: AttentionCall
    writes: Tensor
    stream: Tensor

    def edges_into(self, positions: Sequence[int], sequence: int, top: int) -> Iterator[Row]:
        """Rows of the residual edge and the `top` strongest edges into each of the positions of a sequence."""
        call, k = self.call, min(top, self.call.key.shape[2])
        part = slice(sequence, sequence + 1)

        def of(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or len(tensor) == 1 else tensor[part]

        at = torch.tensor([positions], device=call.query.device)
        bias = None if call.bias is None else of(four_axes(call.bias))
        # The queries of these positions as a call of their own, so that no mask is seen beyond its rows.
        geometry = row_geometry(
            positions=torch.arange(len(positions), device=at.device),
            n_keys=call.key.shape[2],
            causal=call.causal,
            own_keys=at + call.query_offset,
            window=call.window,
            mask=of(call.mask_rows(at)),
            segments=of(call.segments),
        )
        found = attention_edges_at(
            rows_of(call.query[part], at),
            call.key[part],
            self.writes[part],
            geometry,
            k=k,
            scale=call.scale,
            bias=bias if bias is None or bias.shape[2] == 1 else rows_of(bias, at),
            softcap=call.softcap,
            sinks=call.sinks,
        )
        # Over all heads, (n, Hq * k): no more than `top` of one head can be among the strongest.
        keys, masses, flows = (t[0].transpose(0, 1).flatten(1) for t in (found.keys, found.mass, found.flow))
        best = flows.nan_to_num(nan=-1.0).topk(min(top, flows.shape[1])).indices
        chosen = torch.stack([best // k, *(t.gather(1, best).double() for t in (keys, masses, flows))], dim=-1)
        stream = self.stream[sequence, at[0]].double()
        total = found.total_flow[0].double().sum(0) + stream
        host = zip(positions, stream.tolist(), total.tolist(), chosen.tolist(), strict=True)
        base = {"stack": self.stack, "layer": self.layer, "sequence": sequence}
        for position, norm, all_flows, edges in host:
            known = 0 < all_flows < float("inf")  # False of NaN
            into = base | {"query_position": position}
            residual = {"head": RESIDUAL, "key_position": position, "mass": None, "flow": norm}
            yield into | residual | {"share": norm / all_flows if known else None}
            for head, key, mass, flow in edges if known else ():
                if key >= 0:
                    ends = {"head": int(head), "key_position": int(key) - call.query_offset}
                    yield into | ends | {"mass": mass, "flow": flow, "share": flow / all_flows}


class _Seen:
    """What one forward pass shows."""

    def __init__(self) -> None:
        self.layers: dict[tuple[str, int], _Layer] = {}
        self.refused: dict[int, str] = {}
        self._entering: dict[tuple[str, int], Tensor] = {}

    def activation(self, activation: Activation) -> None:
        """What leaves a block enters the next."""
        site = activation.site
        if site.site in {"embed", "resid"}:
            norms = torch.linalg.vector_norm(activation.hidden.float(), dim=-1)
            self._entering[site.stack, site.layer + 1] = norms

    def attention(self, call: AttentionCall) -> None:
        """Keep a layer's queries and keys, and the norms of its writes."""
        attention, heads = call.attention, call.query.shape[1]
        if attention.kind == "cross":
            return
        stream = self._entering.get((attention.stack, attention.layer))
        repeated = call.value.repeat_interleave(heads // call.value.shape[1], dim=1)
        output = attention.output
        norms = None if output is None else write_norms(repeated.transpose(1, 2).flatten(2), output, heads, index=None)
        why = call.unsupported and f"what it computes cannot be told: {call.unsupported}"
        if call.own_keys is not None:
            why = "their keys are not in the order of the tokens"
        if norms is None:
            why = "their output projection is no plain dense matrix"
        if stream is None or norms is None or why is not None:
            self.refused[attention.index] = why or "the stream that enters them is not seen"
            return
        batch, _, n_keys, _ = call.key.shape
        self.layers[attention.stack, attention.layer] = _Layer(
            stack=attention.stack,
            layer=attention.layer,
            call=call,
            writes=norms.float().view(batch, n_keys, heads).transpose(1, 2),
            stream=stream.reshape(batch, -1),
        )


def _observe(model: torch.nn.Module, topology: Topology, probe: Probe, forward: ForwardPass) -> _Seen:
    """Run the model once, beside any taps that are on it already, and leave nothing behind."""
    seen = _Seen()
    activations = ActivationTaps(topology, seen.activation, lambda _: nullcontext())
    attentions = AttentionTap(topology, seen.attention, lambda _: nullcontext())
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_marks_kept(topology))
        stack.callback(activations.remove)
        stack.callback(attentions.remove)
        activations.install(heads=False)
        attentions.install()
        activations.arm(forward, heads=False)
        attentions.arm(forward)
        probe.forward(model)
    return seen


@contextmanager
def _marks_kept(topology: Topology) -> Iterator[None]:
    """Put back the marks of the attention tap that is on the model; a module can carry one at a time."""
    modules = [module for attention in topology.attentions for module in attention.modules]
    kept = [(module, module.__dict__[MARK]) for module in modules if MARK in module.__dict__]
    try:
        yield
    finally:
        for module, mark in kept:
            module.__dict__[MARK] = mark
