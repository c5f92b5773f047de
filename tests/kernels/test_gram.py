"""Gram matrices: the twin, the kernel under the interpreter and on a GPU, against float64 product by product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_telemetry.kernels import reference
from lm_telemetry.kernels.dispatch import choose
from lm_telemetry.kernels.gram import MAX_TOKENS, gram

CASES = [
    # tokens, width, dtype, mean, deviation
    (1, 1, torch.float32, 0.0, 1.0),
    (5, 123, torch.float32, 0.0, 1.0),
    (33, 5, torch.float32, -3.0, 0.5),
    (37, 64, torch.bfloat16, 0.1, 2.0),
    (64, 96, torch.float16, 5.0, 2.0),
    (9, 1100, torch.float32, 1000.0, 1.0),
    (70, 32, torch.bfloat16, 0.0, 30.0),
    (3, 40, torch.float32, 0.0, 1e30),
]
CASE_IDS = [f"{n}x{d}-{str(dtype).removeprefix('torch.')}" for n, d, dtype, _, _ in CASES]
CENTER = pytest.mark.parametrize("center", [True, False], ids=["centred", "plain"])


def draw(n, d, dtype, mean=0.0, deviation=1.0, *, seed=0):
    return (mean + deviation * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))).to(dtype)


def assert_close(found, x, *, center, rows=None, keep=None):
    """To a few roundings of float64: of each entry when the mean is subtracted, and of the sums."""
    exact = reference.gram(x, rows=rows, keep=keep, center=center)
    length = reference.gram(x, rows=rows, keep=keep, center=False).diagonal().sqrt()
    centred = exact.diagonal().sqrt()
    bound = 16 * torch.finfo(torch.float64).eps * (length[:, None] * centred + centred[:, None] * length)
    assert ((found.matrix - exact).abs() <= bound).all()
    assert torch.equal(found.matrix, found.matrix.T)
    assert found.matrix.dtype == torch.float64


@CENTER
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_twin_and_kernel(case, center, interpreted):
    x = draw(*case)
    for found in (gram(x, center=center), interpreted(gram, x, center=center)):
        assert_close(found, x, center=center)
        assert found.used.all()


@pytest.mark.gpu
@CENTER
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_gpu(case, center, cuda):
    x = draw(*case)
    on_device = x.to(cuda)
    assert choose(on_device).path == "triton"
    found = gram(on_device, center=center)
    assert_close(type(found)(matrix=found.matrix.cpu(), used=found.used.cpu()), x, center=center)


@pytest.mark.gpu
def test_gpu_does_not_synchronise(cuda):
    x, rows = draw(64, 256, torch.bfloat16).to(cuda), torch.arange(0, 64, 2, device=cuda)
    keep = rows % 3 > 0
    gram(x, rows=rows, keep=keep, center=True)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        gram(x, rows=rows, keep=keep, center=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@CENTER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_and_keep(dtype, center, interpreted):
    wide = draw(80, 100, torch.float32, mean=2.0).to(dtype)
    rows = torch.tensor([19, 0, 3, 3, 8])
    keep = torch.tensor([True, False, True, True, True])
    for x in (wide[::2, 7:90], wide[::2, :80].T.contiguous().T):  # rows lie apart; channels lie apart
        for chosen in ({}, {"rows": rows}, {"keep": torch.arange(40) % 3 > 0}, {"rows": rows, "keep": keep}):
            assert_close(gram(x, center=center, **chosen), x, center=center, **chosen)
            if dtype != torch.float64:
                found = interpreted(gram, x, center=center, **chosen)
                assert_close(found, x, center=center, **chosen)
                if "keep" in chosen:
                    assert torch.equal(found.used, chosen["keep"])


@CENTER
def test_broken_tokens_are_set_aside_and_not_spread(center, interpreted):
    x = draw(12, 64, torch.float32)
    x[0, 1], x[3, 63], x[5, 4] = torch.nan, torch.inf, -torch.inf
    fine = torch.tensor([i not in {0, 3, 5} for i in range(12)])
    for found in (gram(x, center=center), interpreted(gram, x, center=center)):
        assert torch.equal(found.used, fine)
        assert_close(found, x, center=center)
        assert not found.matrix[~fine].any()
        alone = gram(x[fine], center=center)
        assert torch.allclose(found.matrix[fine][:, fine], alone.matrix, rtol=1e-12)


@CENTER
def test_nothing_used(center, interpreted):
    x = torch.full((6, 40), torch.nan)
    for found in (gram(x, center=center), interpreted(gram, x, center=center)):
        assert not found.used.any()
        assert not found.matrix.any()
    assert gram(x, rows=torch.arange(0), center=center).matrix.shape == (0, 0)


def test_a_common_mean_does_not_swallow_the_spread(interpreted):
    """Deviation 1 about 1e5: the promise, and proof that subtracting in the product would not keep it in float32."""
    x = 1e5 + draw(48, 128, torch.float32)
    exact = reference.gram(x, center=True)
    plain = x @ x.T
    late = plain - plain.mean(0) - plain.mean(1, keepdim=True) + plain.mean()
    assert (late - exact).abs().max() > exact.diagonal().mean()
    for found in (gram(x, center=True), interpreted(gram, x, center=True)):
        assert torch.allclose(found.matrix, exact, rtol=0, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    mean=st.sampled_from([0.0, 300.0]),
    center=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(shape, dtype, mean, center, seed):
    x = draw(*shape, dtype, mean, seed=seed)
    assert_close(gram(x, center=center), x, center=center)


@pytest.mark.parametrize(
    ("x", "arguments", "said"),
    [
        (torch.zeros(3), {}, "expected x of shape"),
        (torch.zeros(3, 4, dtype=torch.int64), {}, "int64"),
        (torch.zeros(3, 4), {"keep": torch.ones(2, dtype=torch.bool)}, r"keep of shape \(3,\)"),
        (torch.zeros(MAX_TOKENS + 1, 4), {}, "at most 512 tokens; got 513"),
        (torch.zeros(3, 4), {"rows": torch.zeros(600, dtype=torch.int64)}, "got 600"),
    ],
)
def test_bad_arguments(x, arguments, said):
    with pytest.raises(ValueError, match=said):
        gram(x, center=True, **arguments)
