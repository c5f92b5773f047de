"""Scaling laws fitted to planted points, to closed forms, and beside scipy's own search."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_telemetry.queries.fit_checks import FitError
from lm_telemetry.queries.fits import chinchilla, power_law

approx = pytest.approx
CHINCHILLA = {"E": 1.69, "A": 406.4, "B": 410.7, "a": 0.34, "b": 0.28}  # 2203.15556


def grid(n=6):
    """Parameters and tokens of n x n runs."""
    sizes, tokens = np.meshgrid(np.geomspace(1e7, 1e9, n), np.geomspace(1e9, 1e11, n))
    return sizes.ravel(), tokens.ravel()


def loss_of(sizes, tokens, *, E, A, B, a, b):
    return E + A * sizes**-a + B * tokens**-b


def noise(n, size, seed=0):
    return size * np.random.default_rng(seed).normal(size=n)


# -- what was planted is found ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_residuals", [False, True])
@pytest.mark.parametrize(("E", "A", "a"), [(2.35, 30.0, 0.34), (0.5, 1e4, 0.9), (3.0, 2.0, 0.05), (1.7, 1e9, 2.0)])
def test_a_law_without_noise_is_found_to_rounding(E, A, a, log_residuals):
    x = np.geomspace(1e3, 1e9, 20)
    fit = power_law(x, E + A * x**-a, log_residuals=log_residuals, bootstrap=20)
    assert (fit.E.value, fit.A.value, fit.a.value) == approx((E, A, a), rel=1e-6)
    assert (fit.n, fit.dropped, fit.at_bound, fit.converged) == (20, 0, (), True)
    assert fit.r_squared == approx(1)
    assert fit.predict(1e12).value == approx(E + A * 1e12**-a, rel=1e-6)


@pytest.mark.parametrize("huber", [None, 1e-3])
def test_chinchilla_without_noise_is_found_to_rounding(huber):
    sizes, tokens = grid()
    fit = chinchilla(sizes, tokens, loss_of(sizes, tokens, **CHINCHILLA), huber=huber, bootstrap=0)
    assert {name: getattr(fit, name).value for name in CHINCHILLA} == approx(CHINCHILLA, rel=1e-5)
    assert math.isnan(fit.E.low)
    assert fit.predict(sizes[:, None], tokens[:3]).value.shape == (36, 3)


def coverage(fits, truth):
    """Share of fits whose interval holds the truth, by parameter."""
    held = [{k: getattr(fit, k).low <= v <= getattr(fit, k).high for k, v in truth.items()} for fit in fits]
    return {name: np.mean([h[name] for h in held]) for name in truth}


@pytest.mark.parametrize("log_residuals", [False, True])
def test_intervals_of_a_power_law_hold_the_truth(log_residuals):
    x = np.geomspace(1, 1e3, 20)
    y = 2 + 2 * x**-0.4
    factors = [np.exp(noise(20, 0.01, seed)) for seed in range(100)]
    fits = [power_law(x, y * f, log_residuals=log_residuals, bootstrap=200) for f in factors]
    assert all(share >= 0.88 for share in coverage(fits, {"E": 2.0, "A": 2.0, "a": 0.4}).values())
    # The two kinds of standard error are those of the estimates' own scatter.
    scatter = np.std([fit.a.value for fit in fits])
    assert np.median([fit.a.stderr for fit in fits]) == approx(scatter, rel=0.35)
    assert np.median([fit.a.gauss_newton_stderr for fit in fits]) == approx(scatter, rel=0.35)
    # So is the band of the law, beyond the points as well.
    bands = [fit.predict([30.0, 1e5]) for fit in fits]
    for place, at in enumerate([30.0, 1e5]):
        assert np.mean([b.low[place] <= 2 + 2 * at**-0.4 <= b.high[place] for b in bands]) >= 0.88


def test_intervals_of_chinchilla_hold_the_truth():
    sizes, tokens = grid(5)
    clean = loss_of(sizes, tokens, **CHINCHILLA)
    fits = [chinchilla(sizes, tokens, clean * np.exp(noise(25, 3e-3, seed)), bootstrap=150) for seed in range(40)]
    assert all(share >= 0.85 for share in coverage(fits, CHINCHILLA).values())
    exponent = CHINCHILLA["b"] / (CHINCHILLA["a"] + CHINCHILLA["b"])
    assert np.mean([fit.n_exponent.low <= exponent <= fit.n_exponent.high for fit in fits]) >= 0.85


def test_the_optimum_is_the_least_loss_of_its_budget():
    sizes, tokens = grid()
    fit = chinchilla(sizes, tokens, loss_of(sizes, tokens, **CHINCHILLA), bootstrap=20)
    best = fit.optimum(1e22)
    at = np.geomspace(1e8, 1e12, 200_001)
    losses = loss_of(at, 1e22 / 6 / at, **CHINCHILLA)
    assert best.n_parameters.value == approx(at[losses.argmin()], rel=1e-3)
    assert best.loss.value == approx(losses.min(), rel=1e-6)
    assert 6 * best.n_parameters.value * best.n_tokens.value == approx(1e22)
    tenfold = fit.optimum(1e23)
    grown = math.log10(tenfold.n_parameters.value / best.n_parameters.value)
    assert (grown, 1 - grown) == approx((fit.n_exponent.value, fit.d_exponent.value), rel=1e-4)


# -- witnesses -------------------------------------------------------------------------------------------------------


def test_without_a_constant_it_is_the_regression_of_logarithms():
    x = np.geomspace(10, 1e6, 30)
    y = 5 * x**-0.2 * np.exp(noise(30, 0.1))
    fit = power_law(x, y, bounds={"E": (0, 0)}, log_residuals=True)
    (slope, height), cov = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    assert (fit.a.value, fit.A.value) == approx((-slope, math.exp(height)), rel=1e-7)
    assert fit.a.gauss_newton_stderr == approx(math.sqrt(cov[0, 0]), rel=1e-6)
    assert fit.A.gauss_newton_stderr == approx(math.exp(height) * math.sqrt(cov[1, 1]), rel=1e-6)
    assert fit.r_squared == approx(np.corrcoef(np.log(x), np.log(y))[0, 1] ** 2)
    assert (fit.E.value, fit.E.at_bound, fit.E.low, fit.E.high) == (0, None, 0, 0)


def test_scipy_finds_the_same_power_law():
    optimize = pytest.importorskip("scipy.optimize", reason="the witness is scipy's")
    x, weights = np.geomspace(1, 1e4, 25), np.linspace(1, 5, 25)
    y = 2 + 3 * x**-0.5 + noise(25, 0.02)
    fit = power_law(x, y, weights=weights)
    found, cov = optimize.curve_fit(
        lambda x, E, A, a: E + A * x**-a, x, y, p0=[2, 3, 0.5], sigma=weights**-0.5, xtol=1e-14, ftol=1e-14
    )
    assert (fit.E.value, fit.A.value, fit.a.value) == approx(found, rel=1e-6)
    errors = [e.gauss_newton_stderr for e in (fit.E, fit.A, fit.a)]
    assert errors == approx(np.sqrt(np.diag(cov)), rel=1e-4)


@pytest.mark.parametrize("huber", [1e-3, 0.02])
def test_scipy_finds_no_less_of_the_huber_loss_of_chinchilla(huber):
    optimize = pytest.importorskip("scipy.optimize", reason="the witness is scipy's")
    sizes, tokens = grid()
    losses = loss_of(sizes, tokens, **CHINCHILLA) * np.exp(noise(36, 0.01))
    losses[5] *= 1.3

    def cost(p):
        r = np.log(losses) - np.log(
            np.exp(p[0]) + np.exp(p[1] - p[3] * np.log(sizes)) + np.exp(p[2] - p[4] * np.log(tokens))
        )
        return np.where(abs(r) <= huber, r**2, huber * (2 * abs(r) - huber)).sum()

    fit = chinchilla(sizes, tokens, losses, huber=huber, bootstrap=0)
    ours = [*np.log([fit.E.value, fit.A.value, fit.B.value]), fit.a.value, fit.b.value]
    theirs = optimize.minimize(
        cost, ours, method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-9, "fatol": 1e-14}
    )
    planted = optimize.minimize(cost, [*np.log([1.69, 406.4, 410.7]), 0.34, 0.28], method="Nelder-Mead")
    assert cost(ours) <= theirs.fun * (1 + 1e-3)
    assert cost(ours) <= planted.fun * (1 + 1e-3)


def test_the_huber_loss_is_not_moved_by_an_outlier():
    x = np.geomspace(1, 1e4, 30)
    y = 2 + 3 * x**-0.5 + noise(30, 0.005)
    y[20] += 2
    robust, squares = (power_law(x, y, huber=h) for h in (0.01, None))
    assert robust.a.value == approx(0.5, abs=0.03)
    assert abs(squares.a.value - 0.5) > 5 * abs(robust.a.value - 0.5)
    assert squares.residual > 0.3


def test_the_standard_error_of_the_huber_loss_is_that_of_its_scatter():
    x = np.geomspace(1, 1e3, 40)
    fits = [power_law(x, 2 + 2 * x**-0.4 + noise(40, 0.01, seed), huber=0.01, bootstrap=0) for seed in range(150)]
    scatter = np.std([fit.a.value for fit in fits])
    assert np.median([fit.a.gauss_newton_stderr for fit in fits]) == approx(scatter, rel=0.2)


def test_weights_are_repeated_points():
    x = np.geomspace(1, 1e3, 10)
    y = 2 + 3 * x**-0.5 + noise(10, 0.02)
    counts = np.arange(1, 11)
    weighted = power_law(x, y, weights=counts, bootstrap=0)
    repeated = power_law(np.repeat(x, counts), np.repeat(y, counts), bootstrap=0)
    assert (weighted.E.value, weighted.a.value) == approx((repeated.E.value, repeated.a.value))
    assert weighted.r_squared == approx(repeated.r_squared)


# -- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bounds", "end", "at"), [((0.01, 0.2), 0.2, "high"), ((0.6, 3.0), 0.6, "low")])
def test_a_truth_outside_the_bounds_is_said_to_be_at_them(bounds, end, at):
    x = np.geomspace(1, 1e4, 25)
    fit = power_law(x, 2 + 3 * x**-0.4 + noise(25, 0.002), bounds={"a": bounds})
    assert (fit.a.value, fit.a.at_bound, fit.at_bound) == (end, at, ("a",))
    assert fit.a.bound_share > 0.3
    assert math.isnan(fit.a.gauss_newton_stderr)
    assert fit.r_squared > 0.95  # which tells nothing


def test_a_bound_on_the_constant_spoils_the_exponent_and_is_told():
    x = np.geomspace(1e3, 1e9, 25)
    fit = power_law(x, 2.35 + 30 * x**-0.34, bounds={"E": (0, 2.2)})
    assert (fit.E.value, fit.at_bound) == (2.2, ("E",))
    assert fit.a.value < 0.32
    assert fit.r_squared > 0.99


def test_chinchilla_says_which_of_its_exponents_is_at_a_bound():
    sizes, tokens = grid()
    losses = loss_of(sizes, tokens, **CHINCHILLA)
    fit = chinchilla(sizes, tokens, losses, bounds={"b": (0.01, 0.2)}, bootstrap=20)
    assert fit.at_bound == ("b",)
    assert (fit.b.value, fit.b.at_bound) == (0.2, "high")


def test_what_grows_has_no_power_law():
    x = np.geomspace(1, 1e4, 20)
    fit = power_law(x, 2 - 0.5 * x**-0.5, bootstrap=50)
    assert (fit.A.value, fit.at_bound) == (0, ("A",))
    assert math.isnan(fit.a.value)
    assert fit.r_squared == approx(0, abs=1e-9)
    sizes, tokens = grid()
    useless = chinchilla(sizes, tokens, 2 + 400 * sizes**-0.3, bootstrap=10)
    assert useless.B.value == approx(0, abs=1e-6)


# -- what cannot be fitted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        ([1, 2], [3, 2], {}, "more than 3 points.* got 2"),
        ([1, 2, 3, 4, 5], [3, 2, np.nan, np.inf, 1], {}, "got 3, 2 more having no finite y"),
        ([1, 1, 2, 2, 2], [3, 3, 2, 2, 2.1], {}, "x: expected at least 3 different values; got 2"),
        ([0, 1, 2, 3, 4], [5, 4, 3, 2, 1], {}, "x: expected positive numbers; got 0"),
        ([1, 2, 3, 4, np.nan], [5, 4, 3, 2, 1], {}, "x: expected positive numbers; got nan"),
        ([1, 2, 3, 4, 5], [2, 2, 2, 2, 2], {}, "y: is 2 at all points"),
        ([1, 2, 3, 4], [5, 4, 3], {}, r"one length; got x \(4,\), y \(3,\)"),
        ([1, 2, 3, 4, 5], [5, 4, 3, 2, -1], {"log_residuals": True}, "logarithms are taken; got -1"),
        ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1], {"weights": [1, 1, 0, 1, 1]}, "weights: expected positive numbers; got 0"),
        ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1], {"bounds": {"A": (0, 1)}}, "expected some of E, a; got A"),
        ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1], {"bounds": {"a": (0, 1)}}, r"0 < low <= high for a; got \(0, 1\)"),
        ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1], {"bounds": {"E": (2, 1)}}, r"low <= high for E; got \(2, 1\)"),
        ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1], {"huber": 0}, "huber: expected a positive number"),
    ],
)
def test_errors_name_what_was_expected_and_what_came(x, y, options, message):
    with pytest.raises(FitError, match=message):
        power_law(x, y, **options)


def test_sizes_and_tokens_that_go_along_cannot_be_told_apart():
    sizes = np.geomspace(1e7, 1e9, 10)
    with pytest.raises(FitError, match="cannot be told apart"):
        chinchilla(sizes, 20 * sizes, loss_of(sizes, 20 * sizes, **CHINCHILLA))


def test_points_without_a_finite_value_are_dropped_and_counted():
    x = np.geomspace(1, 1e4, 20)
    y = 2 + 3 * x**-0.5
    y[[3, 7]] = np.nan, np.inf
    fit = power_law(x, y, weights=np.ones(20), bootstrap=0)
    assert (fit.n, fit.dropped) == (18, 2)
    assert fit.a.value == approx(0.5)


def test_a_huge_range_overflows_nothing():
    x = np.geomspace(1e-30, 1e30, 40)
    fit = power_law(x, 2 + 3e-6 * x**-0.2, bootstrap=20)
    assert (fit.E.value, fit.A.value, fit.a.value) == approx((2, 3e-6, 0.2), rel=1e-3)


def test_the_same_seed_gives_the_same_intervals():
    x = np.geomspace(1, 1e3, 12)
    y = 2 + 3 * x**-0.5 + noise(12, 0.02)
    first, again, other = (power_law(x, y, seed=seed, bootstrap=50) for seed in (1, 1, 2))
    assert (first.a, first.E) == (again.a, again.E)
    assert first.a.low != other.a.low
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.n = 3


@given(x_unit=st.floats(1e-9, 1e9), y_unit=st.floats(1e-6, 1e6), seed=st.integers(0, 20), log_residuals=st.booleans())
@settings(max_examples=30, deadline=None)
def test_units_change_only_what_carries_them(x_unit, y_unit, seed, log_residuals):
    x = np.geomspace(1, 1e4, 20)
    y = 2 + 3 * x**-0.5 + noise(20, 0.02, seed)
    plain = power_law(x, y, log_residuals=log_residuals, huber=0.02, bootstrap=30)
    huber = 0.02 * (1 if log_residuals else y_unit)
    scaled = power_law(x_unit * x, y_unit * y, log_residuals=log_residuals, huber=huber, bootstrap=30)
    assert scaled.a.value == approx(plain.a.value, rel=1e-4)
    assert scaled.E.value == approx(y_unit * plain.E.value, rel=1e-4)
    assert scaled.A.value == approx(y_unit * plain.A.value * x_unit**scaled.a.value, rel=1e-4)
    assert (scaled.a.low, scaled.a.high) == approx((plain.a.low, plain.a.high), rel=1e-2)
    assert scaled.r_squared == approx(plain.r_squared)
    assert scaled.residual == approx(plain.residual * (1 if log_residuals else y_unit), rel=1e-4)
