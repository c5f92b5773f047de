"""`pathways`: stored edges against the model's own attention matrices, and a run that does not notice it."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from stored import events, rows
from tiny_models import LENGTH, batch, build

from lm_telemetry import TelemetryCallback, observe
from lm_telemetry.errors import SettingsError
from lm_telemetry.instruments.pathways import RESIDUAL, Pathways
from lm_telemetry.queries import connect

from .test_no_trace import assert_same, fingerprint, outcome, train

ALL = {"top": 4 * LENGTH, "beam": LENGTH}  # every edge of every head (the tiny models have four)


def captured(model, store, inputs, **own):
    """Rows of `edges` after one step with the probe `inputs`."""
    instruments = {"pathways": {"every": 1} | own}
    with observe(model, store=store, probe=inputs, every=1, instruments=instruments, strict=True) as s:
        model(**batch())
        s.step()
    return rows(store, "edges")


def into(edges):
    """Edges by (layer, sequence, query)."""
    found = defaultdict(list)
    for edge in edges:
        found[edge["layer"], edge["sequence"], edge["query_position"]].append(edge)
    return found


def attention_parts(name, model):
    """By layer: what makes its values (B, S, Hkv * D), its output map (Hq * D, width), and the norm before both."""
    if name == "gpt2":
        return [(lambda x, a=b.attn: a.c_attn(x)[..., 64:], b.attn.c_proj.weight, b.ln_1) for b in model.transformer.h]
    return [(b.self_attn.v_proj, b.self_attn.o_proj.weight.T, b.input_layernorm) for b in model.model.layers]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mistral"])
def test_edges_are_the_models_own(name, store):
    model = build(name).double().eval()
    inputs = batch(1, padding="right")
    edges = captured(model, store, inputs, sequences=2, **ALL)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert {(e["layer"], e["sequence"]) for e in edges} == {(layer, b) for layer in (0, 1) for b in (0, 1)}
    assert {max(e["query_position"] for e in edges if e["sequence"] == b) for b in (0, 1)} == {LENGTH - 1, LENGTH - 6}
    for layer, (values, write, norm) in enumerate(attention_parts(name, model)):
        stream = output.hidden_states[layer]
        with torch.no_grad():
            v = values(norm(stream)).unflatten(-1, (-1, 8)).transpose(1, 2)
            v = v.repeat_interleave(4 // v.shape[1], dim=1)
            flow = torch.stack([(v[:, h] @ write[8 * h : 8 * h + 8]).norm(dim=-1) for h in range(4)], dim=1)
        mass = output.attentions[layer]
        flow = mass * flow[:, :, None]
        for (at, b, i), group in into(edges).items():
            if at != layer:
                continue
            total = flow[b, :, i].sum() + stream[b, i].norm()
            assert math.fsum(e["share"] for e in group) == pytest.approx(1, abs=1e-6)
            assert len({(e["head"], e["key_position"]) for e in group}) == len(group)
            for e in group:
                if e["head"] == RESIDUAL:
                    assert (e["mass"], e["key_position"]) == (None, i)
                    expected = stream[b, i].norm().item()
                else:
                    where = (b, e["head"], i, e["key_position"])
                    assert e["mass"] == pytest.approx(mass[where].item(), abs=1e-6)
                    expected = flow[where].item()
                assert e["flow"] == pytest.approx(expected, rel=1e-5, abs=1e-7)
                assert e["share"] == pytest.approx(expected / total.item(), rel=1e-5, abs=1e-7)


def test_the_strongest_edges_of_what_the_targets_come_from(store, tmp_path):
    model = build("llama").eval()
    inputs = batch(1)
    whole = into(captured(model, str(tmp_path / "whole"), inputs, targets=LENGTH, **ALL))
    edges = captured(model, store, inputs, targets=3, top=2, beam=4)
    found = into(edges)
    assert {i for layer, _, i in found if layer == 1} == {7, 15, 23}
    arrived = defaultdict(float)
    for (layer, b, i), group in found.items():
        full = whole[layer, b, i]
        strongest = sorted((e for e in full if e["head"] != RESIDUAL), key=lambda e: -e["flow"])[:2]
        own = [e for e in full if e["head"] == RESIDUAL]
        assert sorted((e["head"], e["key_position"]) for e in group) == sorted(
            (e["head"], e["key_position"]) for e in own + strongest
        )
        shares = {(e["head"], e["key_position"]): e["share"] for e in full}
        for e in group:
            assert e["share"] == pytest.approx(shares[e["head"], e["key_position"]], rel=1e-5)
        for e in group if layer == 1 else ():
            arrived[e["key_position"]] += e["share"]
    followed = sorted(arrived, key=lambda position: (-arrived[position], position))[:4]
    assert {i for layer, _, i in found if layer == 0} == set(followed)


def test_all_routes_to_a_target_sum_to_one(store):
    """Two tokens, four heads, two layers: 5 + 4 edges a layer into the second token, 5 into the first."""
    captured(build("llama").eval(), store, batch(1, length=2), targets=1, **ALL)
    found = connect(store).execute("SELECT sum(share), count(*), min(n_hops), max(n_hops) FROM pathways").fetchone()
    assert found == (pytest.approx(1, abs=1e-6), 5 * 9 + 4 * 5, 0, 2)


@pytest.mark.parametrize("name", ["gpt_neox", "gemma2", "bert", "lora", "t5"])
def test_other_models(name, store):
    edges = captured(build(name).eval(), store, batch(), targets=2, top=3)
    stacks = {"encoder", "decoder"} if name == "t5" else {"encoder"} if name == "bert" else {"decoder"}
    assert {(e["stack"], e["layer"]) for e in edges} == {(s, layer) for s in stacks for layer in (0, 1)}
    for group in into([e for e in edges if e["stack"] == max(stacks)]).values():
        assert len(group) == 4
        assert 0 < math.fsum(e["share"] for e in group) < 1 + 1e-6
    assert not events(store, "pathways_not_measured")


def test_what_cannot_be_measured_is_told(store, tmp_path):
    assert captured(build("bloom").eval(), store, batch()) == []
    (event,) = events(store, "pathways_not_measured")
    assert "2 of 2 self-attention layers" in event["message"]

    model = build("llama").eval()
    model.model.layers[0].self_attn.o_proj = Opaque(model.model.layers[0].self_attn.o_proj)
    elsewhere = str(tmp_path / "opaque")
    assert {e["layer"] for e in captured(model, elsewhere, batch())} == {1}
    assert "1 of 2 self-attention layers" in events(elsewhere, "pathways_not_measured")[0]["message"]


class Opaque(torch.nn.Linear):
    """A projection whose weight is not told."""

    def __init__(self, inner):
        super().__init__(inner.in_features, inner.out_features, bias=False)
        self.inner = inner
        self.weight = None

    def forward(self, x):
        return self.inner(x)


def test_flows_that_are_not_finite_have_no_share(store):
    model = build("llama").eval()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0] = torch.nan
    edges = captured(model, store, batch(), targets=2)
    assert {(e["layer"], e["head"], e["share"]) for e in edges} == {(1, RESIDUAL, None)}
    assert "2 positions" in events(store, "pathways_not_measured")[0]["message"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_training_is_bit_identical(tmp_path, store, name):
    """Also where the agent's own taps are on the same modules: they see every step before and after."""
    instruments = {"pathways": {"every": 2, "sequences": 2}, "attention": {}, "activations": {}}
    callback = TelemetryCallback(store=store, every=1, instruments=instruments, strict=True)
    assert_same(outcome(train(tmp_path, name)), outcome(train(tmp_path, name, callback)))
    assert {r["step"] for r in rows(store, "edges")} == {1, 2, 4}
    assert {r["step"] for r in rows(store, "heads")} == {1, 2, 3, 4, 5}
    assert not [e for e in events(store) if e["severity"] != "info"]


def test_the_model_is_left_as_it_was(store):
    model = build("llama").train()
    model(**batch()).loss.backward()
    before = fingerprint(model)
    captured(model, store, batch(1))
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("setting", [{"targets": 0}, {"top": 0}, {"sequences": 1.5}, {"beam": 3}, {"depth": 2}])
def test_settings_are_checked(setting):
    with pytest.raises(SettingsError, match=r"instruments\.pathways"):
        Pathways.build(**setting)


def test_a_probe_that_cannot_be_cut_is_told(store):
    inputs = batch() | {"position_ids": torch.arange(LENGTH)[None].expand(3, -1)}
    assert captured(build("llama").eval(), store, inputs) == []
    assert "`position_ids`" in events(store, "pathways_not_measured")[0]["message"]
