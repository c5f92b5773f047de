"""Row statistics of attention calls as the tap describes them, and what they must be by the full probability matrices.

The matrices are those of an eager forward over all tokens at once, without a cache, so that they know nothing of how
keys lay in one: row t, column j is what token t gave to token j.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch

from lm_telemetry.hooks.attention_tap import AttentionTap
from lm_telemetry.hooks.forward_pass import ForwardPass
from lm_telemetry.hooks.outer import OuterTap
from lm_telemetry.hooks.topology import discover
from lm_telemetry.kernels.attention_rows import RAW_COLUMNS, attention_rows_at, row_geometry

RELATIVE, ABSOLUTE = 2e-5, 1e-6  # the observed forward is float32; masses of 1e-2 lose some digits


class Seen:
    """One attention call: where, and the means of its rows' statistics by head."""

    def __init__(self, call):
        self.stack, self.layer, self.kind = call.attention.stack, call.attention.layer, call.attention.kind
        self.unsupported = call.unsupported
        self.n_queries, self.n_keys = call.query.shape[2], call.key.shape[2]
        self.heads = {} if call.unsupported else means(call)


def means(call):
    """Means over all real queries, by head."""
    batch, _, n_queries, _ = call.query.shape
    stack, n_keys = call.attention.stack, call.key.shape[2]
    sample = call.forward.queries(stack, batch, n_queries, None, call.query.device)
    geometry = row_geometry(
        positions=sample.index,
        keep=sample.keep,
        n_keys=n_keys,
        causal=call.causal,
        query_offset=call.query_offset,
        own_keys=call.own_keys,
        window=call.window,
        mask=call.mask_rows(torch.arange(n_queries)),
        segments=call.segments,
        first_key=call.forward.first_token(stack, batch, n_keys) if call.attention.kind == "self" else None,
    )
    raw = attention_rows_at(
        call.query, call.key, geometry, scale=call.scale, bias=call.bias, softcap=call.softcap, sinks=call.sinks
    )
    raw = dict(zip(RAW_COLUMNS, raw.T, strict=True))
    found = {name: raw[name] / raw["n_queries"] for name in COMPARED}
    return {"n_queries": raw["n_queries"], **found}


@contextmanager
def attention_seen(model, *, is_encoder_decoder=False):
    """A list that gets the attention calls of each forward pass, in a list of its own."""
    passes = []
    tap = AttentionTap(discover(model), lambda call: passes[-1].append(Seen(call)), lambda _: nullcontext())

    def begin(batch):
        passes.append([])
        tap.arm(ForwardPass(batch, is_encoder_decoder=is_encoder_decoder))

    outer = OuterTap(model, model, begin, lambda _: tap.silence())
    tap.install()
    outer.install()
    try:
        yield passes
    finally:
        outer.remove()
        tap.remove()


@torch.no_grad()
def matrices(model, double=True, **inputs):
    """Output of an eager twin with all attention matrices, in fp64 unless there is left padding.

    There, rows that see nothing are NaN in transformers' fp64 eager path (its softmax is float32, its mask fp64's
    minimum); the float32 one is right to 1e-7.
    """
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    if hasattr(twin.config, "num_local_experts") or hasattr(twin.config, "num_experts"):
        twin.set_experts_implementation("eager")  # the grouped product knows no fp64
    if double:
        twin = twin.double()
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return twin(**inputs, output_attentions=True, use_cache=False)


COMPARED = (
    "entropy",
    "top1_mass",
    "effective_keys",
    "sink_mass",
    "prev_token_mass",
    "local_mass",
    "mean_distance",
)


def expected(probabilities, *, rows, real, first=None, slot=False):
    """Means by head, from matrices (B, H, S, K) of all tokens, over the rows (B, n) of tokens `rows` that are `real`.

    `first` (B,) or (B, S) is the first key of each sequence, or of each token's; `slot` says that the rest of a row's
    probability went to an attention-sink logit.
    """
    p = probabilities.double()
    batch, heads, length, n_keys = p.shape
    offset = torch.arange(length)[:, None] - torch.arange(n_keys)[None, :]
    first = torch.zeros(batch, dtype=torch.int64) if first is None else first
    first = first[:, None].expand(batch, length) if first.ndim == 1 else first
    sink = p.gather(-1, first[:, None, :, None].expand(-1, heads, -1, 1))[..., 0]
    rest = 1 - p.sum(-1) if slot else torch.zeros_like(sink)
    per_row = {
        "entropy": -torch.special.xlogy(p, p).sum(-1) - torch.special.xlogy(rest, rest),
        "top1_mass": torch.maximum(p.amax(-1), rest),
        "effective_keys": 1 / ((p**2).sum(-1) + rest**2),
        "sink_mass": sink + rest,
        "prev_token_mass": (p * (offset == 1)).sum(-1),
        "local_mass": (p * (offset.abs() < 16)).sum(-1),
        "mean_distance": (p * offset.abs()).sum(-1),
    }
    chosen = torch.zeros(batch, length, dtype=torch.bool)
    chosen[:, rows] = True
    chosen &= real
    return {
        "n_queries": chosen.sum().expand(heads),
        **{name: torch.stack([v[:, h][chosen].mean() for h in range(heads)]) for name, v in per_row.items()},
    }


def assert_same(seen, wanted, about=""):
    """Compares one call's heads with `expected`."""
    assert seen.unsupported is None, about
    for name, values in wanted.items():
        found = seen.heads[name].double().tolist()
        assert found == pytest.approx(values.double().tolist(), rel=RELATIVE, abs=ABSOLUTE), (name, about)
