"""`observe`: hand-written loops, and `generate`."""

from __future__ import annotations

import pytest
import torch
from stored import rows
from tiny_models import batch, build

from lm_telemetry import observe

ALL = {"activations": {}, "attention": {}, "parameters": {}, "sharpness": {}, "critical_sharpness": {}}


def loop(session, model, optimizer, steps, *, tell=True):
    losses = []
    for seed in range(steps):
        loss = model(**batch(seed)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        session.step(loss=loss if tell else None, optimizer=optimizer, grad_norm=norm)
        optimizer.zero_grad()
        losses.append((loss.item(), norm.item()))
    return losses


@pytest.mark.parametrize("tell", [True, False])
def test_a_hand_written_loop(store, tell):
    model = build("llama").eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with observe(model, store=store, every=2, instruments=ALL, strict=True) as session:
        told = loop(session, model, optimizer, 5, tell=tell)
    steps = rows(store, "steps")
    assert [(s["loss"], s["grad_norm"]) for s in steps] == [pytest.approx(t, rel=1e-6) for t in told]
    assert {s["learning_rate"] for s in steps} == {0.1}
    assert {r["step"] for r in rows(store, "layers")} == {1, 2, 4}
    # the optimizer is known from the end of step 1 on
    assert {r["step"] for r in rows(store, "params")} == {2, 4}
    thresholds = {(r["estimator"], r["operator"]): r["threshold"] for r in rows(store, "curvature") if r["step"] > 0}
    assert thresholds["lanczos", "hessian"] == pytest.approx((2 + 2 * 0.9) / 0.1)


def test_micro_batches_are_one_step_and_the_first_is_observed(store):
    model = build("llama").eval()
    optimizer = torch.optim.AdamW(model.parameters())
    with observe(model, optimizer=optimizer, store=store, every=1, instruments=ALL, strict=True) as session:
        losses = []
        for seed in range(3):
            loss = model(**batch(seed)).loss
            (loss / 3).backward()
            losses.append(loss.item())
        optimizer.step()
        session.step()
    (step,) = rows(store, "steps")
    assert step["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert step["tokens"] == 3 * 2 * 24
    assert {r["n_tokens"] for r in rows(store, "layers")} == {48}


def test_an_evaluation_between_steps_is_not_recorded(store):
    model = build("llama").eval()
    optimizer = torch.optim.AdamW(model.parameters())
    with observe(
        model, optimizer=optimizer, store=store, every=1, instruments=ALL, max_steps=3, strict=True
    ) as session:
        loop(session, model, optimizer, 2)
        with torch.no_grad():
            model(**batch(9))
        loop(session, model, optimizer, 1)
    assert [r["max_steps"] for r in rows(store, "runs")] == [3]
    assert [s["step"] for s in rows(store, "steps")] == [1, 2, 3]
    assert {s["tokens"] for s in rows(store, "steps")} == {48}


def test_around_generate_each_forward_is_a_step(store):
    model = build("llama").eval()
    prompt = batch()["input_ids"]
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = model.generate(prompt, **settings)
    with observe(model, store=store, every=1, instruments=ALL, strict=True) as session:
        observed = model.generate(prompt, **settings)
        assert session.flush()
    assert torch.equal(plain, observed)
    steps = rows(store, "steps")
    assert steps[0]["tokens"] == 48
    assert len(steps) == 5
    assert all(s["loss"] is None for s in steps)
    heads = rows(store, "heads", layer=0, head=0)
    assert [h["n_queries"] for h in heads] == [48, 2, 2, 2, 2]


def test_left_padded_generation_is_unchanged_and_counts_real_tokens(store):
    model = build("gpt2").eval()
    inputs = batch(padding="left")
    del inputs["labels"]
    settings = {"max_new_tokens": 4, "do_sample": True, "pad_token_id": 0, "eos_token_id": None}
    torch.manual_seed(1)
    plain = model.generate(**inputs, **settings)
    torch.manual_seed(1)
    with observe(model, store=store, every=1, instruments=ALL, strict=True):
        observed = model.generate(**inputs, **settings)
    assert torch.equal(plain, observed)
    assert [r["n_tokens"] for r in rows(store, "layers", layer=0, site="resid")] == [43, 2, 2, 2]


def test_two_models_observed_at_once_do_not_mix(tmp_path):
    first, second = build("llama").eval(), build("gpt2").eval()
    with (
        observe(first, store=str(tmp_path / "a"), every=1, instruments=["attention"], strict=True) as a,
        observe(second, store=str(tmp_path / "b"), every=1, instruments=["attention"], strict=True) as b,
    ):
        first(**batch())
        a.step()
        second(**batch())
        b.step()
    assert {r["model_class"] for r in rows(tmp_path / "a", "runs")} == {"LlamaForCausalLM"}
    assert {r["model_class"] for r in rows(tmp_path / "b", "runs")} == {"GPT2LMHeadModel"}
    assert len(rows(tmp_path / "a", "heads")) == len(rows(tmp_path / "b", "heads")) == 8


def test_a_probe_of_ones_own_is_used(store):
    model = build("llama").eval()
    mine = batch(seed=99)
    with observe(model, store=store, every=1, probe=mine, instruments=["sharpness"], strict=True) as session:
        model(**batch())
        session.step()
    (row,) = [r for r in rows(store, "curvature") if r["operator"] == "hessian"]
    assert row["loss"] == pytest.approx(model(**mine).loss.item(), rel=1e-6)


def test_an_exception_in_the_loop_still_detaches_and_writes(store):
    model = build("llama").eval()
    with pytest.raises(KeyError), observe(model, store=store, every=1, instruments=["activations"]) as session:
        model(**batch())
        session.step()
        raise KeyError("theirs")
    assert rows(store, "layers")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
