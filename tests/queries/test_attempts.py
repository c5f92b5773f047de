"""Which rows of a run that was started again survive: those that no later attempt has captured anew."""

from __future__ import annotations

import pytest
from planted import ask, plant

from lm_telemetry.store import Store


@pytest.fixture
def store(tmp_path):
    return Store.open_for_writing(tmp_path / "store")


def steps(*numbers):
    return [{"step": number, "loss": 1.0} for number in numbers]


def survivors(store, table):
    return [(r["step"], r["attempt"]) for r in ask(store, f"FROM {table} ORDER BY step, attempt")]


def test_a_later_attempt_overtakes_from_its_first_step_on(store):
    plant(store, "steps", steps(1, 2, 3, 4, 5))
    plant(store, "steps", steps(4, 5, 6), attempt=1)
    plant(store, "steps", steps(3, 4), attempt=2)
    assert survivors(store, "steps") == [(1, 0), (2, 0), (3, 2), (4, 2)]
    assert len(survivors(store, "raw.steps")) == 10


def test_an_attempt_without_steps_is_overtaken_too(store):
    plant(store, "layers", [{"step": 5, "rms": 1.0}])
    plant(store, "steps", steps(1, 2), attempt=1)
    plant(store, "layers", [{"step": 2, "rms": 2.0}], attempt=1)
    assert survivors(store, "layers") == [(2, 1)]
    assert survivors(store, "raw.layers") == [(2, 1), (5, 0)]


def test_an_attempt_that_captured_no_step_overtakes_nothing(store):
    plant(store, "steps", steps(1, 2))
    plant(store, "events", [{"step": 0, "kind": "k"}], attempt=1)
    assert survivors(store, "steps") == [(1, 0), (2, 0)]


def test_ranks_and_runs_are_cut_apart(store):
    plant(store, "steps", steps(1, 2, 3))
    plant(store, "steps", steps(1, 2, 3), rank=1)
    plant(store, "steps", steps(1, 2, 3), run_id="other")
    plant(store, "steps", steps(2), attempt=1)
    found = ask(store, "SELECT run_id, rank, count(*) AS n FROM steps GROUP BY run_id, rank ORDER BY run_id, rank")
    assert [(r["run_id"], r["rank"], r["n"]) for r in found] == [("other", 0, 3), ("r", 0, 2), ("r", 1, 3)]
