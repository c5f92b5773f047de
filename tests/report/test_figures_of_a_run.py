"""The report of a real run of the Trainer: everything is there, and it agrees with the rows in the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from stored import rows
from tiny_models import dataset, llama
from transformers import Trainer, TrainingArguments

from lm_telemetry import TelemetryCallback
from lm_telemetry.exporters.report.reading import read
from lm_telemetry.exporters.report.words import percent
from lm_telemetry.queries import connect

STEPS = 12
OFTEN = ("activations", "attention", "parameters", "gradient_noise", "critical_sharpness")
SELDOM = ("sharpness", "spectrum", "trace", "block_sharpness", "representation", "knock_out", "pathways")


@dataclass
class Run:
    store: str
    report: Any

    def figure(self, figure_id):
        return next(figure for figure in self.report.figures if figure.id == figure_id)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    instruments = {name: {"every": 2} for name in OFTEN} | {name: {"every": 6} for name in SELDOM}
    torch.manual_seed(0)
    Trainer(
        model=llama(),
        args=TrainingArguments(
            output_dir=str(folder / "out"),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
        ),
        train_dataset=dataset(),
        callbacks=[TelemetryCallback(store=str(folder / "store"), run_id="tiny", instruments=instruments)],
    ).train()
    with connect(folder / "store") as connection:
        return Run(store=str(folder / "store"), report=read(connection, ["tiny"], store_name="store"))


def test_nothing_is_missing(run):
    assert run.report.missing == ()
    assert {figure.section for figure in run.report.figures} == {
        "Training",
        "Curvature",
        "Attention",
        "Representation",
        "Telemetry",
    }


def test_the_loss_is_the_store_s(run):
    line = run.figure("loss").body.lines[0]
    stored = rows(run.store, "steps")
    assert list(line.x) == [row["step"] for row in stored] == list(range(1, STEPS + 1))
    assert list(line.y) == [row["loss"] for row in stored]
    first, last = (np.mean([row["loss"] for row in part]) for part in (stored[:3], stored[-3:]))
    assert f"from {first:.3g} to {last:.3g} nats over 12 steps" in run.report.verdict


def test_maps_are_the_store_s(run):
    body = run.figure("rms").body
    assert body.rows == ("embed", "0", "1", "final")
    stored = {(r["step"], r["layer"]): r["rms"] for r in rows(run.store, "layers") if r["site"] == "resid"}
    for (step, layer), rms in stored.items():
        assert body.values[layer + 1, list(body.columns).index(step)] == rms
    heads = {s.axis.label: s.values for s in run.figure("heads").body.statistics}
    last = [r for r in rows(run.store, "heads") if r["step"] == STEPS]
    for row in last:
        assert heads["entropy"][row["layer"], row["head"]] == row["entropy"]
    effects = [r for r in rows(run.store, "head_effects") if r["step"] == STEPS and r["ablation"] == "mean"]
    assert effects
    for row in effects:
        assert heads["loss without the head"][row["layer"], row["head"]] == row["effect"]


def test_pathways_pass_each_layer_once(run):
    body = run.figure("pathways").body
    assert (body.target, len(body.tokens), body.layers) == (23, 24, 2)
    bottom, top = (sum(edge.share for edge in body.edges if edge.layer == layer) for layer in range(2))
    with connect(run.store) as connection:
        (brought,) = connection.execute("SELECT sum(share) FROM pathways WHERE to_position = 23").fetchone()
    assert 0 < brought <= 1
    assert (bottom, top) == pytest.approx((brought, brought))
    assert f"together they bring {percent(brought)} of what arrives" in run.figure("pathways").caption


def test_the_run_introduces_itself(run):
    (about,) = run.report.runs
    facts = dict(about.facts)
    assert facts["Model"] == "LlamaForCausalLM"
    assert facts["Optimizer"].startswith("AdamW")
    assert (facts["Steps"], facts["Shape"]) == ("12", "2 layers, 4 heads a layer, 32 wide, 64 tokens")
    assert about.state.startswith("running, or ended just now")
