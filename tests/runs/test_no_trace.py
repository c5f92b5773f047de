"""No observer effect: a run with telemetry is the same run, and a model that was observed is the same model."""

from __future__ import annotations

import copy
import io
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from real_parts import missing
from stored import events, rows
from tiny_models import BUILDERS, batch, build, dataset, llama
from transformers import AttentionInterface, Trainer, TrainingArguments

from lm_telemetry import TelemetryCallback, observe

EVERYTHING = {
    "sharpness": {"every": 2},
    "critical_sharpness": {"every": 2},
    "activations": {},
    "attention": {},
    "parameters": {},
}


def fingerprint(model):
    """All of a model that somebody could look at, by value."""
    return {
        "parameters": {n: p.detach().clone() for n, p in model.named_parameters()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "training": {n: m.training for n, m in model.named_modules()},
        "hooks": {
            n: {k: list(v.values()) for k, v in vars(m).items() if "hooks" in k and isinstance(v, dict)}
            for n, m in model.named_modules()
        },
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": getattr(model.config, "_attn_implementation", None),
        "interface": AttentionInterface.get_interface,
        "registry": dict(AttentionInterface._global_mapping),
        "rng": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "grad_enabled": torch.is_grad_enabled(),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same(before, after):
    for key in before:
        assert same(before[key], after[key]), f"{key} differs"


@pytest.mark.parametrize("name", BUILDERS)
def test_observing_leaves_the_model_as_it_was(name, store):
    model = build(name).train()
    inputs = batch()
    model(**inputs).loss.backward()  # so that there are gradients to lose
    next(iter(model.modules())).training = True
    list(model.modules())[3].training = False  # one module in eval mode, which must stay so
    before = fingerprint(model)
    state = torch.get_rng_state()
    with observe(model, store=store, every=1, instruments=EVERYTHING, strict=True) as session:
        model(**inputs)
        session.step()
    torch.set_rng_state(state)  # the forward itself may draw dropout masks
    assert_same(before, fingerprint(model))
    assert rows(store, "layers")


def test_telemetry_draws_nothing_from_the_random_streams(store):
    model = build("llama").eval()
    inputs = batch()
    before = fingerprint(model)["rng"]
    with observe(model, store=store, every=1, instruments=EVERYTHING, strict=True) as session:
        for _ in range(3):
            model(**inputs)
            session.step()
    assert before == fingerprint(model)["rng"]


def test_a_copy_or_pickle_of_an_observed_model_carries_no_tap(store):
    model = build("llama")
    with observe(model, store=store, every=1, instruments=["activations", "attention"], strict=True) as session:
        copied = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        pickle.loads(pickle.dumps(model))
        copied(**batch())
        loaded(**batch())
        session.step()
    assert not rows(store, "layers")  # the copies ran; the original did not
    assert torch.equal(copied(**batch()).logits, model(**batch()).logits)


def train(tmp_path, name, callback=None, *, evaluate=False, optim="adamw_torch", **arguments):
    model = build(name, seed=3)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    out = tmp_path / ("with" if callback else "without")
    args = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=11,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=2,
        optim=optim,
        **{"max_steps": 5, **arguments},
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=dataset(),
        eval_dataset=dataset(8) if evaluate else None,
        callbacks=[callback] if callback else [],
    )
    trainer.train()
    return trainer


def outcome(trainer):
    """What a run leaves behind, timing aside."""
    timing = ("runtime", "per_second")
    return {
        "log": [{k: v for k, v in line.items() if not k.endswith(timing)} for line in trainer.state.log_history],
        "parameters": dict(trainer.model.named_parameters()),
        "optimizer": trainer.optimizer.state_dict(),
        "rng": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "training": [m.training for m in trainer.model.modules()],
        "grads": [p.grad for p in trainer.model.parameters()],
        "attributes": {n: sorted(vars(m)) for n, m in trainer.model.named_modules()},
        "trainer": sorted(vars(trainer)),
        "accelerator": sorted(vars(trainer.accelerator)),
    }


VARIANTS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "evaluation": {"evaluate": True},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "no clipping": {"max_grad_norm": 0.0},
    "sgd": {"optim": "sgd"},
}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_is_bit_identical(tmp_path, store, name, variant):
    callback = TelemetryCallback(store=store, every=1, instruments=EVERYTHING, strict=True)
    plain = outcome(train(tmp_path, name, **VARIANTS[variant]))
    observed = outcome(train(tmp_path, name, callback, **VARIANTS[variant]))
    assert_same(plain, observed)

    steps = rows(store, "steps")
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5]
    logged = [line for line in observed["log"] if "loss" in line]
    for step, line in zip(steps, logged, strict=True):
        assert step["loss"] == pytest.approx(line["loss"], rel=1e-6)
        assert step["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-6)
        assert step["learning_rate"] == pytest.approx(line["learning_rate"], rel=1e-12)
        assert step["tokens"] == 4 * 24 * VARIANTS[variant].get("gradient_accumulation_steps", 1)
        assert 0 < step["telemetry_seconds"] < step["seconds"]
    assert {r["step"] for r in rows(store, "layers")} == {1, 2, 3, 4, 5}
    assert {r["estimator"] for r in rows(store, "curvature")} == {"lanczos", "critical"}
    assert not [e for e in events(store) if e["severity"] == "error"]


@pytest.fixture
def one_thread():
    """Inductor's embedding backward adds atomically: with more threads two plain runs already differ in a last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compiled_training_is_bit_identical_through_the_shadow_forward(tmp_path, store, name):
    if shutil.which("c++") is None and shutil.which("g++") is None:
        missing("a C++ compiler, which torch.compile needs on the CPU")
    callback = TelemetryCallback(store=store, every=2, instruments=EVERYTHING, strict=True)
    torch._dynamo.reset()
    plain = outcome(train(tmp_path, name, torch_compile=True))
    torch._dynamo.reset()
    observed = outcome(train(tmp_path, name, callback, torch_compile=True))
    assert_same(plain, observed)
    assert {r["mode"] for r in rows(store, "runs")} == {"shadow"}
    assert {r["step"] for r in rows(store, "heads")} == {1, 2, 4}
    assert {r["step"] for r in rows(store, "layers")} == {1, 2, 4}


def test_a_shadow_forward_sees_what_the_taps_see(tmp_path):
    model = llama().eval()
    seen = {}
    for mode in ("taps", "shadow"):
        where = str(tmp_path / mode)
        with observe(
            model, store=where, every=1, mode=mode, instruments=["activations", "attention"], strict=True
        ) as s:
            model(**batch())
            s.step()
        keep = {"layers": ("mean", "std", "absmax", "kurtosis"), "heads": ("entropy", "lse", "max_logit", "sink_mass")}
        seen[mode] = [[r[k] for k in keys] for table, keys in keep.items() for r in rows(where, table)]
    assert seen["taps"] == seen["shadow"]
    assert seen["taps"]
