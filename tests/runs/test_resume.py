"""Training that goes on from a checkpoint is the same run: its next attempt, with one surviving history."""

from __future__ import annotations

import json
import socket

import pytest
import torch
from stored import rows
from tiny_models import VOCAB, batch, build
from transformers import Trainer, TrainingArguments

from lm_telemetry import TelemetryCallback, observe
from lm_telemetry.errors import SettingsError
from lm_telemetry.queries import connect


def train(tmp_path, callback, *, max_steps, resume=None, **arguments):
    torch.manual_seed(0)
    ids = torch.randint(3, VOCAB, (32, 12), generator=torch.Generator().manual_seed(0))
    trainer = Trainer(
        model=build("llama"),
        args=TrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=2,
            save_steps=3,
            max_steps=max_steps,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer.callback_handler.callbacks


@pytest.mark.parametrize("restore", [False, True], ids=["same callback class", "callbacks restored by the Trainer"])
def test_a_resumed_run_is_the_next_attempt_and_the_tables_show_what_survived(store, tmp_path, restore):
    first = TelemetryCallback(store=store, every=1, instruments=["activations"], prometheus_port=0)
    train(tmp_path, first, max_steps=5)
    second = TelemetryCallback(store=store, every=1, instruments=["activations"], prometheus_port=0)
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    callbacks = train(tmp_path, second, max_steps=7, resume=checkpoint, restore_callback_states_from_checkpoint=restore)
    (second,) = [c for c in callbacks if isinstance(c, TelemetryCallback)]
    assert second.run_id == first.run_id

    con = connect(store)
    surviving = [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 1), (7, 1)]
    for table in ("steps", "layers"):
        assert con.execute(f"SELECT DISTINCT step, attempt FROM {table} ORDER BY step").fetchall() == surviving
        kept = {(r["step"], r["attempt"]) for r in rows(store, table)}
        assert kept == {*surviving, (4, 0), (5, 0)}, "nothing is lost"
        assert {*con.execute(f"SELECT step, attempt FROM raw.{table}").fetchall()} == kept
    told = con.execute("SELECT attempt, max_steps FROM runs ORDER BY attempt").fetchall()
    assert told == [(0, 5), (1, 7)], "each launch is described"


def test_a_second_training_in_one_process_is_a_run_of_its_own(store, tmp_path):
    callback = TelemetryCallback(store=store, instruments=["activations"])
    train(tmp_path, callback, max_steps=1)
    first = callback.run_id
    train(tmp_path, callback, max_steps=1)
    assert callback.run_id != first


def test_the_settings_name_comes_before_the_checkpoint_s(store, tmp_path):
    train(tmp_path, TelemetryCallback(store=store, instruments=["activations"], run_id="one"), max_steps=3)
    other = TelemetryCallback(store=store, instruments=["activations"], run_id="two")
    train(tmp_path, other, max_steps=4, resume=str(tmp_path / "out" / "checkpoint-3"))
    assert other.run_id == "two"


def test_a_checkpoint_of_a_run_without_telemetry_is_no_obstacle(store, tmp_path):
    train(tmp_path, TelemetryCallback(store=store, instruments=["activations"]), max_steps=3)
    state = tmp_path / "out" / "checkpoint-3" / "trainer_state.json"
    document = json.loads(state.read_text())
    document["stateful_callbacks"].pop("TelemetryCallback")
    state.write_text(json.dumps(document))
    callback = TelemetryCallback(store=store, instruments=["activations"])
    train(tmp_path, callback, max_steps=4, resume=str(tmp_path / "out" / "checkpoint-3"))
    assert {r["step"] for r in rows(store, "steps", run_id=callback.run_id)} == {4}


def test_a_callback_for_a_port_that_an_idle_one_holds_takes_it_over(store):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = TelemetryCallback(store=store, prometheus_port=port)
    two = TelemetryCallback(store=store, prometheus_port=port)
    assert one.address is None
    assert two.address is not None
    two._agent.session.give_up_port(port)


def test_a_loop_of_one_s_own_goes_on_by_naming_its_run(store):
    model = build("llama")
    for done in (0, 2):
        with observe(model, store=store, run_id="mine", steps_done=done, instruments=["activations"]) as session:
            for _ in range(4):
                model(**batch()).loss.backward()
                session.step()
    found = connect(store).execute("SELECT step, attempt FROM steps ORDER BY step").fetchall()
    assert found == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 1)]


@pytest.mark.parametrize("max_steps", [0, -1, 1.5, True, "3"])
def test_an_end_that_is_no_step_is_refused(store, max_steps):
    with pytest.raises(SettingsError, match="max_steps: expected a number of steps, at least 1"):
        observe(build("llama"), store=store, max_steps=max_steps)


@pytest.mark.parametrize("steps_done", [-1, 1.5, True, "3"])
def test_a_number_of_steps_that_is_none_is_refused(store, steps_done):
    with pytest.raises(SettingsError, match="steps_done"):
        observe(build("llama"), store=store, steps_done=steps_done)
