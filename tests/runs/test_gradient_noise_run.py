"""`gradient_noise` in real runs: the Trainer's losses of both kinds, two ranks, hand-written loops, compiled models.

Run as a script this file is what each of the two ranks does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))  # for the script

from stored import events, rows
from tiny_models import batch, build, dataset, llama
from transformers import Trainer, TrainingArguments

import lm_telemetry.agent
import lm_telemetry.settings
from lm_telemetry import TelemetryCallback, observe
from lm_telemetry.instruments.gradient_noise import GradientNoise

NOISE = {"gradient_noise": {"smoothing": 0}}


def install(replace=setattr):
    """Make the instrument known whether or not its entry point is installed."""
    known = lm_telemetry.settings.installed_instruments() | {
        "gradient_noise": SimpleNamespace(name="gradient_noise", load=lambda: GradientNoise)
    }
    for module in (lm_telemetry.agent, lm_telemetry.settings):
        replace(module, "installed_instruments", lambda: known)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    install(monkeypatch.setattr)


def ragged(size=32, length=24):
    """Sequences of different numbers of counted labels."""
    examples = []
    for i, example in enumerate(dataset(size, length)):
        labels = example["labels"].clone()
        labels[5 + i % (length - 6) :] = -100
        examples.append({"input_ids": example["input_ids"], "labels": labels})
    return examples


def train(out, data, *, callbacks=(), model=None, **changes):
    """A short run; the micro-batches that went into the model, and the losses that were logged."""
    args = {
        "output_dir": f"{out}/trainer",
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "learning_rate": 0.0,  # a frozen model
        "optim": "sgd",
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    model, seen = model or build("llama", seed=3), []
    trainer = Trainer(
        model=model, args=TrainingArguments(**(args | changes)), train_dataset=data, callbacks=[*callbacks]
    )
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append({k: v for k, v in kwargs.items() if k in ("input_ids", "labels")}),
        with_kwargs=True,
    )
    trainer.train()
    handle.remove()
    log = [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "grad_norm" in line]
    return model, seen, log


def gradient(model, batches):
    """Of the mean loss over all counted labels of some micro-batches, sequence by sequence."""
    total, n = 0, 0
    model.eval()
    for inputs in batches:
        for ids, labels in zip(inputs["input_ids"], inputs["labels"], strict=True):
            counted = int((labels[1:] != -100).sum())
            loss = model(input_ids=ids[None], labels=labels[None]).loss
            found = torch.autograd.grad(loss, list(model.parameters()))
            total = total + counted * torch.cat([g.reshape(-1) for g in found]).double()
            n += counted
    return total / n


def assert_estimate(step, small, large, b, B):
    """The row of `steps` against the formulas; float32 gradients, and |G|² a difference of two squares of a size."""
    square, variance = (B * large - b * small) / (B - b), (small - large) / (1 / b - 1 / B)
    assert step["gradient_square"] == pytest.approx(square, rel=1e-3)
    assert step["gradient_variance"] == pytest.approx(variance, rel=1e-3)
    scale = pytest.approx(variance / square, rel=1e-3) if square > 0 and variance > 0 else None
    assert step["gradient_noise_scale"] == scale


@pytest.mark.parametrize("data", [dataset, ragged])
def test_a_trainer_run_against_gradients_sequence_by_sequence(tmp_path, store, data):
    telemetry = TelemetryCallback(store=store, every=1, strict=True, instruments=NOISE)
    model, seen, _ = train(tmp_path, data(), callbacks=[telemetry])
    steps = rows(store, "steps")
    assert [step["step"] for step in steps] == [1, 2, 3]
    for i, step in enumerate(steps):
        micro = seen[3 * i : 3 * i + 3]
        small = float(gradient(model, micro[:1]).square().sum())
        large = float(gradient(model, micro).square().sum())
        assert_estimate(step, small, large, 2, 6)
    assert not events(store)


def test_a_mean_over_micro_batches(tmp_path, store):
    """A model that takes no `num_items_in_batch`: the Trainer divides its loss by the number of micro-batches."""
    model = build("llama", seed=3)
    model.accepts_loss_kwargs = False
    telemetry = TelemetryCallback(store=store, every=1, strict=True, instruments=NOISE)
    model, seen, _ = train(tmp_path, dataset(), callbacks=[telemetry], model=model)
    step = rows(store, "steps")[0]
    small = float(gradient(model, seen[:1]).square().sum())
    large = float(gradient(model, seen[:3]).square().sum())
    assert_estimate(step, small, large, 2, 6)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"bf16": True}, {"label_smoothing_factor": 0.1}],
    ids=["plain", "checkpointing", "bf16", "label smoothing"],
)
def test_training_is_the_same_bit_by_bit(tmp_path, store, options):
    options = {"learning_rate": 1e-2, "optim": "adamw_torch"} | options
    plain, _, log = train(tmp_path / "a", dataset(), **options)
    telemetry = TelemetryCallback(store=store, every=2, strict=True, instruments=NOISE)
    observed, _, other = train(tmp_path / "b", dataset(), callbacks=[telemetry], **options)
    assert log == other
    for a, b in zip(plain.parameters(), observed.parameters(), strict=True):
        assert torch.equal(a, b)
        assert b._backward_hooks is None
    measured = [step["step"] for step in rows(store, "steps") if step["gradient_square"] is not None]
    if "label_smoothing_factor" in options:  # computed outside the model: said once, and NULL
        assert measured == []
        assert [e["kind"] for e in events(store)] == ["gradient_noise_not_measured"]
    else:
        assert measured == [1, 2]


def loop(model, session=None, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        for part in range(2):
            loss = model(**batch(10 * step + part)).loss
            (loss / 2).backward()
            losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if session is not None:
            session.step(optimizer=optimizer, grad_norm=norm)
        optimizer.zero_grad()
    return losses


def test_a_hand_written_loop_in_which_others_probe(store):
    """The optimizer is known from the end of the first step only, so that probes come before the tap is taken off."""
    model = build("llama")
    gradients = [gradient(model, [batch(0)]), gradient(model, [batch(0), batch(1)])]
    model.train()
    instruments = {"sharpness": {"every": 1}, "critical_sharpness": {"every": 1}} | NOISE
    with observe(model, store=store, every=1, strict=True, instruments=instruments) as session:
        loop(model, session)
    assert len(rows(store, "curvature")) >= 3
    step = rows(store, "steps")[0]
    small, large = (float(g.square().sum()) for g in gradients)
    assert_estimate(step, small, large, 2, 4)
    assert not [e for e in events(store) if e["kind"] == "gradient_noise_not_measured"]


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_model_is_said_and_computes_the_same(store, how):
    """The hooks do nothing in compiled code: no estimate, one event, and the same losses bit by bit."""

    def compiled():
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = llama(num_hidden_layers=1)
        if how == "wrapped":
            return torch.compile(model, backend="aot_eager")
        model.compile(backend="aot_eager")
        return model

    plain = loop(compiled(), steps=3)
    model = compiled()
    with observe(model, store=store, every=2, strict=True, instruments=NOISE) as session:
        assert loop(model, session, steps=3) == plain
    assert {step["gradient_square"] for step in rows(store, "steps")} == {None}
    (event,) = events(store)
    assert event["kind"] == "gradient_noise_not_measured"
    assert "compile" in event["message"]


def rank(out, store):
    """What each rank runs: the run, its micro-batches, and its log."""
    torch.set_num_threads(1)
    install()
    callbacks = []
    if store != "none":
        callbacks = [TelemetryCallback(store=store, every=1, strict=True, instruments=NOISE)]
    model, seen, log = train(out, ragged(), callbacks=callbacks, ddp_backend="gloo", learning_rate=1e-3, max_steps=2)
    found = {"seen": seen, "log": log, "parameters": [p.detach() for p in model.parameters()]}
    torch.save(found, f"{out}/rank-{os.environ['RANK']}.pt")
    # gloo's threads must end before the interpreter does, or they abort it
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def launch(out, store):
    out.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "--local-addr=127.0.0.1", __file__, str(out), store]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, cwd=out)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(out / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
def test_two_ranks(tmp_path, store):
    """Each rank's hooks see its own gradient before it is reduced; the norm is that of the mean over both."""
    found = launch(tmp_path / "observed", store)
    model = build("llama", seed=3)
    micro = [f["seen"][:3] for f in found]
    assert not torch.equal(micro[0][0]["input_ids"], micro[1][0]["input_ids"])
    large = float(gradient(model, micro[0] + micro[1]).square().sum())
    for k in (0, 1):
        small = float(gradient(model, micro[k][:1]).square().sum())
        assert_estimate(rows(store, "steps", rank=k, step=1)[0], small, large, 2, 12)
    assert not [e for e in events(store) if e["kind"] == "gradient_noise_not_measured"]
    plain = launch(tmp_path / "plain", "none")
    for a, b in zip(plain, found, strict=True):
        assert a["log"] == b["log"]
        assert all(torch.equal(p, q) for p, q in zip(a["parameters"], b["parameters"], strict=True))


if __name__ == "__main__":
    rank(*sys.argv[1:])
