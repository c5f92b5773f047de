"""The `representation` instrument on real models: its numbers, its drift, its sketches, and that it leaves no trace."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from stored import events, rows
from tiny_models import batch, build, dataset
from transformers import Trainer, TrainingArguments

from lm_telemetry import TelemetryCallback, observe
from lm_telemetry.catalogue import columns
from lm_telemetry.errors import SettingsError
from lm_telemetry.hooks.parameter_tap import ParameterTap
from lm_telemetry.hooks.probe import Probe
from lm_telemetry.hooks.topology import discover
from lm_telemetry.instruments.base import Attachment
from lm_telemetry.instruments.representation import Representation
from lm_telemetry.queries import connect

RELATIVE = 1e-4
"""Of ranks between a float32 and a float64 forward pass: the smallest singular values lose some digits."""


def watch(model, inputs, store, *, optimizer=None, steps=1, data=None, **settings):
    """Steps of a hand-written loop; the model after each, as a copy."""
    copies = []
    own = {"representation": {"every": 1} | settings}
    with observe(model, store=store, every=1, optimizer=optimizer, instruments=own, strict=True) as session:
        for seed in range(steps):
            loss = model(**(inputs if data is None or seed == 0 else data(seed))).loss
            if optimizer is not None:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            session.step()
            copies.append(copy.deepcopy(model))
    return copies


def hidden(model, inputs, name):
    """Real tokens (n, D) in fp64 by (stack, layer, site), from the hidden states the model itself returns."""
    full = copy.deepcopy(model).eval().double()(**inputs, output_hidden_states=True)
    towers = {{"bert": "encoder"}.get(name, "decoder"): getattr(full, "hidden_states", None)}
    if name == "t5":
        towers = {"encoder": full.encoder_hidden_states, "decoder": full.decoder_hidden_states}
    found = {}
    for stack, states in towers.items():
        mask = inputs.get("attention_mask") if (name, stack) != ("t5", "decoder") else None
        keep = torch.ones_like(inputs["labels"]).bool() if mask is None else mask.bool()
        last = len(states) - 1
        places = [(-1, "embed"), *((layer, "resid") for layer in range(last - 1)), (last, "final")]
        for place, state in zip(places, [*states[:last], states[-1]], strict=True):
            found[(stack, *place)] = (state.detach()[keep], keep.nonzero())
    return found


def by_svd(x):
    """Statistics of tokens (n, D) from their singular values and cosines, by NumPy."""
    x = x.numpy()
    s, raw = (np.linalg.svd(m, compute_uv=False) for m in (x - x.mean(0), x))

    def rank(values):
        p = values[values > 1e-12] / values.sum()
        return math.exp(-(p * np.log(p)).sum())

    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return {
        "participation_ratio": (s**2).sum() ** 2 / (s**4).sum(),
        "effective_rank": rank(s),
        "rankme": rank(raw),
        "stable_rank": (s**2).sum() / s[0] ** 2,
        "anisotropy": (unit @ unit.T)[~np.eye(len(x), dtype=bool)].mean(),
    }


def debiased_cka(x, y):
    """By the unbiased HSIC of Song et al. 2012, equation 5."""
    n = len(x)
    one = np.ones(n)

    def hsic(k, m):
        outer = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return np.trace(k @ m) + outer - 2 / (n - 2) * (one @ k @ m @ one)

    k, m = ((z @ z.T * (1 - torch.eye(n))).numpy() for z in (x, y))
    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


def overlap(x, y, k=10):
    near = []
    for z in (x, y):
        unit = torch.nn.functional.normalize(z, dim=1)
        near.append((unit @ unit.T - 2 * torch.eye(len(z))).topk(k, dim=1).indices.tolist())
    return np.mean([len(set(a) & set(b)) / k for a, b in zip(*near, strict=True)])


def place(row):
    return row["stack"], row["layer"], row["site"]


@pytest.mark.parametrize(
    ("name", "padding"), [("llama", None), ("llama", "left"), ("gpt2", "right"), ("bert", "right"), ("t5", "right")]
)
def test_statistics_equal_those_of_the_hidden_states(name, padding, store):
    model = build(name)
    inputs = batch(padding=padding)
    if name == "t5":
        inputs["labels"] = inputs["labels"].clamp(min=0)
    if padding is not None:  # what would be massive if it were looked at
        inputs["input_ids"] = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 0)
        with torch.no_grad():
            model.get_input_embeddings().weight[0] = 50.0
    watch(model.train(), inputs, store)  # evaluated without dropout all the same
    found = {place(r): r for r in rows(store, "representations")}
    expected = hidden(model, inputs, name)
    lasts = {(stack, layer - 1, "resid") for stack, layer, site in expected if site == "final"}  # not returned
    assert set(found) == set(expected) | lasts
    for at, (tokens, positions) in expected.items():
        row = found[at]
        statistics = by_svd(tokens)
        assert {c: row[c] for c in statistics} == pytest.approx(statistics, rel=RELATIVE, abs=1e-6), at
        token, channel = divmod(int(tokens.abs().argmax()), tokens.shape[1])
        assert [row[f"massive_{c}"] for c in ("sequence", "position", "channel")] == [
            *positions[token].tolist(),
            channel,
        ]
        assert row["massive_value"] == pytest.approx(float(tokens[token, channel]), rel=1e-5)
        ratio = float(tokens.abs().max() / tokens.abs().median())
        assert row["massive_ratio"] == pytest.approx(ratio, rel=1e-4)
        assert (row["n_tokens"], row["width"], row["nonfinite"]) == (len(tokens), 32, 0)
        assert (row["first_step"], row["previous_step"], row["neighbours"]) == (1, None, 10)
        assert (row["cka_first"], row["knn_first"]) == (1, 1)
        assert (row["cka_previous"], row["knn_previous"]) == (None, None)


def test_sampled_tokens_are_evenly_spaced_among_the_real(store):
    model, inputs = build("llama"), batch(padding="left")
    watch(model, inputs, store, tokens=20, sketch_tokens=10)
    tokens, _ = hidden(model, inputs, "llama")["decoder", 0, "resid"]
    (row,) = rows(store, "representations", layer=0, site="resid")
    assert row["n_tokens"] == 20
    sampled = tokens[torch.arange(20) * len(tokens) // 20]
    assert row["effective_rank"] == pytest.approx(by_svd(sampled)["effective_rank"], rel=RELATIVE)
    (sketch,) = rows(store, "sketches", layer=0, site="resid")
    assert (sketch["n_tokens"], len(sketch["gram"])) == (10, 45)


def test_nothing_drifts_without_learning(store):
    model = build("gpt2").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watch(model, batch(), store, optimizer=optimizer, steps=3, data=batch)
    found = rows(store, "representations")
    assert len(found) == 3 * 4
    for row in found:
        assert (row["cka_first"], row["knn_first"]) == (pytest.approx(1, abs=1e-7), 1)
        if row["step"] > 1:
            assert (row["cka_previous"], row["knn_previous"]) == (pytest.approx(1, abs=1e-7), 1)
            assert row["previous_step"] == row["step"] - 1


def test_drift_is_that_between_the_models(store):
    model, inputs = build("llama"), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    copies = watch(model, inputs, store, optimizer=optimizer, steps=4, data=batch)
    states = [hidden(m, inputs, "llama") for m in copies]
    assert copies[0].training
    found = {(r["step"], place(r)): r for r in rows(store, "representations")}
    for at in states[0]:
        now, before, first = (states[step][at][0] for step in (3, 2, 0))
        row = found[4, at]
        assert row["cka_previous"] == pytest.approx(debiased_cka(now, before), abs=1e-5)
        assert row["cka_first"] == pytest.approx(debiased_cka(now, first), abs=1e-5)
        assert row["knn_previous"] == pytest.approx(overlap(now, before), abs=0.01)  # a tie may fall either way
        assert row["knn_first"] == pytest.approx(overlap(now, first), abs=0.01)
        assert (row["previous_step"], row["first_step"]) == (3, 1)
    path = [found[step, ("decoder", 2, "final")]["cka_first"] for step in (1, 2, 3, 4)]
    assert path == sorted(path, reverse=True)
    assert path[-1] < 0.99


def test_sketches_give_the_same_similarity_as_the_columns(store):
    model = build("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    copies = watch(model, batch(), store, optimizer=optimizer, steps=3, data=batch, tokens=40, sketch_tokens=40)
    relation = connect(store).sql("FROM cka")
    found = [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]
    steps = {(r["step"], place(r)): r["cka"] for r in found if r["comparison"] == "steps"}
    last = rows(store, "representations", step=3)
    assert len(last) == 4
    for row in last:
        with_last = [steps[step, place(row)] for step in (1, 2)]
        assert with_last == pytest.approx([row["cka_first"], row["cka_previous"]], abs=2e-6)
    # and between layers, which no column has
    tokens = [hidden(copies[-1], batch(), "llama")["decoder", *at][0] for at in ((-1, "embed"), (2, "final"))]
    sampled = torch.arange(40) * 48 // 40
    (layers,) = [
        r["cka"] for r in found if (r["comparison"], r["site"], r["other_site"]) == ("layers", "embed", "final")
    ]
    assert layers == pytest.approx(debiased_cka(*(t[sampled] for t in tokens)), abs=1e-5)


def test_a_second_attachment_starts_its_drift_anew():
    model, instrument = build("llama"), Representation()
    probe = Probe()
    probe.freeze(batch(), model=model)
    attachment = Attachment(
        model=model, topology=discover(model), probe=probe, parameters=ParameterTap(model), optimizer=lambda: None,
        event=pytest.fail, request=pytest.fail, grad_norm=lambda: None, world_size=1,
    )  # fmt: skip

    def capture(step):
        instrument.begin(step)
        instrument.measure(step)
        return instrument.rows({}, instrument.harvest().note)["representations"]

    instrument.attach(attachment)
    assert capture(1)["previous_step"] == [None] * 4
    assert (capture(5)["previous_step"], capture(7)["first_step"]) == ([1] * 4, [1] * 4)
    instrument.detach()
    assert instrument._first == instrument._previous == {}
    instrument.attach(attachment)
    again = capture(9)
    assert (again["previous_step"], again["first_step"]) == ([None] * 4, [9] * 4)


def test_broken_tokens_are_counted_and_their_sketch_is_not_stored(store):
    model, inputs = build("llama"), batch()
    word = int(inputs["input_ids"][1, -1])
    inputs["input_ids"][0][inputs["input_ids"][0] == word] = 3
    with torch.no_grad():
        model.model.embed_tokens.weight[word] = torch.nan
    broken = int((inputs["input_ids"] == word).sum())
    watch(model, inputs, store, steps=2)
    found = {(r["step"], place(r)): r for r in rows(store, "representations")}
    for row in found.values():
        assert row["nonfinite"] >= broken
        assert row["effective_rank"] > 1
    entering = found[2, ("decoder", -1, "embed")]
    assert entering["nonfinite"] == broken
    assert entering["cka_previous"] == pytest.approx(1)  # of the same finite tokens
    assert math.isfinite(entering["massive_value"])
    assert rows(store, "sketches") == []
    assert len(events(store, "representation_nonfinite")) == 2


def test_without_labels_and_with_other_sites(store):
    model, inputs = build("bert"), {"input_ids": batch()["input_ids"]}
    own = {"representation": {"sites": ["mlp_out"], "sketch_tokens": 0}}
    with observe(model, store=store, every=1, strict=True, instruments=own) as session:
        model(**inputs)
        session.step()
    assert [place(r) for r in rows(store, "representations")] == [("encoder", 0, "mlp_out"), ("encoder", 1, "mlp_out")]
    assert rows(store, "sketches") == []


def test_a_model_without_such_sites_is_told_of(store):
    model = torch.nn.Linear(4, 4)
    with observe(model, store=store, every=1, instruments=["representation"], strict=True) as session:
        model(torch.ones(2, 4))
        session.step()
    assert rows(store, "representations") == []
    assert events(store, "representation_not_measured")


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_training_is_bit_identical(tmp_path, store, name):
    def train(*callbacks):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(len(callbacks))), max_steps=4, per_device_train_batch_size=4, logging_steps=1,
            learning_rate=1e-3, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=11,
        )  # fmt: skip
        trainer = Trainer(model=build(name, seed=3), args=arguments, train_dataset=dataset(), callbacks=list(callbacks))
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules()]
        return losses, list(trainer.model.parameters()), torch.get_rng_state(), hooks

    own = {"representation": {"every": 1}}
    plain, observed = train(), train(TelemetryCallback(store=store, every=1, instruments=own, strict=True))
    assert plain[0] == observed[0]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], observed[1], strict=True))
    assert torch.equal(plain[2], observed[2])
    assert plain[3] == observed[3]
    assert {r["step"] for r in rows(store, "representations")} == {1, 2, 3, 4}
    assert {m.name for m in columns("representations")} <= set(rows(store, "representations")[0])


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"tokens": 3}, "tokens"),
        ({"tokens": 513}, "tokens"),
        ({"neighbours": 0}, "neighbours"),
        ({"sketch_tokens": 2}, "sketch_tokens"),
        ({"sketch_tokens": False}, "sketch_tokens"),
        ({"sites": "resid"}, "sites"),
        ({"sites": []}, "sites"),
        ({"sites": ["residual"]}, "sites"),
    ],
)
def test_bad_settings(settings, setting):
    with pytest.raises(SettingsError, match=rf"representation\.{setting}: expected"):
        Representation(**settings)
    assert Representation(sketch_tokens=0, sites=("mlp_out",)).sketch_tokens == 0
