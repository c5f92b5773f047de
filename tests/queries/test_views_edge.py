"""The views `edge_onset`, `catapult` and the errors of `sharpening` on planted rows whose answers are known."""

from __future__ import annotations

from functools import partial

import numpy as np
import planted
import pytest
from planted import by

approx = pytest.approx
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def plant(store):
    return partial(planted.plant, store)


@pytest.fixture
def ask(store):
    return partial(planted.ask, store)


def estimates(values, *, threshold=100.0, operator="hessian", estimator="lanczos", index=0):
    about = {"operator": operator, "scope": "all", "estimator": estimator, "index": index, "threshold": threshold}
    return [{"step": step, "value": value} | about for step, value in values.items()]


def losses(values, **columns):
    return [{"step": step, "loss": loss} | columns for step, loss in values.items()]


# -- sharpening ----------------------------------------------------------------------------------------------------


def test_the_slope_of_sharpening_has_its_standard_error(plant, ask):
    at = np.arange(10, 410, 10)
    values = 5.0 + 0.2 * at + np.random.default_rng(0).normal(0, 2, len(at))
    later = {400 + 10 * i: 100.0 for i in range(1, 20)}
    plant("curvature", estimates(dict(zip(at.tolist(), values.tolist(), strict=True)) | later))
    plant("curvature", estimates({10: 1.0, 20: 3.0}), run_id="two")
    plant(
        "curvature", estimates({10: 1.0, 20: 3.0, 30: 5.0, 40: NAN, 50: INFINITY, 60: None}), run_id="straight", rank=1
    )
    rows = by(ask("FROM sharpening"), "run_id")
    (slope, _), covariance = np.polyfit(at, values, 1, cov=True)
    assert (rows["r"]["fitted"], rows["r"]["slope"]) == (40, approx(slope))
    assert rows["r"]["slope_stderr"] == approx(covariance[0, 0] ** 0.5)
    assert abs(slope - 0.2) < 3 * rows["r"]["slope_stderr"]
    assert (rows["two"]["slope"], rows["two"]["slope_stderr"]) == (approx(0.2), None)
    straight = rows["straight"]
    assert (straight["captures"], straight["slope"], straight["slope_stderr"]) == (
        3,
        approx(0.2),
        approx(0.0, abs=1e-8),
    )


# -- onset of the edge ---------------------------------------------------------------------------------------------


def test_the_onset_is_the_first_passing_that_lasts(plant, ask):
    # One capture beyond the line at 30 is none; from 60 on the ratio hovers about 1.
    values = {10: 50.0, 20: 70.0, 30: 92.0, 40: 80.0, 50: 85.0, 60: 95.0, 70: 88.0, 80: 104.0, 90: 99.0, 100: 101.0}
    plant("curvature", estimates(values))
    plant("steps", losses({58: 1.5, 60: 1.2, 70: 1.1}))
    plant("runs", [{"step": 0, "optimizer": "SGD"}])
    (row,) = ask("FROM edge_onset")
    assert (row["optimizer"], row["captures"], row["onset_step"], row["previous_step"]) == ("SGD", 10, 60, 50)
    assert (row["from_below"], row["onset_loss"], row["onset_value"], row["onset_threshold"]) == (
        True,
        1.2,
        95.0,
        100.0,
    )
    after = np.array([0.88, 1.04, 0.99, 1.01])
    assert (row["plateau_captures"], row["plateau_mean"]) == (4, approx(after.mean()))
    assert (row["plateau_sd"], row["plateau_at_edge"]) == (approx(after.std(ddof=1)), 0.75)
    assert (row["last_step"], row["last_ratio"]) == (100, 1.01)
    assert ask("SELECT onset_step FROM sharpening") == [{"onset_step": 30}]


@pytest.mark.parametrize(
    ("values", "onset"),
    [
        ([50, 60, 70, 80, 90], (None, None, None)),
        ([50, 95, 96, 97], (20, 10, True)),
        ([50, 95, 96], (None, None, None)),  # two captures are too few to say
        ([50, 95, 50, 95, 50, 50], (None, None, None)),  # two of five
        ([50, 95, 50, 95, 50, 95], (20, 10, True)),  # three of five
        ([95, 95, 95, 50, 50], (10, None, False)),
        ([NAN, 50, INFINITY, 95, 95, 95, None], (40, 20, True)),
        ([-5, -3, 0], (None, None, None)),
    ],
)
def test_the_onset_of(values, onset, plant, ask):
    plant("curvature", estimates({10 * i: v for i, v in enumerate(values, start=1)}))
    (row,) = ask("FROM edge_onset")
    assert (row["onset_step"], row["previous_step"], row["from_below"]) == onset


def test_a_plateau_of_planted_mean_and_spread(plant, ask):
    random = np.random.default_rng(0)
    hovering = {1000 + 10 * i: float(x) for i, x in enumerate(random.normal(1, 0.02, 500) * 38e3)}
    rising = {10 * i: 38e3 * (0.2 + 0.007 * i) for i in range(2, 100)}
    plant("curvature", estimates(rising | hovering, operator="preconditioned", threshold=38e3), run_id="adam", rank=2)
    (row,) = ask("FROM edge_onset")
    assert row["onset_step"] == 10 * 101 - 10  # .2 + .007 i reaches .893 at 990, and the plateau begins at 1000
    assert row["plateau_mean"] == approx(1.0, abs=3 * 0.02 / 500**0.5)
    assert row["plateau_sd"] == approx(0.02, rel=0.1)


def test_an_estimate_is_held_against_its_own_threshold_only(plant, ask):
    at_edge = {20: 95.0, 30: 99.0, 40: 101.0}
    plant("runs", [{"step": 0, "optimizer": "AdamW"}])
    plant("curvature", estimates(at_edge, threshold=None))  # the raw Hessian under Adam
    plant(
        "curvature",
        estimates({s: 10 * v for s, v in at_edge.items()} | {10: 1e9}, operator="preconditioned", threshold=1e3),
    )
    plant("curvature", estimates({s: 0.1 * v for s, v in at_edge.items()}, estimator="critical", index=None))
    plant("curvature", estimates({s: 9 * v for s, v in at_edge.items()}, index=1))
    plant("curvature", estimates(at_edge), run_id="sgd")
    rows = ask("FROM edge_onset")
    assert [(r["run_id"], r["optimizer"], r["operator"], r["estimator"], r["onset_step"]) for r in rows] == [
        ("r", "AdamW", "hessian", "critical", None),
        ("r", "AdamW", "preconditioned", "lanczos", 20),  # the first ten steps are left out
        ("sgd", None, "hessian", "lanczos", 20),
    ]


# -- catapult ------------------------------------------------------------------------------------------------------

RISE_AND_FALL = {1: 2.0, 2: 2.1, 3: 5.0, 4: 9.0, 5: 3.0, 6: 1.5, 7: 1.0, 8: 0.9}
FALLING = {1: 150.0, 2: 152.0, 3: 151.0, 5: 80.0, 8: 57.0}


def test_a_catapult_is_measured(plant, ask):
    plant("steps", losses(RISE_AND_FALL, learning_rate=0.02))
    plant("curvature", estimates(FALLING))  # 2/lr = 100
    (row,) = ask("FROM catapult")
    assert row == {
        "run_id": "r", "rank": 0, "operator": "hessian", "scope": "all", "estimator": "lanczos", "captures": 5,
        "first_loss": 2.0, "peak_step": 4, "peak_loss": 9.0, "last_loss": 0.9,
        "value_before": 152.0, "ratio_before": 1.52, "rate_times_value": approx(3.04), "value_after": 57.0,
        "fall": 57 / 152,
        "is_unstable": True, "has_peak": True, "has_flattened": True, "has_recovered": True, "is_catapult": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "value", "missing"),
    [
        ({}, {1: 90.0, 2: 99.0, 3: 98.0, 8: 40.0}, "is_unstable"),
        ({3: 2.0, 4: 2.1, 5: 2.0}, {}, "has_peak"),
        ({}, {8: 77.0}, "has_flattened"),
        ({8: 2.2}, {}, "has_recovered"),
        ({8: NAN}, {}, "has_recovered"),
        ({}, {5: NAN, 8: NAN}, "has_flattened"),
    ],
)
def test_what_is_no_catapult(loss, value, missing, plant, ask):
    plant("steps", losses(RISE_AND_FALL | loss))
    plant("curvature", estimates(FALLING | value))
    (row,) = ask("FROM catapult")
    assert [name for name in row if name.startswith(("is_", "has_")) and not row[name]] == [missing, "is_catapult"]


def test_only_the_first_steps_of_each_run_count(plant, ask):
    plant("steps", losses({100 * s: loss for s, loss in RISE_AND_FALL.items()}), run_id="late")
    plant("curvature", estimates({100 * s: v for s, v in FALLING.items()}), run_id="late")
    plant("steps", losses(RISE_AND_FALL), run_id="a", rank=1)
    plant("curvature", estimates(FALLING), run_id="a", rank=1)
    plant("curvature", estimates(FALLING, estimator="critical", index=None), run_id="a", rank=1)
    plant("steps", losses({1: 3.0, 100: 2.0}), run_id="b")
    plant("curvature", estimates({1: 10.0, 100: 20.0}), run_id="b")
    plant("steps", losses({1: NAN, 2: NAN}), run_id="nan")
    plant("curvature", estimates(FALLING), run_id="nan")
    plant("steps", losses(dict.fromkeys(FALLING)), run_id="null")
    plant("curvature", estimates(FALLING), run_id="null")
    found = ask("SELECT run_id, rank, estimator, captures, is_catapult FROM catapult")
    assert [tuple(row.values()) for row in found] == [
        ("a", 1, "lanczos", 5, True),
        ("b", 0, "lanczos", 2, False),
        ("late", 0, "lanczos", 2, False),
        ("nan", 0, "lanczos", 5, False),
    ]
