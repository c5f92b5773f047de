"""What each instrument took of the training thread is stored, and adds up to what the agent took in all."""

from __future__ import annotations

import time
from itertools import groupby

import pytest
from stored import events, rows
from tiny_models import batch, build, dataset
from transformers import Trainer, TrainingArguments

from lm_telemetry import TelemetryCallback, observe
from lm_telemetry.agent import Agent
from lm_telemetry.settings import Settings


def steps_of(found):
    return [step for step, _ in groupby(row["step"] for row in found)]


def assert_adds_up(store, attempt=0):
    """Up to each step with rows, they hold all that the steps have; what comes after the last is not settled yet."""
    steps, found = rows(store, "steps", attempt=attempt), rows(store, "overhead", attempt=attempt)
    assert found
    for last in steps_of(found):
        by_step = sum(s["telemetry_seconds"] for s in steps if s["step"] <= last)
        by_instrument = sum(r["seconds"] for r in found if r["step"] <= last)
        assert by_instrument == pytest.approx(by_step, rel=1e-9)


@pytest.mark.parametrize("mode", ["taps", "shadow"])
def test_a_training_run_accounts_for_every_instrument(tmp_path, store, mode):
    cadences = {"activations": 2, "parameters": 3, "critical_sharpness": 4}
    instruments = {name: {"every": every} for name, every in cadences.items()}
    callback = TelemetryCallback(store=store, mode=mode, instruments=instruments, strict=True)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=11,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=build("llama"), args=arguments, train_dataset=dataset(), callbacks=[callback]).train()
    assert len(rows(store, "steps")) == 11
    assert_adds_up(store)
    found = rows(store, "overhead")
    assert steps_of(found) == [1, 2, 3, 4, 6, 8, 9, 10]
    assert all(row["seconds"] > 0 for row in found)
    tables = {"activations": "layers", "parameters": "params", "critical_sharpness": "curvature"}
    for name, table in tables.items():
        own = [row for row in found if row["instrument"] == name]
        assert [row["step"] for row in own if row["captures"]] == steps_of(rows(store, table))
        assert {(row["captures"], row["every"]) for row in own} <= {(0, cadences[name]), (1, cadences[name])}
    shared = {r["instrument"]: (r["captures"], r["every"]) for r in found if r["instrument"] not in tables}
    expected = {"agent", "snapshot", "shadow"} if mode == "shadow" else {"agent", "snapshot"}
    assert shared == dict.fromkeys(expected, (None, None))
    assert not events(store, "capture_failed")


def test_an_instrument_that_captures_nothing_still_costs(store):
    model = build("llama")
    with observe(model, store=store, every=1, instruments=["parameters", "activations"], strict=True) as session:
        model(**batch())
        session.step()  # no optimizer has stepped
    found = {row["instrument"]: row for row in rows(store, "overhead")}
    assert found["parameters"]["captures"] == 0 < found["parameters"]["seconds"]
    assert found["activations"]["captures"] == 1


def test_an_abandoned_step_is_charged_to_the_next_rows(store):
    model = build("llama")
    agent = Agent(Settings(store=store, instruments={"activations": {"every": 3}}, strict=True))
    agent.attach(model)
    agent.begin_step(1)
    model(**batch())
    for step in (2, 3):
        agent.begin_step(step)
        model(**batch())
        agent.end_step()
    agent.detach()
    assert [s["step"] for s in rows(store, "steps")] == [2, 3]
    assert steps_of(rows(store, "overhead")) == [3]
    assert_adds_up(store)


def test_handing_over_is_charged_to_the_next_step(store, monkeypatch):
    model = build("llama")
    agent = Agent(Settings(store=store, instruments={"activations": {"every": 2}}, strict=True))
    agent.attach(model)
    submit = agent.session.submit

    def slow(*args):
        time.sleep(0.05)
        submit(*args)

    for step in (1, 2):
        agent.begin_step(step)
        model(**batch())
        with monkeypatch.context() as patch:
            patch.setattr(agent.session, "submit", slow)
            agent.end_step()
    agent.detach()
    assert rows(store, "steps", step=2)[0]["telemetry_seconds"] >= 2 * 0.05  # one capture and the step's own row
    assert_adds_up(store)


def test_a_second_run_of_an_agent_does_not_pay_for_the_first(store):
    model = build("llama")
    agent = Agent(Settings(store=store, run_id="r", instruments={"activations": {"every": 2}}, strict=True))
    for _ in range(2):
        agent.attach(model)
        for step in (1, 2, 3):
            agent.begin_step(step)
            model(**batch())
            agent.end_step()
        agent.detach()
    for attempt in (0, 1):
        assert len(rows(store, "steps", attempt=attempt)) == 3
        assert_adds_up(store, attempt)
