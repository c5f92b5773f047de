"""Stochastic Lanczos quadrature and the `spectrum` instrument: known spectra, exact moments, honest error bars."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lm_telemetry.catalogue import columns
from lm_telemetry.columns import to_table
from lm_telemetry.errors import SettingsError
from lm_telemetry.instruments.spectrum import Spectrum
from lm_telemetry.kernels.density import spectral_density
from lm_telemetry.kernels.trace import random_signs

torch.set_num_threads(1)


def symmetric(eigenvalues, seed=0):
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    return basis @ torch.diag(values) @ basis.T


def density(matrix, *, probes=4, steps=20, seed=0, **options):
    return spectral_density(
        lambda v: matrix @ v,
        dimension=len(matrix),
        probes=probes,
        steps=steps,
        generator=torch.Generator().manual_seed(seed),
        **({"dtype": matrix.dtype} | options),
    )


def integral(found):
    return float(found.density.sum() * (found.grid[1] - found.grid[0]))


def wasserstein(found, eigenvalues):
    """W1 between the quadrature and a set of eigenvalues: the area between their distribution functions."""
    exact = torch.as_tensor(eigenvalues, dtype=torch.float64)
    nodes, weights = found.nodes.flatten(), found.weights.flatten() / found.probes
    points, order = torch.cat([nodes, exact]).sort()
    jumps = torch.cat([weights, torch.full_like(exact, -1 / len(exact))])[order]
    return float((jumps.cumsum(0)[:-1].abs() * points.diff()).sum())


LINEAR = torch.linspace(-1, 3, 300)
CLUSTERS = torch.cat([torch.linspace(-2.01, -1.99, 120), torch.linspace(4.9, 5.1, 180)])
OUTLIERS = torch.cat([torch.linspace(-0.1, 0.1, 297), torch.tensor([8.0, 9.0, 20.0])])


# An average over 4 vectors of 300 entries moves a share of the mass of about 1/sqrt(4 · 300) = 3 %, over a span of 1:
# the distance is 3 % of the span at most, and that of the quadrature itself (span / steps / 2) is below it.
@pytest.mark.parametrize(
    ("spectrum", "allowed"),
    [(LINEAR, 0.03 * 4), (-LINEAR - 5, 0.03 * 4), (CLUSTERS, 0.03 * 7), (OUTLIERS, 0.01 * 20)],
    ids=["linear", "all negative", "two clusters", "bulk and outliers"],
)
def test_known_spectra(spectrum, allowed):
    found = density(symmetric(spectrum))
    assert wasserstein(found, spectrum) < allowed
    assert integral(found) == pytest.approx(1, abs=1e-12)
    assert bool((found.density >= 0).all())
    assert found.weights.sum(1).tolist() == pytest.approx([1] * 4)
    assert float(found.nodes.min()) >= float(spectrum.min()) - 1e-9  # Ritz values are inside the spectrum
    assert float(found.nodes.max()) <= float(spectrum.max()) + 1e-9
    assert found.hvps == 80


def test_clusters_carry_their_weights():
    found = density(symmetric(CLUSTERS), probes=16)
    low = found.weights[found.nodes < 0].sum() / 16
    # Random signs scatter a cluster's share by sqrt(2 · .4 · .6 / 300 / 16) = 1 % at most.
    assert float(low) == pytest.approx(0.4, abs=0.03)


def test_wigners_semicircle():
    """GOE of dimension 600, scaled to radius 2: density sqrt(4 - x²)/2π, even moments the Catalan numbers."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(600, 600, generator=generator, dtype=torch.float64)
    # Seeded apart from the matrix: signs from the stream that made it are correlated with it.
    found = density((a + a.T) / math.sqrt(2 * 600), probes=8, steps=40, seed=1)
    for power, catalan in ((2, 1), (4, 2), (6, 5)):
        moment = float((found.weights * found.nodes**power).sum() / 8)
        # v'A²v has variance 2/600, in the mean of 8 vectors 2 %; the sixth moment varies three times as much.
        assert moment == pytest.approx(catalan, rel=0.03 * power)
    x = np.linspace(-2, 2, 2001)
    below = 0.5 + x * np.sqrt(4 - x**2) / (4 * np.pi) + np.arcsin(x / 2) / np.pi
    quantiles = np.interp((np.arange(600) + 0.5) / 600, below, x)
    assert wasserstein(found, quantiles) < 0.02 * 4  # of the span; 8 vectors of 600 entries move 1.4 % of the mass


def test_moments_are_exact_to_the_degree_of_the_quadrature():
    """v'A^k v for k up to 2m - 1 = 9 and the very same v."""
    matrix = symmetric(LINEAR)
    found = density(matrix, probes=1, steps=5, seed=3)
    v = random_signs(300, torch.Generator().manual_seed(3), torch.float64, "cpu") / math.sqrt(300)
    power = v
    for k in range(1, 10):
        power = matrix @ power
        assert float((found.weights * found.nodes**k).sum()) == pytest.approx(float(v @ power), rel=1e-10), k
    assert float((found.weights * found.nodes**10).sum()) != pytest.approx(float(v @ (matrix @ power)), rel=1e-10)


@pytest.mark.parametrize(
    ("spectrum", "hvps"),
    [
        ([5.0] * 20, 1),
        ([0.0] * 20, 1),
        ([-3.0], 1),
        ([1.0, -2.0], 2),
        ([2.0] * 10 + [-1.0] * 30, 2),
        ([1.0, 1.0, 1.0, 4.0, 4.0, 9.0], 3),
    ],
    ids=["identity", "zero", "dimension 1", "dimension 2", "two values", "three values"],
)
def test_degenerate_spectra_close_early_and_are_exact(spectrum, hvps):
    found = density(symmetric(spectrum), probes=8)
    assert found.hvps <= 8 * hvps
    distinct = torch.tensor(sorted(set(spectrum)), dtype=torch.float64)
    away = (found.nodes[:, :, None] - distinct).abs().amin(2)
    assert float(away[found.weights > 1e-9].max()) < 1e-6
    assert integral(found) == pytest.approx(1, abs=1e-6)  # the grid's spacing is known to rounding
    assert float(found.grid[0]) < min(spectrum)
    assert max(spectrum) < float(found.grid[-1])


def test_fewer_dimensions_than_steps_give_the_exact_spectrum_on_average():
    """6 dimensions, 40 steps asked for: every node is an eigenvalue, and mean weights are 1/6."""
    values = [-4.0, -1.0, 0.5, 2.0, 3.0, 7.0]
    found = density(symmetric(values), probes=2000, steps=40)
    assert found.nodes.shape[1] <= 6
    for value in values:
        share = found.weights[(found.nodes - value).abs() < 1e-6].sum() / 2000
        assert float(share) == pytest.approx(1 / 6, abs=0.02)  # sigma 0.15/sqrt(2000) = 0.3 %


@pytest.mark.parametrize("width", [1e-6, 0.01, 1.0])
def test_any_width_integrates_to_one(width):
    found = density(symmetric(LINEAR), width=width, grid_points=50)
    assert found.width == width
    assert integral(found) == pytest.approx(1, abs=1e-12)
    mean = float((found.density * found.grid).sum() * (found.grid[1] - found.grid[0]))
    assert mean == pytest.approx(float((found.nodes * found.weights).sum() / 4), abs=0.05)


def test_the_stated_error_is_the_scatter_over_vectors():
    """Over 300 estimates the mean square error of the density is the mean of its stated variance, to 10 % (2 sigma)."""
    matrix = symmetric(torch.linspace(-1, 3, 40))
    shared = {"steps": 10, "probes": 5, "width": 0.4}
    found = [density(matrix, seed=seed, **shared) for seed in range(300)]
    points = torch.linspace(-1, 3, 9, dtype=torch.float64)
    at = torch.stack([f.density[torch.searchsorted(f.grid, points)] for f in found])
    stated = torch.stack([f.density_stderr[torch.searchsorted(f.grid, points)] for f in found])
    assert float(at.var(0).mean() / stated.square().mean()) == pytest.approx(1, abs=0.15)


def test_the_error_shrinks_as_the_root_of_the_vectors():
    matrix = symmetric(LINEAR)

    def first_moment_error(probes):
        found = [density(matrix, probes=probes, steps=3, seed=seed) for seed in range(200)]
        errors = [float((f.weights * f.nodes).sum() / probes) - float(LINEAR.mean()) for f in found]
        return math.sqrt(sum(e * e for e in errors) / 200)

    # Each rms is good to 1/sqrt(400) = 5 %, their ratio to 7 %.
    assert first_moment_error(1) / first_moment_error(16) == pytest.approx(4, rel=0.2)


def test_one_vector_has_no_error_bar_and_float32_is_enough():
    found = density(symmetric(LINEAR).float(), probes=1)
    assert found.density_stderr is None
    assert wasserstein(found, LINEAR) < 0.06 * 4


def test_global_random_state_is_not_used():
    state = torch.get_rng_state()
    first, second = (spectral_density(lambda v: v, dimension=9, probes=2, steps=3) for _ in range(2))
    assert torch.equal(first.density, second.density)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimension": 0}, "dimension: expected at least 1"),
        ({"probes": 0}, "probes: expected at least 1"),
        ({"steps": 0}, "steps: expected at least 1"),
        ({"grid_points": 2}, "grid_points: expected at least 16"),
        ({"width": 0.0}, "width: expected a positive"),
    ],
)
def test_impossible_problems_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        spectral_density(lambda v: v, **({"dimension": 5, "probes": 1, "steps": 2} | options))


def test_a_product_that_is_not_finite_is_an_error():
    with pytest.raises(FloatingPointError, match="not finite"):
        spectral_density(lambda v: v * torch.nan, dimension=5, probes=1, steps=2)


def capture(subject, instrument, step=1):
    subject.attach(instrument)
    instrument.begin(step)
    instrument.measure(step)
    harvest = instrument.harvest()
    return None if harvest is None else instrument.rows({}, harvest.note)["spectra"]


def test_a_llama_against_its_dense_spectrum(tiny_llama, bench, dense_llama_hessian):
    model, batch = tiny_llama(0, initializer_range=0.2)
    subject = bench(model, batch, None)
    written = capture(subject, Spectrum(probes=8))
    assert set(written) <= {m.name for m in columns("spectra")}
    row = {name: value[0] for name, value in written.items()}
    exact = torch.linalg.eigvalsh(dense_llama_hessian(model, batch))
    grid, estimate = torch.as_tensor(row["grid"]), torch.as_tensor(row["density"])
    share = estimate * (grid[1] - grid[0])
    assert float(share.sum()) == pytest.approx(1, abs=1e-12)
    # Moments of the density against those of the eigenvalues: 8 vectors, three standard errors of Hutchinson's.
    scatter = math.sqrt(2 * float(exact.square().sum()) / 8) / len(exact)
    assert float((share * grid).sum()) == pytest.approx(float(exact.mean()), abs=3 * scatter)
    # Distribution functions on the grid: broadening by 1 % of the span moves mass that far, the vectors 3 % of it.
    distance = (share.cumsum(0) - (exact[None] <= grid[:, None]).double().mean(1)).abs().sum() * (grid[1] - grid[0])
    assert float(distance) < 0.02 * float(exact[-1] - exact[0])
    assert (row["operator"], row["scope"], row["estimator"]) == ("hessian", "all", "slq")
    assert (row["probes"], row["hvps"]) == (8, 320)
    table = to_table("spectra", written, attempt=0, step=1, time_us=0)
    assert len(table.column("density")[0]) == len(table.column("grid")[0]) == 200
    assert subject.events == []


def test_a_probe_without_labels_is_one_event_and_no_row(tiny_llama, bench):
    model, batch = tiny_llama(0)
    subject = bench(model, {"input_ids": batch["input_ids"]}, None)
    assert capture(subject, Spectrum()) is None
    ((severity, kind, message),) = subject.events
    assert (severity, kind) == ("warning", "spectrum_not_measured")
    assert "labels" in message


@pytest.mark.parametrize(
    "setting",
    [{"probes": 0}, {"steps": 1}, {"grid_points": 3}, {"width": 0}, {"width": True}, {"derivative": "exact"}, {"k": 1}],
)
def test_settings_are_checked(setting):
    with pytest.raises(SettingsError, match=r"instruments\.spectrum"):
        Spectrum.build(**setting)
