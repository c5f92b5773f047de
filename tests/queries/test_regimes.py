"""The views `regimes` and `sharpening` on planted rows, against answers worked out by hand."""

from __future__ import annotations

import planted
import pytest

from lm_telemetry.queries import connect

BELOW, SHARPENING, EDGE, CATAPULT = "below", "progressive sharpening", "edge of stability", "catapult"


@pytest.fixture
def plant(put):
    """`plant({step: value}, threshold=100)` writes one estimate a step."""

    def write(values, *, threshold=100.0, operator="hessian", estimator="lanczos", index=0, **where):
        for step, value in values.items():
            columns = {"operator": [operator], "scope": ["all"], "estimator": [estimator], "index": [index]}
            put("curvature", step, value=[value], threshold=[threshold], **columns, **where)

    return write


@pytest.fixture
def ask(store):
    def answer(query):
        relation = connect(store.path).sql(query)
        return [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]

    return answer


@pytest.fixture
def labels(ask):
    """`labels()`: regime by step."""
    return lambda where="true": {r["step"]: r["regime"] for r in ask(f"FROM regimes WHERE {where}")}


def test_the_four_regimes_in_the_order_of_their_discovery(plant, labels, ask):
    rising = {step: 10.0 + step for step in range(10, 80, 10)}
    plant({1: 20.0} | rising | {80: 91.0, 90: 104.0, 100: 85.0, 110: 99.0} | dict.fromkeys(range(200, 300, 10), 30.0))
    found = labels()
    assert found[1] == found[10] == BELOW  # fewer than three captures, no trend
    # From three captures on, the line is known: of 20, 20, 30 at 1, 10, 20 the correlation is .85.
    assert {found[step] for step in range(20, 80, 10)} == {SHARPENING}
    assert {found[step] for step in (80, 90, 100, 110)} == {EDGE}  # 100 in a dip
    assert {found[step] for step in range(200, 300, 10)} == {BELOW}
    (at,) = ask("FROM regimes WHERE step = 70")
    assert (at["value"], at["threshold"], at["ratio"], at["training_loss"]) == (80.0, 100.0, 0.8, None)


def test_the_trend_is_the_least_squares_line(plant, ask):
    plant({step: 3.0 + 0.2 * step for step in range(10, 130, 10)})
    rows = ask("FROM regimes ORDER BY step")
    assert rows[0]["trend"] is None
    assert [r["trend"] for r in rows[1:]] == pytest.approx([0.2] * 11)
    # Nine captures 40 to 120 span 80 steps, and their mean is 3 + .2 * 80.
    assert rows[-1]["rise"] == pytest.approx(0.2 * 80 / 19)


@pytest.mark.parametrize(
    ("values", "regime"),
    [
        ([10.0, 10.0, 10.0], BELOW),
        ([10.0, 10.04, 10.08], BELOW),  # less than the estimators resolve
        ([10.0, 10.1, 10.2], SHARPENING),
        ([10.0, 12.0, 14.0, 9.0, 13.0], BELOW),  # no trend in the scatter
        ([30.0, 20.0, 10.0], BELOW),
        ([-30.0, -20.0, -10.0], SHARPENING),  # leaving a saddle
        ([10.0, 20.0, 95.0], EDGE),
        ([10.0, 20.0, 90.0], SHARPENING),
        ([0.0, 0.0, 0.0], BELOW),
    ],
)
def test_the_last_capture_of(values, regime, plant, labels):
    plant({10 * (i + 1): value for i, value in enumerate(values)})
    assert labels()[10 * len(values)] == regime


@pytest.mark.parametrize(
    ("dip", "length", "regime"),
    [(60.0, 1, EDGE), (60.0, 5, EDGE), (60.0, 10, BELOW), (49.0, 1, BELOW)],
)
def test_a_dip_belongs_to_the_edge_if_it_is_short_and_shallow(dip, length, regime, plant, labels):
    values = [100.0] * 3 + [dip] * length + [100.0] * 3
    plant({10 * (i + 1): value for i, value in enumerate(values)})
    found = labels()
    assert found[10 * (3 + (length + 1) // 2)] == (regime if length < 10 else found[80])
    # Of ten captures in a row none has the edge within five on both sides.
    assert (EDGE in list(found.values())[3 : 3 + length]) == (regime == EDGE)


def losses(put, values):
    for step, loss in values.items():
        put("steps", step, loss=[loss])


RISE_AND_FALL = {1: 2.0, 2: 2.1, 3: 5.0, 4: 9.0, 5: 3.0, 6: 1.5, 7: 1.0, 8: 0.9}
FALLING_SHARPNESS = {1: 150.0, 2: 152.0, 3: 150.0, 4: 120.0, 5: 80.0, 6: 60.0, 7: 58.0, 8: 57.0}


def test_a_catapult(put, plant, labels):
    losses(put, RISE_AND_FALL)
    plant(FALLING_SHARPNESS)
    # Take-off at each capture above 100 before the loss is past its peak (1, 2, 3); the last one's half is 75.
    assert labels() == dict.fromkeys(range(1, 7), CATAPULT) | {7: BELOW, 8: BELOW}


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        ({4: 2.05, 3: 2.0, 5: 1.9}, {}),  # no peak worth the name
        ({7: 8.0, 8: 9.0}, {}),  # the loss does not come back: it blew up
        ({8: float("nan")}, {}),
        ({}, {6: 81.0, 7: 81.0, 8: 81.0}),  # the sharpness does not fall to half
        ({}, {1: 90.0, 2: 91.0, 3: 92.0}),  # it was never above the threshold when the loss was low
    ],
    ids=["no peak", "diverged", "not finite", "mild", "stable"],
)
def test_no_catapult(loss, value, put, plant, labels):
    losses(put, RISE_AND_FALL | loss)
    plant(FALLING_SHARPNESS | value)
    assert CATAPULT not in labels().values()


def test_a_catapult_is_over_within_200_steps(put, plant, labels):
    losses(put, {100 * step: loss for step, loss in RISE_AND_FALL.items()})
    plant({100 * step: value for step, value in FALLING_SHARPNESS.items()})
    assert CATAPULT not in labels().values()


def test_a_direction_has_no_catapult(put, plant, labels):
    losses(put, RISE_AND_FALL)
    plant(FALLING_SHARPNESS, estimator="critical", index=None)
    assert labels()[1] == EDGE


def test_a_later_catapult_is_seen_too(put, plant, labels):
    losses(put, {1: 3.0} | {1000 + step: loss for step, loss in RISE_AND_FALL.items()})
    plant(dict.fromkeys(range(900, 1000, 10), 99.0) | {1000 + s: v for s, v in FALLING_SHARPNESS.items()})
    found = labels()
    assert found[990] == EDGE
    assert {found[1000 + step] for step in range(1, 7)} == {CATAPULT}


def test_series_are_kept_apart(plant, labels, ask):
    plant({10: 10.0, 20: 20.0, 30: 30.0})
    plant({10: 30.0, 20: 20.0, 30: 10.0}, operator="preconditioned", threshold=5.0)
    plant({10: 95.0, 20: 95.0, 30: 95.0}, run_id="other")
    plant({10: 95.0, 20: 95.0, 30: 95.0}, rank=1)
    plant({30: 9.0}, index=1)
    plant({30: 9.0}, threshold=None, estimator="hutchinson")
    last = {(r["run_id"], r["rank"], r["operator"]): r["regime"] for r in ask("FROM regimes WHERE step = 30")}
    assert last == {
        ("r", 0, "hessian"): SHARPENING,
        ("r", 0, "preconditioned"): EDGE,
        ("other", 0, "hessian"): EDGE,
        ("r", 1, "hessian"): EDGE,
    }
    # Of the preconditioned operator the first ten steps are left out.
    assert list(labels("operator = 'preconditioned'")) == [20, 30]


def test_an_overtaken_launch_is_left_out(store, labels):
    def launch(attempt, losses, values):
        estimate = {"operator": "hessian", "scope": "all", "estimator": "lanczos", "index": 0, "threshold": 100.0}
        planted.plant(store, "steps", [{"step": s, "loss": loss} for s, loss in losses.items()], attempt=attempt)
        planted.plant(
            store, "curvature", [{"step": s, "value": v} | estimate for s, v in values.items()], attempt=attempt
        )

    launch(0, RISE_AND_FALL, FALLING_SHARPNESS)
    assert CATAPULT in labels().values()
    launch(1, {3: 2.0}, dict.fromkeys((3, 4, 5), 50.0))
    # The loss peaked in a launch that was given up at step 3.
    assert labels() == dict.fromkeys((1, 2), EDGE) | dict.fromkeys((3, 4, 5), BELOW)


def test_sharpening_measures_slope_onset_and_plateau(plant, ask):
    rising = {step: 10.0 + 0.2 * step for step in range(10, 400, 10)}  # .88 of the threshold at 390
    plant(rising | {400: 95.0, 410: 101.0, 420: 85.0, 430: 102.0})
    (row,) = ask("FROM sharpening")
    assert (row["captures"], row["first_step"], row["last_step"], row["onset_step"]) == (43, 10, 430, 400)
    assert (row["fitted"], row["slope"]) == (39, pytest.approx(0.2))
    assert row["plateau_captures"] == 3
    assert row["plateau_mean"] == pytest.approx((1.01 + 0.85 + 1.02) / 3)
    assert row["plateau_sd"] == pytest.approx((((0.05) ** 2 + 0.11**2 + 0.06**2) / 2) ** 0.5)


def test_sharpening_without_an_onset(plant, ask):
    plant({10: 1.0, 20: 3.0, 30: 5.0})
    plant({10: 150.0, 20: 120.0}, run_id="above")
    plant({10: 150.0, 20: 20.0, 30: 40.0, 40: 91.0, 50: 99.0}, run_id="returned")
    plant({10: 7.0}, run_id="single")
    rows = {r["run_id"]: r for r in ask("FROM sharpening")}
    chosen = {name: (r["onset_step"], r["fitted"], r["slope"], r["plateau_mean"]) for name, r in rows.items()}
    assert chosen == {
        "r": (None, 3, pytest.approx(0.2), None),
        "above": (None, 0, None, None),  # unstable from the start is no onset
        "returned": (40, 2, pytest.approx(2.0), pytest.approx(0.99)),
        "single": (None, 1, None, None),
    }


def test_sharpening_has_a_row_per_operator_and_estimator(plant, ask):
    plant({1: 1e6, 20: 10.0, 30: 20.0}, operator="preconditioned")
    plant({10: 1.0}, estimator="critical", index=None)
    plant({10: 9.0}, index=1)
    rows = ask("FROM sharpening")
    assert [(r["operator"], r["estimator"], r["captures"]) for r in rows] == [
        ("hessian", "critical", 1),
        ("preconditioned", "lanczos", 2),  # the first ten steps are left out
    ]
    assert rows[1]["slope"] == pytest.approx(1.0)
