"""`key_mass` of real models equals what the full attention matrices of an eager fp64 forward say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import transformers as hf
from attention_witness import matrices
from stored import events, rows
from tiny_models import BATCH, LENGTH, VOCAB, batch, build

from lm_telemetry import observe
from lm_telemetry.errors import SettingsError
from lm_telemetry.hooks.attention_tap import AttentionTap
from lm_telemetry.hooks.forward_pass import ForwardPass
from lm_telemetry.hooks.mask_mod import MaskMod
from lm_telemetry.instruments import key_mass
from lm_telemetry.instruments.key_mass import KeyMass

RELATIVE = 3e-5  # the observed forward is float32, the reference float64
CASES = [
    ("llama", None),
    ("llama", "left"),
    ("gpt2", "right"),
    ("mistral", "left"),  # a sliding window
    ("gemma2", "right"),  # a softcap
    ("bert", "right"),
    ("t5", "right"),  # position bias; encoder, decoder and cross-attention
    ("lora", None),
]


def observed(model, inputs, store, **settings):
    with observe(
        model, store=store, every=1, strict=True, instruments={"key_mass": {"every": 1, **settings}}
    ) as session:
        model(**inputs)
        session.step()
    return rows(store, "key_mass")


def expected(p, queries, keys, top):
    """Columns of one head by their definitions, from its matrices (B, S, K), real queries (B, S) and keys (B, K)."""
    masses = [(p[b] * queries[b][:, None]).sum(0)[keys[b]].tolist() for b in range(len(p))]
    everything = [m for one in masses for m in one]
    ginis = [sum(abs(a - b) for a in x for b in x) / (2 * len(x) * sum(x)) for x in masses]
    heavy = [sum(sorted(x)[-math.ceil(len(x) / 10) :]) / sum(x) for x in masses]
    first = torch.tensor(masses[0]).topk(min(top, len(masses[0])))
    return {
        "n_sequences": len(p),
        "n_keys": len(everything),
        "mean_mass": sum(everything) / len(everything),
        "max_mass": max(everything),
        "gini": sum(ginis) / len(ginis),
        "heavy_share": sum(heavy) / len(heavy),
        "nonfinite": 0,
        "top_positions": keys[0].nonzero().flatten()[first.indices].tolist(),
        "top_mass": first.values.tolist(),
    }


def assert_rows(found, matrices_of_layers, queries, keys, top=16):
    """`found` has one row for each head of each layer, as expected."""
    assert len(found) == sum(p.shape[1] for p in matrices_of_layers)
    for row in found:
        p = matrices_of_layers[row["layer"]].double()[:, row["head"]]
        p = p[: len(queries)].nan_to_num()
        for column, value in expected(p, queries, keys, top).items():
            assert row[column] == pytest.approx(value, rel=RELATIVE, abs=1e-6), (row["layer"], row["head"], column)


@pytest.mark.parametrize(("name", "padding"), CASES)
def test_rows_equal_those_of_the_full_matrices(name, padding, store):
    model = build(name).eval()
    inputs = batch(padding=padding)
    if name == "t5":
        inputs["labels"] = inputs["labels"].clamp(min=0)
    found = observed(model, inputs, store, sequences=BATCH)
    full = matrices(model, double=padding != "left", **inputs)
    real = inputs.get("attention_mask", torch.ones(BATCH, LENGTH)).bool()
    if name != "t5":
        assert_rows(found, full.attentions, real, real)
        return
    every = torch.ones_like(real)
    towers = {
        ("encoder", "self"): (full.encoder_attentions, real, real),
        ("decoder", "self"): (full.decoder_attentions, every, every),
        ("decoder", "cross"): (full.cross_attentions, every, real),
    }
    for (stack, kind), wanted in towers.items():
        assert_rows([r for r in found if (r["stack"], r["kind"]) == (stack, kind)], *wanted)
    assert {(r["stack"], r["kind"]) for r in found} == set(towers)


def test_one_sequence_and_few_keys_are_the_users_to_choose(store):
    model, inputs = build("llama").eval(), batch()
    found = observed(model, inputs, store, top=3)
    real = torch.ones(1, LENGTH, dtype=torch.bool)
    assert_rows(found, matrices(model, **inputs).attentions, real, real, top=3)


def test_attention_sinks_take_their_part(store):
    torch.manual_seed(0)
    model = hf.GptOssForCausalLM(
        hf.GptOssConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=2,
            num_experts_per_tok=1,
            sliding_window=8,
            pad_token_id=0,
        )
    ).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_(mean=2.0)
    inputs = batch()
    found = observed(model, inputs, store, sequences=BATCH)
    real = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    assert_rows(found, matrices(model, double=False, **inputs).attentions, real, real)  # experts have no fp64 product
    assert all(r["mean_mass"] < 0.9 for r in found)


def test_packed_sequences_keep_to_themselves(store):
    model, inputs = build("llama").eval(), batch()
    inputs["position_ids"] = torch.cat((torch.arange(10), torch.arange(LENGTH - 10)))[None].expand(BATCH, -1)
    model.config.use_cache = False  # with a cache, positions that start again are no packing
    found = observed(model, inputs, store, sequences=BATCH)
    real = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    full = matrices(model, **inputs).attentions
    assert full[0][:, :, 10:, :10].abs().max() == 0
    assert_rows(found, full, real, real)


def test_decoding_counts_the_queries_of_each_pass(store):
    model = build("llama").eval()
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with observe(model, store=store, every=1, strict=True, instruments={"key_mass": {"every": 1}}) as session:
        model.generate(batch()["input_ids"], **settings)
        assert session.flush()
    found = rows(store, "key_mass", layer=0, head=0)
    assert [r["n_keys"] for r in found] == [LENGTH, LENGTH + 1, LENGTH + 2]
    assert [r["n_keys"] * r["mean_mass"] for r in found] == pytest.approx([LENGTH, 1, 1])


def test_nothing_is_invented_where_all_is_broken(store):
    model = build("llama").eval()
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.fill_(torch.nan)
    found = observed(model, batch(), store)
    for row in [r for r in found if r["layer"] == 1]:
        assert row["nonfinite"] == LENGTH
        assert row["n_sequences"] == row["n_keys"] == 0
        assert [row[c] for c in ("mean_mass", "max_mass", "gini", "heavy_share")] == [None] * 4
    assert {r["nonfinite"] for r in found if r["layer"] == 0} == {0}


def test_attention_that_is_not_reached_is_told_once(store):
    model = build("bloom").eval()
    with observe(model, store=store, every=1, strict=True, instruments={"key_mass": {"every": 1}}) as session:
        for seed in range(2):
            model(**batch(seed))
            session.step()
    assert rows(store, "key_mass") == []
    (told,) = events(store, "key_mass_not_measured")
    assert "2 of 2 attention layers" in told["message"]


def test_a_mask_that_is_a_function_is_taken_a_few_queries_at_a_time(monkeypatch, store):
    """As FlexAttention has them; the result is that of the same mask as a tensor."""
    monkeypatch.setattr(key_mass, "_QUERIES", 7)
    see = AttentionTap.see

    def as_function(tap, attention, implementation, arguments):
        listener = tap._listener

        def retell(call):
            mod = MaskMod(function=lambda b, h, i, j: i - j < 9, batch=1, heads=1, n_keys=LENGTH)
            listener(replace(call, mask_mod=mod))

        monkeypatch.setattr(tap, "_listener", retell)
        see(tap, attention, implementation, arguments)
        monkeypatch.setattr(tap, "_listener", listener)

    model, inputs = build("llama").eval(), batch()
    monkeypatch.setattr(AttentionTap, "see", as_function)
    found = observed(model, inputs, store)
    monkeypatch.setattr(AttentionTap, "see", see)
    away = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    with observe(
        model, store=f"{store}-again", every=1, strict=True, instruments={"key_mass": {"every": 1}}
    ) as session:
        inputs["attention_mask"] = ((away >= 0) & (away < 9))[None, None].expand(BATCH, 1, -1, -1)
        model(**inputs)
        session.step()
    again = [r for r in rows(f"{store}-again", "key_mass") if r["layer"] == 0]
    assert len(again) == 4
    for row, wanted in zip([r for r in found if r["layer"] == 0], again, strict=True):
        for column in ("n_keys", "mean_mass", "max_mass", "gini", "heavy_share", "top_positions", "top_mass"):
            assert row[column] == pytest.approx(wanted[column], rel=1e-5)


@pytest.mark.parametrize("settings", [{"sequences": 0}, {"sequences": 1.5}, {"top": 0}, {"every": 0}])
def test_settings_are_checked(settings):
    with pytest.raises(SettingsError, match=r"instruments\.key_mass\."):
        KeyMass.build(**settings)


def test_usual_settings():
    instrument = KeyMass.build()
    assert (instrument.sequences, instrument.top, instrument.usual_every) == (1, 16, 100)
    assert ForwardPass({}).mask("decoder", 1, 4) is None
