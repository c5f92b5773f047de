"""Bad input: a clear error when the callback is made, or an event while training goes on."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from stored import events, is_nan, rows
from tiny_models import batch, build, dataset
from torch import nn
from transformers import Trainer, TrainingArguments

from lm_telemetry import TelemetryCallback, observe
from lm_telemetry.errors import ModelError, SettingsError, StoreError


def test_a_store_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("taken")
    with pytest.raises(StoreError, match="directory") as caught:
        TelemetryCallback(store=str(tmp_path / "file"))
    assert caught.value.path == str(tmp_path / "file")


def test_a_store_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("taken")
    with pytest.raises(StoreError):
        TelemetryCallback(store=str(tmp_path / "file" / "below"))
    with pytest.raises(StoreError):
        TelemetryCallback(store="/proc/lm-telemetry")


@pytest.mark.parametrize(
    "own",
    [
        {"activations": {"tokens": 0}},
        {"attention": {"queries": -1}},
        {"activations": {"colour": 1}},
        {"sharpness": {"every": 0}},
    ],
    ids=str,
)
def test_an_instruments_own_settings(store, own):
    with pytest.raises(SettingsError, match=f"instruments.{next(iter(own))}"):
        TelemetryCallback(store=store, instruments=own)


def test_a_model_without_parameters(store):
    with pytest.raises(ModelError, match="parameters"):
        observe(nn.ReLU(), store=store)
    with pytest.raises(ModelError, match="Module"):
        observe("a model", store=store)


def trainer(callback, tmp_path, model=None, steps=3, **arguments):
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=steps,
        per_device_train_batch_size=4,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    return Trainer(model=model or build("llama"), args=args, train_dataset=dataset(), callbacks=[callback])


def test_an_error_in_an_instrument_does_not_reach_the_training(store, tmp_path, monkeypatch):
    callback = TelemetryCallback(store=store, every=1)
    for name, method in (("activations", "on_activation"), ("attention", "rows"), ("sharpness", "measure")):

        def broken(*_args, name=name):
            raise RuntimeError(f"{name} is broken")

        monkeypatch.setattr(callback._agent.instruments[name], method, broken)
    trainer(callback, tmp_path).train()
    told = " ".join(e["message"] for e in events(store) if e["severity"] == "error")
    for name in ("activations", "attention", "sharpness"):
        assert f"{name} is broken" in told
    assert [r["step"] for r in rows(store, "steps")] == [1, 2, 3]
    assert rows(store, "params")  # the healthy ones go on


def test_an_error_that_repeats_is_told_once(store, tmp_path, monkeypatch):
    callback = TelemetryCallback(store=store, every=1, instruments=["parameters"])

    def broken():
        raise RuntimeError("broken")

    monkeypatch.setattr(callback._agent.instruments["parameters"], "after_update", broken)
    trainer(callback, tmp_path, steps=5).train()
    assert len(events(store, "telemetry_error")) == 1
    assert callback._agent.guard.failures["instrument parameters"] == 5


def test_strict_lets_errors_through(store, tmp_path, monkeypatch):
    callback = TelemetryCallback(store=store, every=1, instruments=["parameters"], strict=True)

    def broken():
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(callback._agent.instruments["parameters"], "after_update", broken)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        trainer(callback, tmp_path).train()
    callback.close()


def test_nan_in_the_model_is_counted_not_spread(store, tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    callback = TelemetryCallback(store=store, every=1)
    trainer(callback, tmp_path, model).train()
    steps = rows(store, "steps")
    assert len(steps) == 3
    assert all(is_nan(s["loss"]) for s in steps)  # the Trainer's log filters it out; the store does not
    layers = rows(store, "layers", step=1)
    first = next(r for r in layers if (r["layer"], r["site"]) == (0, "resid"))
    hit = next(r for r in layers if (r["layer"], r["site"]) == (1, "mlp_out"))
    assert first["nonfinite"] == 0
    assert hit["nonfinite"] == hit["n_tokens"]
    assert math.isfinite(hit["rms"])
    assert not [r for r in rows(store, "curvature") if r["value"] is not None and r["converged"]]
    assert [e for e in events(store) if "sharpness" in e["message"] or "probe" in e["message"]]


def test_a_batch_with_nan_gives_events_and_counts_and_goes_on(store):
    model = build("llama").eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    bad = {"inputs_embeds": torch.randn(2, 12, 32), "labels": batch()["labels"][:, :12]}
    bad["inputs_embeds"][0, 3, 5] = math.nan
    with observe(model, optimizer=optimizer, store=store, every=1) as session:
        for inputs in (bad, batch()):
            model(**inputs).loss.backward()
            if inputs is not bad:  # as a loop that skips steps whose gradient is not finite
                optimizer.step()
            session.step()
            optimizer.zero_grad()
    first, second = rows(store, "steps")
    assert is_nan(first["loss"])
    assert math.isfinite(second["loss"])
    embedded = next(r for r in rows(store, "layers", step=1) if r["site"] == "embed")
    assert embedded["nonfinite"] == 1
    assert math.isfinite(embedded["rms"])
    assert sum(r["nonfinite"] for r in rows(store, "heads", step=1)) > 0
    assert rows(store, "curvature") == []  # the frozen probe is the bad batch: nothing is measured on it
    assert events(store, "sharpness_not_measured")


def test_a_store_that_is_deleted_while_training(store, tmp_path):
    callback = TelemetryCallback(store=store, every=1, instruments=["activations"], flush_seconds=0.05)

    class Deletes(type(callback).__mro__[1]):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                callback._agent.session.flush()
                shutil.rmtree(store)

    run = trainer(callback, tmp_path, steps=5)
    run.add_callback(Deletes())
    run.train()
    assert run.state.global_step == 5
    assert {3, 4, 5} <= {r["step"] for r in rows(store, "steps")}
    assert events(store, "store_deleted")


def test_a_batch_without_labels_gives_an_event_and_no_number(store):
    model = build("llama").eval()
    with observe(model, store=store, every=1) as session:
        for seed in range(2):
            inputs = batch(seed)
            logits = model(input_ids=inputs["input_ids"]).logits
            logits.logsumexp(-1).mean().backward()
            session.step()
    assert rows(store, "curvature") == []
    assert [e for e in events(store) if "labels" in e["message"]]


def test_a_frozen_model_gives_an_event_and_no_number(store):
    model = build("llama").eval().requires_grad_(False)
    with observe(model, store=store, every=1) as session:
        model(**batch())
        session.step()
    assert not [r for r in rows(store, "curvature") if r["value"] is not None]
    assert rows(store, "layers")
    assert [e for e in events(store, "sharpness_not_measured") if "requires gradients" in e["message"]]
