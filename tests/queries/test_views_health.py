"""The views of layers, pairs of runs and events on planted rows whose answers are known."""

from __future__ import annotations

from datetime import timedelta
from functools import partial

import numpy as np
import planted
import pytest
from planted import START, by

approx = pytest.approx
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def plant(store):
    return partial(planted.plant, store)


@pytest.fixture
def ask(store):
    return partial(planted.ask, store)


def layer(step, rms, *, index=0, zero_fraction=0.0, nonfinite=0):
    place = {"stack": "decoder", "layer": index, "site": "resid"}
    return {"step": step, "rms": rms, "zero_fraction": zero_fraction, "nonfinite": nonfinite} | place


# -- dead layers ---------------------------------------------------------------------------------------------------


def test_a_layer_that_explodes_has_its_rate(plant, ask):
    at = np.arange(10, 410, 10)
    logs = 0.015 * at + np.random.default_rng(0).normal(0, 0.05, len(at))
    plant("layers", [layer(int(s), float(np.exp(y))) for s, y in zip(at, logs, strict=True)])
    plant("layers", [layer(int(s), 1.0, index=1) for s in at])
    (row,) = ask("FROM dead_layers")
    (slope, _), covariance = np.polyfit(at, logs, 1, cov=True)
    assert (row["layer"], row["problem"], row["captures_in_all"], row["is_present"]) == (0, "exploding", 40, True)
    assert (row["trend"], row["trend_stderr"]) == (approx(slope, rel=1e-4), approx(covariance[0, 0] ** 0.5, rel=1e-3))
    before = np.array([logs[:i].mean() if i >= 10 else np.inf for i in range(len(at))])
    onset = np.flatnonzero(logs > before + np.log(10))[0]
    above = at[onset:][logs[onset:] > before[onset] + np.log(10)]
    assert len(above) > 5
    assert (row["since_step"], row["captures"]) == (at[onset], len(above))
    assert row["usual_rms"] == approx(np.exp(before[onset]), rel=1e-5)
    assert row["rms"] / row["first_rms"] == approx(np.exp(logs[-1] - logs[0]), rel=1e-5)


def test_a_layer_that_vanishes_dies_after_it(plant, ask):
    plant("layers", [layer(100 * i, 10.0**-i) for i in range(1, 10)], run_id="short")
    plant("layers", [layer(100 * i, 1.0) for i in range(-9, 1)] + [layer(100 * i, 10.0**-i) for i in range(1, 10)])
    found = by(ask("FROM dead_layers"), "run_id", "problem")
    # 1 ten times, .1, .01, ...: in float32 a tenth is a hair above .1, and a millionth below 1e-6.
    assert {p: (r["since_step"], r["captures"], r["is_present"]) for p, r in found.items()} == {
        ("r", "vanishing"): (200, 8, True),
        ("r", "dead"): (600, 4, True),
        ("short", "dead"): (600, 4, True),
    }
    assert found["short", "dead"]["trend"] == approx(-np.log(10) / 100, rel=1e-6)
    assert found["short", "dead"]["trend_stderr"] == approx(0.0, abs=1e-8)
    assert (found["r", "vanishing"]["usual_rms"], found["short", "dead"]["usual_rms"]) == (
        approx(0.1 ** (1 / 11)),
        None,
    )


def test_a_level_that_is_left_for_good_stays_a_problem_and_one_that_is_found_again_does_not(plant, ask):
    for run, course in {"left": [1.0] * 50 + [20.0] * 50, "back": [1.0] * 50 + [20.0] * 10 + [2.0] * 40}.items():
        plant("layers", [layer(10 * i, rms) for i, rms in enumerate(course)], run_id=run)
    found = by(ask("FROM dead_layers"), "run_id")
    told = {run: (r["problem"], r["since_step"], r["captures"], r["is_present"]) for run, r in found.items()}
    assert told == {"left": ("exploding", 500, 50, True), "back": ("exploding", 500, 10, False)}
    assert {run: row["flag"] for run, row in by(ask("FROM layer_health"), "run_id").items()} == {
        "left": "exploding",
        "back": "ok",
    }


def test_zeros_and_nonfinite_entries_are_told_with_their_steps(plant, ask):
    shares = {10: 0.2, 20: 0.9995, 30: 1.0, 40: NAN, 50: 0.3}
    plant("layers", [layer(s, 1.0, zero_fraction=z) for s, z in shares.items()], run_id="zeros")
    plant(
        "layers", [layer(s, None if n else 2.0, nonfinite=n) for s, n in ((1, 5), (2, 0), (3, 7))], run_id="nan", rank=3
    )
    plant("layers", [layer(1, INFINITY), layer(2, NAN), layer(3, None), layer(4, 0.0)], run_id="odd")
    found = by(ask("FROM dead_layers"), "run_id", "problem")
    chosen = {k: (r["rank"], r["since_step"], r["last_step"], r["captures"], r["is_present"]) for k, r in found.items()}
    assert chosen == {
        ("zeros", "dead"): (0, 20, 30, 2, False),
        ("nan", "nonfinite"): (3, 1, 3, 2, True),
        ("odd", "dead"): (0, 4, 4, 1, True),
    }
    assert (found["nan", "nonfinite"]["first_rms"], found["nan", "nonfinite"]["nonfinite"]) == (2.0, 12)
    assert found["odd", "dead"]["trend"] is None


# -- pairs of runs -------------------------------------------------------------------------------------------------


def test_runs_are_compared_at_matched_steps(plant, ask):
    random = np.random.default_rng(0)
    common, gap = random.normal(3, 1, 60), random.normal(0.5, 0.1, 60)
    for rank in range(2):  # a rank sees more, or less, than the mean
        rows = [
            {"step": s, "loss": x + rank - 0.5, "tokens": 10, "learning_rate": 1e-3, "grad_norm": 2.0}
            for s, x in enumerate(common, start=1)
        ]
        plant("steps", rows, run_id="a", rank=rank)
    rows = [{"step": s, "loss": x + d, "tokens": 30} for s, (x, d) in enumerate(zip(common, gap, strict=True), start=1)]
    plant("steps", [row for row in rows if row["step"] % 2 == 0], run_id="b")
    plant("steps", [{"step": 61, "loss": 1.0}], run_id="c")  # no step in common
    pairs = ask("FROM compare_runs")
    assert {(row["run_a"], row["run_b"]) for row in pairs} == {("a", "b"), ("b", "a")}
    forth = ask("FROM compare_runs WHERE run_a = 'a' AND run_b = 'b' ORDER BY step")
    assert [row["step"] for row in forth] == list(range(2, 61, 2))
    last = forth[-1]
    assert last["loss_difference"] == approx(-gap[-1])
    assert last["smoothed_loss_a"] == approx(common[-20:].mean())
    assert last["smoothed_difference"] == approx(common[-20:].mean() - (common + gap)[1::2][-20:].mean())
    assert last["difference_stderr"] == approx(gap[1::2][-20:].std(ddof=1) / 20**0.5)
    assert (last["tokens_a"], last["tokens_b"], last["learning_rate_a"], last["learning_rate_b"]) == (
        1200,
        900,
        1e-3,
        None,
    )
    (back,) = ask("FROM compare_runs WHERE run_a = 'b' AND run_b = 'a' AND step = 60")
    assert back["loss_difference"] == approx(gap[-1])
    assert forth[0]["difference_stderr"] is None


def test_a_run_that_diverged_is_compared_as_it_is(plant, ask):
    plant("steps", [{"step": s, "loss": x} for s, x in enumerate([1.0, 2.0, 4.0, 5.0], start=1)], run_id="a")
    plant("steps", [{"step": s, "loss": x} for s, x in enumerate([0.5, 1.5, NAN, None], start=1)], run_id="b")
    rows = ask("FROM compare_runs WHERE run_a = 'a' ORDER BY step")
    assert [row["difference_stderr"] for row in rows] == [None, 0.0, 0.0, 0.0]
    assert planted.is_nan(rows[2]["loss_difference"])
    assert (rows[3]["loss_b"], rows[3]["loss_difference"]) == (None, None)


# -- events --------------------------------------------------------------------------------------------------------


def test_events_are_summed_by_kind(plant, ask):
    def event(step, severity="warning", kind="k", message="m"):
        return {"step": step, "severity": severity, "kind": kind, "message": message}

    plant("events", [event(0, "info", "z"), event(3), event(9, message="late"), event(4, "error", "b")])
    plant("events", [event(7, message="other")], rank=1)
    plant("events", [event(2, message=None)], run_id="s")
    rows = ask("FROM events_summary")
    assert [(r["run_id"], r["severity"], r["kind"], r["events"], r["ranks"], r["message"]) for r in rows] == [
        ("r", "error", "b", 1, 1, "m"),
        ("r", "warning", "k", 3, 2, "late"),
        ("r", "info", "z", 1, 1, "m"),
        ("s", "warning", "k", 1, 1, None),
    ]
    assert (rows[1]["first_step"], rows[1]["last_step"], rows[1]["attempts"]) == (3, 9, 1)
    start = START.replace(tzinfo=None)
    assert (rows[1]["first_time"], rows[1]["last_time"]) == (start + timedelta(seconds=3), start + timedelta(seconds=9))
