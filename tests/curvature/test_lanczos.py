"""Lanczos against dense eigenvalues: spectra that are known, and the ways a solver is fooled."""

from __future__ import annotations

import pytest
import torch

from lm_telemetry.kernels.lanczos import lanczos

torch.set_num_threads(1)


def symmetric(eigenvalues, seed=0):
    """A dense symmetric matrix with these eigenvalues and random eigenvectors, fp64."""
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return basis @ torch.diag(values) @ basis.T


def solve(matrix, **options):
    options = {"tolerance": 1e-8, "max_steps": 200, "dtype": matrix.dtype} | options
    return lanczos(lambda v: matrix @ v, dimension=len(matrix), **options)


SPECTRA = {
    "dimension 1": [-3.0],
    "dimension 2": [1.0, -2.0],
    "spread": torch.linspace(-4, 9, 60).tolist(),
    "bottom is larger in magnitude": [36.298, 30.0, 2.0, 0.5, 0.0, -1.0, -12.0, -40.242],
    "all negative": (-torch.linspace(0.5, 8, 40)).tolist(),
    "clustered at the top": [10.0, 9.999, 9.998, *torch.linspace(-1, 1, 50).tolist()],
    "double at the top": [7.0, 7.0, *torch.linspace(-2, 2, 40).tolist()],
    "rank one": [5.0] + [0.0] * 30,
    "zero": [0.0] * 12,
    "identity": [1.0] * 12,
}


@pytest.mark.parametrize("which", ["largest", "smallest"])
@pytest.mark.parametrize("name", SPECTRA)
def test_extreme_eigenvalue_of_known_spectra(name, which):
    exact = max(SPECTRA[name]) if which == "largest" else min(SPECTRA[name])
    result = solve(symmetric(SPECTRA[name]), which=which)
    # The bound of a converged pair is 1e-8 relative; 1e-12 absolute is rounding for eigenvalue 0.
    assert result.value == pytest.approx(exact, rel=1e-7, abs=1e-12)
    assert result.converged
    assert result.hvps <= len(SPECTRA[name])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_several_eigenvalues_in_order(which, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(80, 80, generator=generator, dtype=torch.float64)
    a = (a + a.T) / 2
    exact = torch.linalg.eigvalsh(a)
    exact = exact.flip(0)[:4] if which == "largest" else exact[:4]
    result = solve(a, k=4, which=which)
    assert [p.value for p in result.pairs] == pytest.approx(exact.tolist(), rel=1e-7)
    vectors = result.vectors
    assert torch.allclose(vectors @ vectors.T, torch.eye(4, dtype=torch.float64), atol=1e-10)
    for pair, vector in zip(result.pairs, vectors, strict=True):
        # The reported residual is the true one, computed without the operator.
        assert float((a @ vector - pair.value * vector).norm()) == pytest.approx(pair.residual, rel=1e-3, abs=1e-10)


@pytest.mark.parametrize("spectrum", [[5.0, 5.0, 1.0, -9.0], [5.0, 5.0, 5.0, 1.0], [0.0] * 4])
def test_copies_of_an_eigenvalue_are_found_when_the_krylov_space_closes(spectrum):
    result = solve(symmetric(spectrum), k=3)
    assert [p.value for p in result.pairs] == pytest.approx(sorted(spectrum, reverse=True)[:3], abs=1e-10)


def test_float32_is_as_good_as_float32():
    matrix = symmetric(torch.linspace(-4, 9, 300).tolist())
    result = solve(matrix.float(), tolerance=1e-5)
    assert result.value == pytest.approx(9.0, rel=1e-5)
    assert result.asymmetry < 1e-5


def test_running_out_of_products_is_said():
    result = solve(symmetric(torch.linspace(0, 1, 200).tolist()), tolerance=1e-10, max_steps=4)
    assert not result.converged
    assert result.hvps == 4
    assert result.value < 1.0  # a Ritz value is a lower bound
    assert result.residual > 0


def test_at_least_two_products_even_from_the_exact_vector():
    matrix = torch.diag(torch.tensor([4.0, 1.0, 0.5, 0.0]))
    assert solve(matrix, start=torch.tensor([1.0, 0, 0, 0]), tolerance=0.5).hvps >= 2


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("overtaking", [1, 2, 3])
def test_a_warm_start_is_not_fooled_by_a_crossing(overtaking, seed):
    """After a solve, an eigenvalue that was second, third or fourth comes to lie on top."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.cat([torch.tensor([10.0, 9.0, 8.0, 7.0]), 2 * torch.rand(196, generator=generator)])
    after = before.clone()
    after[overtaking] = 12.0
    first = lanczos(lambda v: before * v, dimension=200, generator=generator)
    assert first.value == pytest.approx(10.0, rel=0.02)
    warm = lanczos(lambda v: after * v, dimension=200, start=first.vectors, generator=generator)
    # One product from the old top vector would say 10. The criterion is 1 %; its residual may be twice that.
    assert warm.value == pytest.approx(12.0, rel=0.02)


def test_a_warm_start_saves_products_when_nothing_crosses():
    matrix = symmetric([10.0, 8.0, 7.0, *torch.linspace(-3, 5, 400).tolist()])
    cold = solve(matrix, tolerance=1e-2)
    warm = solve(matrix * 1.01, tolerance=1e-2, start=cold.vectors)
    assert warm.hvps < cold.hvps
    assert warm.value == pytest.approx(10.1, rel=1e-2)


def test_an_unsymmetric_operator_is_seen():
    a = torch.randn(50, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert solve(a, max_steps=10).asymmetry > 0.1
    assert solve(a + a.T, max_steps=10).asymmetry < 1e-12


def test_the_operator_may_return_its_argument():
    assert lanczos(lambda v: v, dimension=5).value == pytest.approx(1.0)


def test_global_random_state_is_not_used():
    state = torch.get_rng_state()
    values = [solve(symmetric(torch.linspace(-1, 1, 50).tolist()), max_steps=5).value for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert values[0] == values[1]


def test_a_product_that_is_not_finite_is_an_error():
    with pytest.raises(FloatingPointError, match=r"product 1 .* not finite"):
        lanczos(lambda v: v * torch.nan, dimension=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 6}, "k: expected 1 to 5"),
        ({"k": 0}, "k: expected 1 to 5"),
        ({"max_steps": 1}, "max_steps: expected at least 2"),
        ({"k": 4, "max_steps": 3}, "max_steps: expected at least 4"),
        ({"which": "magnitude"}, "which: expected"),
        ({"tolerance": 0.0}, "tolerance: expected"),
        ({"start": torch.ones(4)}, "start: expected vectors of 5"),
        ({"start": torch.zeros(5)}, "start: expected finite vectors"),
        ({"start": torch.full((5,), torch.nan)}, "start: expected finite vectors"),
    ],
)
def test_impossible_problems_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lanczos(lambda v: v, dimension=5, **options)


def test_dimension_is_checked():
    with pytest.raises(ValueError, match="dimension: expected at least 1"):
        lanczos(lambda v: v, dimension=0)
