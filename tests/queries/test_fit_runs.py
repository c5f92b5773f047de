"""Scaling laws of planted runs: which points are read, and what is found in them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lm_telemetry.queries import connect
from lm_telemetry.queries.fit_checks import FitError
from lm_telemetry.queries.fit_runs import fit_loss_curve, fit_scaling
from lm_telemetry.queries.fits import power_law
from tests.support.planted import plant

approx = pytest.approx
PER_STEP = 100


def curve(store, loss, steps, *, first=1, learning_rate=lambda step: 0.1, tokens=PER_STEP, **where):
    rows = [
        {"step": s, "loss": loss(s), "learning_rate": learning_rate(s), "tokens": tokens}
        for s in range(first, first + steps)
    ]
    plant(store, "steps", rows, **where)


def law(step, ranks=1):
    return 2 + 50 * (ranks * PER_STEP * step) ** -0.4


@pytest.fixture
def ask(store):
    def call(function, *args, **options):
        with connect(store.path) as connection:
            return function(connection, *args, **options)

    return call


# -- one run -----------------------------------------------------------------------------------------------------------


def test_tokens_of_all_ranks_are_added_and_losses_averaged(store, ask):
    curve(store, lambda s: law(s, 2) + 0.1, 2000, run_id="r", rank=0)
    curve(store, lambda s: law(s, 2) - 0.1, 2000, run_id="r", rank=1)
    curve(store, lambda s: 7.0 + s, 50, run_id="other")
    fit = ask(fit_loss_curve, "r")
    assert (fit.E.value, fit.A.value, fit.a.value) == approx((2, 50, 0.4), rel=0.01)
    assert fit.n <= 64
    assert fit.at_bound == ()


def test_bins_change_little_and_every_step_counts(store, ask):
    draw = np.random.default_rng(0)
    noisy = {s: law(s) + 0.05 * draw.normal() for s in range(1, 3001)}
    curve(store, noisy.get, 3000)
    fit = ask(fit_loss_curve, "r")
    steps = np.array(list(noisy))
    every = power_law(PER_STEP * steps, np.array(list(noisy.values())), bootstrap=0)
    assert fit.a.value == approx(every.a.value, abs=every.a.gauss_newton_stderr)
    assert fit.a.gauss_newton_stderr == approx(every.a.gauss_newton_stderr, rel=0.5)
    assert fit.a.low < 0.4 < fit.a.high


def test_the_warm_up_is_left_out(store, ask):
    def warm(step):
        return law(step) if step >= 100 else 30 - step / 5

    curve(store, warm, 2000, learning_rate=lambda s: min(s, 100) / 100 * (1 - s / 4000 * (s > 100)))
    fit = ask(fit_loss_curve, "r")
    assert fit.a.value == approx(0.4, rel=0.02)
    assert ask(fit_loss_curve, "r", first_step=1).a.value != approx(0.4, rel=0.1)


def test_a_step_taken_again_counts_once(store, ask):
    curve(store, lambda s: law(s) if s <= 500 else 9.0, 700, attempt=0)
    curve(store, law, 1500, first=501, attempt=1)
    fit = ask(fit_loss_curve, "r")
    assert (fit.E.value, fit.a.value) == approx((2, 0.4), rel=0.01)


def test_losses_that_are_no_numbers_are_dropped_and_counted(store, ask):
    bad = {5: math.nan, 17: math.inf, 30: None}
    curve(store, lambda s: bad.get(s, law(s)), 400)
    fit = ask(fit_loss_curve, "r", bins=10_000)
    assert (fit.dropped, fit.n) == (3, 397)
    assert fit.a.value == approx(0.4)


def test_without_tokens_it_says_what_to_do(store, ask):
    curve(store, law, 100, tokens=None)
    with pytest.raises(FitError, match="no tokens were counted; try against='step'"):
        ask(fit_loss_curve, "r")
    fit = ask(fit_loss_curve, "r", against="step", bins=10_000)
    assert (fit.a.value, fit.A.value) == approx((0.4, 50 * PER_STEP**-0.4))


def test_what_is_not_there_is_named(store, ask):
    curve(store, lambda s: math.nan, 50, run_id="lost")
    curve(store, law, 3, run_id="short")
    with pytest.raises(FitError, match="no steps of a run 'nobody'"):
        ask(fit_loss_curve, "nobody")
    with pytest.raises(FitError, match="none of its losses from step 1 on is a finite number"):
        ask(fit_loss_curve, "lost")
    with pytest.raises(FitError, match=r"more than 3 points.* got 3"):
        ask(fit_loss_curve, "short")
    with pytest.raises(FitError, match="from step 9 on: its last step is 3"):
        ask(fit_loss_curve, "short", first_step=9)


# -- many runs ---------------------------------------------------------------------------------------------------------


def loss_of(n, d):
    return 1.7 + 40 * n**-0.3 + 30 * d**-0.25


def trained(store, name, n, steps, loss):
    for rank in range(2):
        curve(store, lambda s: loss if s > 0.95 * steps else 9.0, steps, run_id=name, rank=rank)
    plant(store, "runs", [{"step": 0, "n_parameters": n}], run_id=name)


def test_the_losses_that_runs_ended_with_make_a_law(store, ask):
    for n in (10_000, 40_000, 200_000):
        for steps in (40, 160, 800):
            trained(store, f"{n} {steps}", n, steps, loss_of(n, 2 * PER_STEP * steps))
    fit = ask(fit_scaling)
    found = (fit.E.value, fit.A.value, fit.B.value, fit.a.value, fit.b.value)
    assert found == approx((1.7, 40, 30, 0.3, 0.25), rel=1e-4)
    assert fit.n == 9
    one = ask(fit_scaling, against="tokens", runs=[f"10000 {s}" for s in (40, 160, 800)], bounds={"E": (0, 0)})
    assert one.n == 3


def test_one_of_size_and_tokens(store, ask):
    for n in (1000, 3000, 10_000, 30_000, 100_000):
        trained(store, f"n{n}", n, 40, 1.7 + 40 * n**-0.3)
    trained(store, "diverged", 5000, 40, math.nan)
    fit = ask(fit_scaling, against="n_parameters")
    assert (fit.E.value, fit.A.value, fit.a.value) == approx((1.7, 40, 0.3))
    assert (fit.n, fit.dropped) == (5, 1)
    with pytest.raises(FitError, match="n_tokens: expected at least 3 different values; got 1"):
        ask(
            fit_scaling,
            runs=[f"n{n}" for n in (1000, 3000, 10_000, 30_000, 100_000)] + ["diverged"],
            bounds={"E": (1.7, 1.7), "a": (0.3, 0.3)},
        )


def test_a_run_that_is_not_described_is_named(store, ask):
    trained(store, "a", None, 40, 3.0)
    with pytest.raises(FitError, match="run 'a': expected n_parameters and tokens; got None and 8000"):
        ask(fit_scaling)
    with pytest.raises(FitError, match="no steps of runs b; there are a"):
        ask(fit_scaling, runs=["b"])
    with pytest.raises(FitError, match="tail: expected a share"):
        ask(fit_scaling, tail=0)
