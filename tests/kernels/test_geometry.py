"""Geometry from Gram matrices, against singular values, closed forms and brute force on the tokens themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_telemetry.kernels import geometry
from lm_telemetry.kernels.gram import gram

approx = pytest.approx


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def centred(x):
    return gram(x, center=True).matrix


def plain(x):
    return gram(x, center=False).matrix


def of_rank(r, n=120, d=64, seed=0):
    return normal(n, r, seed=seed) @ normal(r, d, seed=seed + 1)


# -- ranks -----------------------------------------------------------------------------------------------------------


def by_svd(x):
    """Participation ratio, effective rank and stable rank of centred tokens, and RankMe, from NumPy's SVD."""
    x = x.double().numpy()
    s, raw = (np.linalg.svd(m, compute_uv=False) for m in (x - x.mean(0), x))
    ranks = []
    for values in (s, raw):
        p = values / values.sum()
        p = p[p > 1e-15]
        ranks.append(math.exp(-(p * np.log(p)).sum()))
    return (s**2).sum() ** 2 / (s**4).sum(), ranks[0], (s**2).sum() / s[0] ** 2, ranks[1]


def by_gram(x):
    singular = geometry.singular_values(centred(x))
    return (
        geometry.participation_ratio(centred(x)),
        geometry.effective_rank(singular),
        geometry.stable_rank(singular),
        geometry.effective_rank(geometry.singular_values(plain(x))),
    )


@pytest.mark.parametrize(
    "x",
    [
        normal(100, 40),
        normal(40, 100).float(),
        normal(60, 30).bfloat16(),
        5 + normal(50, 80) * torch.logspace(0, -6, 80),
        of_rank(3),
        of_rank(3).float() + 1000,
        torch.cat([1000 * normal(2, 64), normal(100, 64)]),  # two massive tokens
    ],
    ids=["tall", "wide", "bf16", "decaying", "rank 3", "rank 3, offset", "massive"],
)
def test_ranks_equal_those_of_singular_values(x):
    assert by_gram(x) == approx(by_svd(x), rel=2e-5)


def test_singular_values_are_numpys_without_the_zeros():
    x = of_rank(5)
    found = geometry.singular_values(plain(x))
    assert found.tolist() == approx(np.linalg.svd(x.numpy(), compute_uv=False)[:5].tolist(), rel=1e-10)


def test_equal_directions_count_as_many_as_they_are():
    """Orthonormal tokens: every rank is their number; about their mean, one less."""
    x = torch.eye(12, 30, dtype=torch.float64)
    assert by_gram(x) == approx((11, 11, 11, 12), rel=1e-9)


def test_a_known_spectrum():
    """Singular values 3 and 1: 10^2/82, exp(H(3/4, 1/4)), 10/9."""
    q = torch.linalg.qr(normal(20, 2))[0]
    values = torch.tensor([3.0, 1.0], dtype=torch.float64)
    g = (q * values) @ (q * values).T
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    singular = geometry.singular_values(g)
    assert geometry.participation_ratio(g) == approx(100 / 82)
    assert geometry.effective_rank(singular) == approx(math.exp(entropy))
    assert geometry.stable_rank(singular) == approx(10 / 9)


def test_participation_ratio_of_gaussian_tokens():
    """(n - 1) D / (n + D), as the docstring has it: 25.5 for 50 tokens of 50 channels, and not 50."""
    for n, d in ((50, 50), (200, 30), (30, 200)):
        found = np.mean([geometry.participation_ratio(centred(normal(n, d, seed=s))) for s in range(20)])
        assert found == approx((n - 1) * d / (n + d), rel=0.02)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_ranks_have_no_unit(scale):
    x = normal(40, 25)
    assert by_gram(x * scale) == approx(by_gram(x), rel=1e-9)


# -- direction -------------------------------------------------------------------------------------------------------


def test_anisotropy_is_the_mean_cosine_of_distinct_tokens():
    x = 0.5 + normal(20, 30)
    unit = torch.nn.functional.normalize(x, dim=1)
    pairs = [float(unit[i] @ unit[j]) for i in range(20) for j in range(20) if i != j]
    assert geometry.anisotropy(plain(x)) == approx(np.mean(pairs), rel=1e-9)


def test_anisotropy_of_extremes():
    same = normal(1, 30).expand(9, 30)
    opposite = torch.cat([same[:1], -same[:1]])
    assert geometry.anisotropy(plain(same)) == approx(1.0)
    assert geometry.anisotropy(plain(opposite)) == approx(-1.0)
    assert geometry.anisotropy(plain(torch.eye(6))) == approx(0.0)
    with_nothing = torch.cat([same, torch.zeros(3, 30, dtype=torch.float64)])
    assert geometry.anisotropy(plain(with_nothing)) == approx(1.0), "a token of length 0 has no direction"


# -- similarity ------------------------------------------------------------------------------------------------------


def unbiased_hsic(k, l):  # noqa: E741  -- the formula's name
    """Song et al. 2012, equation 5, on Gram matrices that are neither centred nor cleared of their diagonal."""
    n = len(k)
    k, l = (m - np.diag(np.diag(m)) for m in (k, l))  # noqa: E741
    one = np.ones(n)
    outer = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ l) + outer - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


def cka(x, y):
    return geometry.debiased_cka(geometry.sketch(centred(x)), geometry.sketch(centred(y)))


def test_debiased_cka_is_that_of_the_unbiased_hsic():
    x, mixed = 3 + normal(50, 20), normal(20, 35, seed=1)
    y = x @ mixed + 2 * normal(50, 35, seed=2)
    k, l = (x @ x.T).numpy(), (y @ y.T).numpy()  # noqa: E741
    exact = unbiased_hsic(k, l) / math.sqrt(unbiased_hsic(k, k) * unbiased_hsic(l, l))
    assert 0.2 < exact < 0.95
    assert cka(x, y) == approx(exact, abs=1e-6)
    a, b = geometry.u_centred(plain(x)), geometry.u_centred(centred(y))
    assert float((a * b).sum()) / (50 * 47) == approx(unbiased_hsic(k, l), rel=1e-9)


def test_u_centred_rows_sum_to_zero():
    a = geometry.u_centred(plain(4 + normal(30, 12)))
    assert torch.allclose(a.sum(1), torch.zeros(30, dtype=torch.float64), atol=1e-9)
    assert not a.diagonal().any()
    assert torch.allclose(a, geometry.u_centred(centred(4 + normal(30, 12))), atol=1e-9)


def test_a_sketch_is_the_upper_triangle_row_by_row():
    g = centred(normal(6, 9))
    a = geometry.u_centred(g)
    expected = [float(a[i, j]) for i in range(6) for j in range(i + 1, 6)]
    found = geometry.sketch(g)
    assert found.dtype == torch.float32
    assert found.tolist() == approx(expected, rel=1e-6)


def test_debiased_cka_does_not_see_rotation_scale_or_offset():
    x = normal(60, 24)
    rotation = torch.linalg.qr(normal(24, 24, seed=5))[0]
    assert cka(x, 7 * x @ rotation + normal(24, seed=6)) == approx(1.0, abs=1e-6)
    assert cka(x, x * torch.logspace(0, 2, 24)) < 0.9


def test_debiased_cka_of_unrelated_tokens_is_about_zero():
    """Without the correction it is D / (n + D), here .62."""
    found = [cka(normal(60, 100, seed=2 * s), normal(60, 100, seed=2 * s + 1)) for s in range(20)]
    assert abs(np.mean(found)) < 0.02
    k, l = (centred(normal(60, 100, seed=s)) for s in (0, 1))  # noqa: E741
    assert float((k * l).sum() / (k.norm() * l.norm())) == approx(100 / 160, abs=0.03)


def test_too_few_tokens_have_no_debiased_similarity():
    with pytest.raises(ValueError, match="at least 4 tokens; got 3"):
        geometry.u_centred(plain(normal(3, 8)))


# -- neighbours ------------------------------------------------------------------------------------------------------


def brute_force_neighbours(x, k):
    unit = x / x.norm(dim=1, keepdim=True)
    order = []
    for i in range(len(x)):
        others = [(float(unit[i] @ unit[j]), -j) for j in range(len(x)) if j != i]
        order.append([-j for _, j in sorted(others, reverse=True)[:k]])
    return order


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 30), d=st.integers(2, 20), k=st.integers(1, 12), seed=st.integers(0, 2**16))
def test_neighbours_are_those_of_brute_force(n, d, k, seed):
    x = normal(n, d, seed=seed)
    assert geometry.nearest_neighbours(plain(x), k).tolist() == brute_force_neighbours(x, min(k, n - 1))


def test_ties_go_to_the_first_whatever_the_rounding():
    """Four words, each said ten times, as at the embedding; another order of summation moves nothing."""
    g = plain(normal(4, 16)[torch.arange(40) % 4])
    rounding = 1e-14 * normal(40, 40, seed=3)
    a, b = (geometry.nearest_neighbours(m, 6) for m in (g, g + g * (rounding + rounding.T)))
    assert a[0].tolist() == [4, 8, 12, 16, 20, 24]
    assert torch.equal(a, b)


def test_overlap_counts_what_is_shared():
    a = torch.tensor([[1, 2], [0, 3]])
    assert geometry.neighbour_overlap(a, a) == 1.0
    assert geometry.neighbour_overlap(a, a.flip(1)) == 1.0
    assert geometry.neighbour_overlap(a, torch.tensor([[2, 3], [2, 1]])) == 0.25


def test_overlap_of_unrelated_tokens_is_that_of_chance():
    found = [
        geometry.neighbour_overlap(
            *(geometry.nearest_neighbours(plain(normal(61, 30, seed=s + t)), 6) for t in (0, 50))
        )
        for s in range(20)
    ]
    assert np.mean(found) == approx(6 / 60, abs=0.02)


# -- what does not exist ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 5])
def test_nothing_is_made_of_nothing(n):
    g = torch.zeros(n, n, dtype=torch.float64)
    singular = geometry.singular_values(g)
    assert len(singular) == 0
    assert geometry.participation_ratio(g) is None
    assert geometry.effective_rank(singular) is None
    assert geometry.stable_rank(singular) is None
    assert geometry.anisotropy(g) is None
    assert geometry.nearest_neighbours(g, 3).shape == (n, min(3, max(n - 1, 0)))


def test_a_constant_is_similar_to_nothing():
    constant = geometry.sketch(centred(torch.ones(8, 4)))
    assert geometry.debiased_cka(constant, geometry.sketch(centred(normal(8, 4)))) is None
    assert geometry.neighbour_overlap(torch.zeros(1, 0), torch.zeros(1, 0)) is None
