"""On a GPU: sampled steps do not synchronise with the device, and the numbers are those of the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from stored import events, rows
from tiny_models import batch, llama

from lm_telemetry import observe

PER_STEP = ["activations", "attention", "parameters"]

pytestmark = pytest.mark.gpu


def run(model, inputs, store, *, forbid_sync=False, dtype=None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with observe(model, optimizer=optimizer, store=store, every=1, instruments=PER_STEP, strict=True) as session:
        for step in range(4):
            if forbid_sync and step == 2:  # kernels are compiled and memory is allocated by then
                torch.cuda.set_sync_debug_mode("error")
            with torch.autocast(inputs["input_ids"].device.type, dtype, enabled=dtype is not None):
                loss = model(**inputs).loss
            loss.backward()
            optimizer.step()
            session.step(loss=loss)
            optimizer.zero_grad()
        torch.cuda.set_sync_debug_mode("default")
    assert not [e for e in events(store) if e["severity"] == "error"]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_sampled_steps_do_not_synchronise(store, dtype):
    inputs = {k: v.cuda() for k, v in batch(batch_size=4, length=64).items()}
    run(llama(hidden_size=64, head_dim=16).cuda(), inputs, store, forbid_sync=True, dtype=dtype)
    assert {r["step"] for r in rows(store, "heads")} == {1, 2, 3, 4}


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_the_gpus_numbers_are_the_cpus(tmp_path, padding):
    torch.manual_seed(0)
    model = llama(hidden_size=64, head_dim=16).eval()
    inputs = batch(padding=padding, batch_size=4, length=40)
    places = {"cpu": (copy.deepcopy(model), inputs), "cuda": (model.cuda(), {k: v.cuda() for k, v in inputs.items()})}
    for place, (placed, placed_inputs) in places.items():
        run(placed, placed_inputs, str(tmp_path / place))
    columns = {
        "layers": ("n_tokens", "mean", "std", "absmax", "kurtosis"),
        "heads": ("n_queries", "entropy", "sink_mass"),
    }
    for table, names in columns.items():
        both = [[[r[n] for n in names] for r in rows(tmp_path / place, table, step=1)] for place in places]
        assert both[0]
        for on_cpu, on_gpu in zip(*both, strict=True):
            assert on_cpu == pytest.approx(on_gpu, rel=1e-3, abs=1e-5)  # TF32 is off; sums differ in order
