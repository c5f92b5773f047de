"""Hutchinson, Hutch++ and the `trace` instrument: dense traces, rates of convergence, and honest error bars."""

from __future__ import annotations

import math

import pytest
import torch

from lm_telemetry.catalogue import columns
from lm_telemetry.errors import SettingsError
from lm_telemetry.instruments.trace import Trace
from lm_telemetry.kernels.trace import hutch_pp, hutchinson

torch.set_num_threads(1)

STUDENT_95 = {2: 12.706, 4: 3.182, 6: 2.571, 10: 2.262, 30: 2.045}
"""Two-sided 95 % quantiles of Student's t by number of probes (degrees of freedom are one less)."""


def symmetric(eigenvalues, seed=0):
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return basis @ torch.diag(values) @ basis.T


def estimate(method, matrix, probes, seed=0):
    return method(
        lambda v: matrix @ v,
        dimension=len(matrix),
        probes=probes,
        generator=torch.Generator().manual_seed(seed),
        dtype=matrix.dtype,
    )


FLAT = symmetric(torch.linspace(-1, 2, 40))
DECAYING = symmetric([100.0 / (i + 1) ** 2 for i in range(60)])


def test_hutchinson_has_no_variance_on_a_diagonal():
    found = estimate(hutchinson, torch.diag(torch.tensor([3.0, -1.0, 0.5])), 3)
    assert found.value == pytest.approx(2.5)
    assert found.stderr == pytest.approx(0, abs=1e-6)
    assert (found.probes, found.hvps) == (3, 3)


def test_hutchinson_variance_is_the_textbook_one():
    """2(|A|_F² - Σ A_ii²), over 4,000 single probes: the sample variance of these is within 10 % (4 sigma)."""
    samples = torch.tensor([estimate(hutchinson, FLAT, 1, seed).value for seed in range(4000)])
    exact = 2 * float(FLAT.square().sum() - FLAT.diagonal().square().sum())
    assert float(samples.var()) == pytest.approx(exact, rel=0.1)
    assert float(samples.mean()) == pytest.approx(float(FLAT.trace()), abs=4 * math.sqrt(exact / 4000))


def rms_error(method, matrix, probes, seeds=400):
    errors = [estimate(method, matrix, probes, seed).value - float(matrix.trace()) for seed in range(seeds)]
    return math.sqrt(sum(e * e for e in errors) / seeds)


# The rms over 400 seeds is good to 1/sqrt(800) = 3.5 %, a ratio of two to 5 %; 15 % is three of that.
@pytest.mark.parametrize("matrix", [FLAT, DECAYING], ids=["flat", "decaying"])
def test_hutchinson_converges_as_the_root(matrix):
    assert rms_error(hutchinson, matrix, 4) / rms_error(hutchinson, matrix, 64) == pytest.approx(4, rel=0.15)


def test_hutch_pp_converges_faster_where_the_spectrum_decays():
    """In sixteen times the products as 1/n or better, where Hutchinson gains a factor 4."""
    assert rms_error(hutch_pp, DECAYING, 6) / rms_error(hutch_pp, DECAYING, 96, seeds=50) > 16
    assert rms_error(hutch_pp, DECAYING, 24) < rms_error(hutchinson, DECAYING, 24) / 10


def test_hutch_pp_is_no_disaster_where_it_does_not():
    """On a flat spectrum a third of the products is left to Hutchinson: at most √3 worse."""
    assert rms_error(hutch_pp, FLAT, 24) < 1.15 * math.sqrt(3) * rms_error(hutchinson, FLAT, 24)


@pytest.mark.parametrize(
    ("method", "matrix", "probes", "scattered"),
    [
        (hutchinson, FLAT, 2, 2),
        (hutchinson, FLAT, 6, 6),
        (hutchinson, DECAYING, 30, 30),
        (hutch_pp, FLAT, 30, 10),
        (hutch_pp, FLAT, 12, 4),
        (hutch_pp, DECAYING, 30, 10),
    ],
)
def test_the_stated_error_covers_the_truth(method, matrix, probes, scattered):
    """95 % ± 3 % of 2,000 intervals, Student's t since there are few probes; the share's own sigma is 0.5 %."""
    exact, inside = float(matrix.trace()), 0
    for seed in range(2000):
        found = estimate(method, matrix, probes, seed)
        assert found.probes == scattered
        inside += abs(found.value - exact) <= STUDENT_95[scattered] * found.stderr
    assert inside / 2000 == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize("rank", [0, 1, 3, 5])
def test_hutch_pp_is_exact_up_to_its_rank(rank):
    """An operator of rank 5 at most, whose traces cancel, and a sketch of 5; what has no image is not asked again."""
    values = [0.0] * 30
    values[:rank] = [7.0, -5.0, 3.0, 2.0, -1.0][:rank]
    found = estimate(hutch_pp, symmetric(values), 15)
    assert found.value == pytest.approx(sum(values), abs=1e-10)
    assert found.stderr == pytest.approx(0, abs=1e-10)
    assert found.hvps == 5 + rank + 5


def test_hutch_pp_of_few_dimensions_is_exact():
    found = estimate(hutch_pp, symmetric([2.0, -1.0]), 30)
    assert found.value == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("method", "probes"), [(hutchinson, 1), (hutch_pp, 3)])
def test_one_probe_has_no_error_bar(method, probes):
    assert estimate(method, FLAT, probes).stderr is None


@pytest.mark.parametrize("method", [hutchinson, hutch_pp])
def test_global_random_state_is_not_used_and_the_operator_may_return_its_argument(method):
    state = torch.get_rng_state()
    first, second = (method(lambda v: v, dimension=300, probes=30) for _ in range(2))
    assert first == second
    assert abs(first.value - 300) < 5 * first.stderr + 1e-6
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", [hutchinson, hutch_pp])
def test_impossible_problems_are_refused(method):
    with pytest.raises(ValueError, match="dimension: expected at least 1"):
        method(lambda v: v, dimension=0, probes=9)
    with pytest.raises(ValueError, match="probes: expected at least"):
        method(lambda v: v, dimension=5, probes=0)
    with pytest.raises(FloatingPointError, match=r"product 1 .* not finite"):
        method(lambda v: v * torch.inf, dimension=5, probes=9)


@pytest.fixture
def llama(tiny_llama, bench, dense_llama_hessian):
    model, batch = tiny_llama(0, initializer_range=0.2)
    subject = bench(model, batch, torch.optim.SGD(model.parameters(), lr=1e-12))
    return subject, dense_llama_hessian(model, batch)


@pytest.mark.parametrize(("method", "probes"), [("hutchinson", 60), ("hutch++", 60)])
def test_a_llama_against_its_dense_hessian(llama, method, probes):
    subject, hessian = llama
    (row,) = subject.step(subject.attach(Trace(method=method, probes=probes)), 1)
    exact = float(hessian.trace())
    assert abs(row["value"] - exact) < 3 * row["stderr"]
    assert 0 < row["stderr"] < 0.2 * float(hessian.norm())
    assert set(row) <= {m.name for m in columns("curvature")}
    assert (row["operator"], row["scope"], row["estimator"]) == ("hessian", "all", method)
    assert row["hvps"] == probes
    assert row["n_tokens"] == 16
    assert row["seconds"] > 0
    assert subject.events == []


def test_captures_of_two_steps_are_independent_and_of_one_step_equal(llama):
    subject, _ = llama
    first, second = (subject.step(subject.attach(Trace()), step)[0]["value"] for step in (1, 2))
    again = subject.step(subject.attach(Trace()), 1)[0]["value"]
    assert first != second
    assert again == pytest.approx(first, rel=1e-6)  # the step of 1e-12 in between moves it a little


def test_a_probe_without_labels_is_one_event_and_no_row(llama):
    subject, _ = llama
    subject.probe._batch.pop("labels")
    assert subject.step(subject.attach(Trace()), 1) == []
    ((severity, kind, message),) = subject.events
    assert (severity, kind) == ("warning", "trace_not_measured")
    assert "labels" in message


@pytest.mark.parametrize(
    "setting",
    [
        {"method": "exact"},
        {"method": "hutch++", "probes": 3},
        {"probes": 1},
        {"micro_batch": 0},
        {"probes": 9.0},
        {"k": 1},
    ],
)
def test_settings_are_checked(setting):
    with pytest.raises(SettingsError, match=r"instruments\.trace"):
        Trace.build(**setting)
