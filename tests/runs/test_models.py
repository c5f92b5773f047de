"""Every architecture works unchanged, and its numbers equal those of an fp64 eager forward that returns everything."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from stored import events, rows
from tiny_models import BUILDERS, REACHED, batch, build, gpt2

from lm_telemetry import observe

EXACT = {"activations": {"tokens": None}, "attention": {"queries": None}}
RELATIVE = 2e-5  # the observed forward is float32, the reference float64; masses of 1e-2 lose some digits
PADDINGS = {
    "llama": (None, "left", "right"),
    "gpt2": (None, "left", "right"),
    "mistral": (None, "left"),
    "gemma2": (None, "right"),
    "bert": (None, "right"),
    "t5": (None, "right"),
}


def observed(model, inputs, store, **settings):
    with observe(model, store=store, every=1, strict=True, **settings) as session:
        output = model(**inputs)
        session.step()
    return output


def reference(model, inputs):
    """An eager forward with all attention and hidden states, in fp64 where there is no left padding.

    There, rows that see nothing are NaN in transformers' fp64 eager path (its softmax is float32, its mask fp64's
    minimum); the float32 one is right to 1e-7.
    """
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    if "attention_mask" not in inputs or bool(inputs["attention_mask"][:, 0].all()):
        twin = twin.double()
    return twin(**inputs, output_attentions=True, output_hidden_states=True)


def padding_mask(inputs, stack="decoder", name=""):
    if name == "t5" and stack == "decoder":
        return torch.ones_like(inputs["labels"]).bool()
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]).bool() if mask is None else mask.bool()


@pytest.mark.parametrize(("name", "padding"), [(n, p) for n in REACHED for p in PADDINGS.get(n, (None,))])
def test_attention_rows_equal_those_of_the_full_matrices(name, padding, store):
    model = build(name).eval()
    inputs = batch(padding=padding)
    if name == "t5":
        inputs["labels"] = inputs["labels"].clamp(min=0)
    observed(model, inputs, store, instruments=EXACT)
    full = reference(model, inputs)
    found = rows(store, "heads")
    towers = {"self": full.attentions} if name != "t5" else {
        "encoder": full.encoder_attentions,
        "decoder": full.decoder_attentions,
        "cross": full.cross_attentions,
    }  # fmt: skip
    for tower, matrices in towers.items():
        for layer, probabilities in enumerate(matrices):
            if tower == "self":
                mine = [r for r in found if r["layer"] == layer]
            elif tower == "cross":
                mine = [r for r in found if r["layer"] == layer and r["kind"] == "cross"]
            else:
                mine = [r for r in found if r["layer"] == layer and r["stack"] == tower and r["kind"] == "self"]
            stack = mine[0]["stack"]
            keep = padding_mask(inputs, stack, name)
            keys = padding_mask(inputs, "encoder", name) if tower == "cross" else keep
            assert len(mine) == probabilities.shape[1]
            for row in mine:
                expected = statistics(
                    probabilities.detach().double()[:, row["head"]], keep, keys, cross=tower == "cross"
                )
                assert row["n_queries"] == int(keep.sum())
                for column, value in expected.items():
                    assert row[column] == pytest.approx(value, rel=RELATIVE, abs=1e-6), (tower, layer, column)


def statistics(p, queries, keys, *, cross):
    """Means over real queries of what the catalogue defines, from the full matrix (B, S, K) in fp64."""
    positions = torch.arange(p.shape[1])[:, None]
    distance = (positions - torch.arange(p.shape[2])[None, :]).abs()
    back = (positions - torch.arange(p.shape[2])[None, :]) == 1
    first = torch.zeros(p.shape[0], dtype=torch.int64) if cross else keys.int().argmax(1)
    sink = torch.stack([p[b, :, first[b]] for b in range(p.shape[0])])
    per_row = {
        "entropy": -torch.special.xlogy(p, p).sum(-1),
        "top1_mass": p.amax(-1),
        "effective_keys": 1 / (p**2).sum(-1),
        "sink_mass": sink,
        "prev_token_mass": (p * back).sum(-1),
        "local_mass": (p * (distance < 16)).sum(-1),
        "mean_distance": (p * distance).sum(-1),
    }
    return {name: float(value[queries].mean()) for name, value in per_row.items()}


@pytest.mark.parametrize(("name", "padding"), [(n, p) for n in BUILDERS for p in PADDINGS.get(n, (None,))])
def test_moments_equal_those_of_the_hidden_states(name, padding, store):
    model = build(name).eval()
    inputs = batch(padding=padding)
    if name == "t5":
        inputs["labels"] = inputs["labels"].clamp(min=0)
    observed(model, inputs, store, instruments=EXACT)
    full = copy.deepcopy(model).double()(**inputs, output_hidden_states=True)
    towers = {"self": full.hidden_states} if name != "t5" else {
        "encoder": full.encoder_hidden_states,
        "decoder": full.decoder_hidden_states,
    }  # fmt: skip
    found = rows(store, "layers")
    for tower, states in towers.items():
        mine = {(r["layer"], r["site"]): r for r in found if tower in {"self", r["stack"]}}
        keep = padding_mask(inputs, tower, name)
        last = len(states) - 1
        sites = {(-1, "embed"): states[0], (last, "final"): states[-1]}
        sites |= {(layer, "resid"): states[layer + 1] for layer in range(last - 1)}
        for place, hidden in sites.items():
            values = hidden[keep].detach().double().numpy()
            row = mine[place]
            spread = values.std()
            assert row["n_tokens"] == int(keep.sum())
            assert row["mean"] == pytest.approx(values.mean(), abs=1e-5 * spread + 1e-6)
            assert row["std"] == pytest.approx(spread, rel=RELATIVE)
            assert row["rms"] == pytest.approx(np.sqrt((values**2).mean()), rel=RELATIVE)
            assert row["absmax"] == pytest.approx(np.abs(values).max(), rel=RELATIVE)
            kurtosis = ((values - values.mean()) ** 4).mean() / spread**4
            assert row["kurtosis"] == pytest.approx(kurtosis, rel=1e-4)
            assert row["nonfinite"] == 0


def test_the_residual_ratio_is_that_of_the_writes(store):
    model = build("llama").eval()
    writes = {}
    handles = [
        module.register_forward_hook(lambda _m, _a, out, name=name: writes.update({name: out.detach()}))
        for name, module in model.named_modules()
        if name.endswith(("o_proj", "down_proj", "layers.0"))
    ]
    observed(model, batch(), store, instruments=EXACT)
    for handle in handles:
        handle.remove()
    rms = {n: float(w.double().pow(2).mean().sqrt()) for n, w in writes.items()}
    found = {(r["layer"], r["site"]): r["residual_ratio"] for r in rows(store, "layers")}
    assert found[1, "attn_out"] == pytest.approx(
        rms["model.layers.1.self_attn.o_proj"] / rms["model.layers.0"], rel=RELATIVE
    )
    assert found[1, "mlp_out"] == pytest.approx(
        rms["model.layers.1.mlp.down_proj"] / rms["model.layers.0"], rel=RELATIVE
    )
    assert found[0, "resid"] is None  # it has no meaning there, and is not invented


@pytest.mark.parametrize("name", BUILDERS)
def test_outputs_and_gradients_are_bit_identical_with_the_taps_on(name, store):
    model = build(name).eval()
    plain = model(**batch())
    plain.loss.backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with observe(model, store=store, every=1, strict=True) as session:
        tapped = model(**batch())
        tapped.loss.backward()
        session.step()
    assert torch.equal(plain.logits, tapped.logits)
    for before, parameter in zip(gradients, model.parameters(), strict=True):
        assert (before is None and parameter.grad is None) or torch.equal(before, parameter.grad)
    assert {r["step"] for r in rows(store, "layers")} == {1}
    assert bool(rows(store, "heads")) == (name in REACHED)


def test_a_model_that_computes_attention_itself_gets_the_rest_and_one_event(store):
    model = build("bloom")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with observe(model, optimizer=optimizer, store=store, every=1, strict=True) as session:
        for seed in range(3):
            model(**batch(seed)).loss.backward()
            optimizer.step()
            session.step()
            optimizer.zero_grad()
    told = events(store, "attention_not_measured")
    assert len(told) == 1
    assert "AttentionInterface" in told[0]["message"]
    assert rows(store, "heads") == []
    assert {r["step"] for r in rows(store, "layers")} == {1, 2, 3}
    assert {r["step"] for r in rows(store, "params")} == {1, 2, 3}
    assert rows(store, "curvature")


def test_parameter_norms_are_those_of_the_update(store):
    model = build("gpt2").eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    with observe(model, optimizer=optimizer, store=store, every=1, instruments=["parameters"], strict=True) as session:
        model(**batch()).loss.backward()
        optimizer.step()
        session.step()
    after = {n: p.detach().double() for n, p in model.named_parameters()}
    found = {r["name"]: r for r in rows(store, "params")}
    assert set(found) == set(after)
    for name, row in found.items():
        assert row["norm"] == pytest.approx(float(after[name].norm()), rel=1e-6)
        assert row["update_norm"] == pytest.approx(float((after[name] - before[name]).norm()), rel=1e-4, abs=1e-9)
        assert row["update_ratio"] == pytest.approx(row["update_norm"] / row["norm"], rel=1e-5)
        gradient = dict(model.named_parameters())[name].grad
        assert row["grad_norm"] == pytest.approx(float(gradient.double().norm()), rel=1e-5, abs=1e-12)
    step = rows(store, "steps")[0]
    total = sum(float((after[n] - before[n]).pow(2).sum()) for n in after) ** 0.5
    assert step["update_norm"] == pytest.approx(total, rel=1e-5)


def test_a_window_of_parameters_is_covered_when_copies_would_not_fit(store):
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with observe(model, optimizer=optimizer, store=store, every=1, instruments=["parameters"], strict=True) as session:
        session._agent.parameters.limit_bytes = 12_000
        for seed in range(6):
            model(**batch(seed)).loss.backward()
            optimizer.step()
            session.step()
            optimizer.zero_grad()
    found = rows(store, "params")
    covered = {r["name"] for r in found if r["update_norm"] is not None}
    assert 0 < sum(r["update_norm"] is not None for r in found if r["step"] == 1) < len(covered)
    assert all(r["update_norm"] is None for r in rows(store, "steps"))
    assert all(r["norm"] is not None for r in found)
