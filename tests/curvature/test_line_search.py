"""The critical step against closed forms, and losses that have none."""

from __future__ import annotations

import math

import pytest

from lm_telemetry.kernels.line_search import critical_step


def quadratic(slope, curvature):
    """L(η) = 3 - slope η + curvature η²/2, back at 3 at η = 2 slope/curvature."""
    return lambda eta: 3 - slope * eta + curvature * eta**2 / 2


@pytest.mark.parametrize("start", [1e-6, 0.01, 0.37, 5.0, 1e4])
@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.02, 1e-6])
def test_quadratic(start, tolerance):
    slope, curvature = 0.7, 4.2
    exact = 2 * slope / curvature
    step = critical_step(quadratic(slope, curvature), start=start, tolerance=tolerance, max_forwards=80)
    low, high = step.bracket
    assert low <= exact <= high <= low * (1 + tolerance)
    assert step.converged
    assert step.found
    # In λ = 2/η the bracket is centred on the estimate, so the error is bounded by half its width.
    assert step.sharpness == pytest.approx((2 / low + 2 / high) / 2)
    assert step.sharpness_error == pytest.approx((2 / low - 2 / high) / 2)
    assert abs(step.sharpness - curvature / slope) <= step.sharpness_error


def test_forwards_are_counted():
    calls = []

    def loss(eta):
        calls.append(eta)
        return quadratic(1.0, 1.0)(eta)

    step = critical_step(loss, start=1.0)
    assert step.forwards == len(calls)
    assert calls[0] == 0.0
    assert step.loss == 3.0
    known = critical_step(loss, start=1.0, loss0=3.0)
    assert known.forwards == step.forwards - 1
    assert known.eta == step.eta
    # Found again from the last answer: L(0), two for the bracket, log2(ln 2/ln 1.1) rounded up = 3 bisections.
    assert critical_step(loss, start=step.eta).forwards == 6


def test_the_first_of_several_crossings():
    # Below L(0) until 2, above it between 2 and 7, below again until 20.
    step = critical_step(lambda e: e * (e - 2) * (e - 7) * (e - 20), start=0.5, tolerance=1e-4)
    assert step.eta == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("beyond", [math.nan, math.inf])
def test_overflow_counts_as_raised(beyond):
    step = critical_step(lambda e: 1 - e if e < 0.3 else beyond, start=0.01, tolerance=0.01)
    assert step.eta == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize(
    ("loss", "outcome"),
    [
        (lambda e: 5 - e, "never_raised"),
        (lambda e: 5.0 + 0 * e, "never_raised"),
        (lambda e: 5 + e, "no_descent"),
        (lambda e: 5 + e * e, "no_descent"),
    ],
)
def test_no_critical_step(loss, outcome):
    step = critical_step(loss, start=0.1)
    assert step.outcome == outcome
    assert not step.found
    assert not step.converged
    assert step.eta is None
    assert step.bracket is None
    assert step.sharpness is None
    assert step.sharpness_error is None


def test_noise_is_no_descent_and_no_rise():
    """A rising loss with rounding noise of 1e-7: without a resolution the noise would pass for a descent."""
    noisy = lambda e: 5 * (1 + 1e-3 * e) + 2e-7 * math.sin(1e9 * e + 4)
    assert critical_step(noisy, start=1.0, max_forwards=60, resolution=1e-7).outcome == "no_descent"
    # A descent too small to see at the start is found further on.
    descent = lambda e: 5 - e + e * e / 2 + 2e-7 * math.sin(1e9 * e + 1.57)
    step = critical_step(descent, start=1e-9, max_forwards=60, resolution=1e-7)
    assert step.eta == pytest.approx(2.0, rel=0.05)
    # The crossing itself is not shifted by the resolution, though the descent of 0.5 is little more than it here.
    shallow = critical_step(lambda e: 5 - e + e * e / 2, start=1.0, tolerance=1e-3, resolution=0.08)
    assert shallow.eta == pytest.approx(2.0, rel=1e-3)
    assert critical_step(lambda e: 5 - e + e * e / 2, start=1.0, resolution=0.11).outcome == "no_descent"


def test_running_out_of_forwards_leaves_a_bracket():
    step = critical_step(quadratic(1.0, 1.0), start=1.0, tolerance=1e-9, max_forwards=6)
    assert step.found
    assert not step.converged
    assert step.forwards == 6
    low, high = step.bracket
    assert low <= 2.0 <= high


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.0}, "start: expected"),
        ({"start": math.inf}, "start: expected"),
        ({"start": 1.0, "tolerance": 0.0}, "tolerance: expected"),
        ({"start": 1.0, "max_forwards": 2}, "max_forwards: expected"),
        ({"start": 1.0, "resolution": -1.0}, "resolution: expected"),
        ({"start": 1.0, "loss0": math.nan}, "loss at 0"),
    ],
)
def test_impossible_searches_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        critical_step(lambda e: -e, **options)
