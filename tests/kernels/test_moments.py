"""Moments: the twin, the kernel under the interpreter and on a GPU, against float64 and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_telemetry.kernels import reference
from lm_telemetry.kernels.dispatch import choose
from lm_telemetry.kernels.moments import RAW_COLUMNS, finish, moments, stacked_moments

from .tolerances import MOMENTS, OFFSET

CASES = [
    # tokens, width, dtype, mean, deviation
    (1, 1, torch.float32, 0.0, 1.0),
    (5, 123, torch.float32, 0.0, 1.0),
    (123, 5, torch.float32, -3.0, 0.5),
    (37, 256, torch.bfloat16, 0.1, 2.0),
    (37, 256, torch.float16, 5.0, 2.0),
    (9, 1000, torch.float32, 1000.0, 1.0),
    (3, 4097, torch.bfloat16, 0.0, 30.0),
    (2, 8_192, torch.float32, 0.0, 1e-3),
    (300, 16, torch.float32, 0.0, 1.0),
]
CASE_IDS = [f"{n}x{d}-{str(dtype).removeprefix('torch.')}" for n, d, dtype, _, _ in CASES]


def draw(n, d, dtype, mean=0.0, deviation=1.0, *, seed=0):
    """A skewed, heavy-tailed sample with zeros and outliers in it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    x = mean + deviation * (x + 0.2 * x.square())
    if d > 40:
        x[::2, ::7] = 0
        x[::3, 11] = mean + 50 * deviation
    return x.to(dtype)


def empty():
    return torch.full((len(RAW_COLUMNS),), torch.nan, dtype=torch.float64)


def assert_close(raw, expected):
    """`raw` (9,) agrees with the oracle's dictionary, column by column, to the table's tolerances."""
    got = dict(zip(RAW_COLUMNS, raw.tolist(), strict=True))
    count = max(expected["count"], 1.0)
    scales = {
        "rms": math.sqrt(expected["m2"] / count + expected["mean"] ** 2),
        "sqrt(m2 m4)": math.sqrt(expected["m2"]) * math.sqrt(expected["m4"]),
    }
    for name, (tolerance, relative_to) in MOMENTS.items():
        scale = scales.get(relative_to, abs(expected[name]))
        assert abs(got[name] - expected[name]) <= tolerance * scale, (name, got[name], expected[name])


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_twin(case):
    x = draw(*case)
    out = empty()
    assert moments(x, out=out) is out
    assert_close(out, reference.moments(x))


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_interpreted(case, interpreted):
    x = draw(*case)
    assert_close(interpreted(moments, x, out=empty()), reference.moments(x))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_gpu(case, cuda):
    x = draw(*case)
    on_device = x.to(cuda)
    assert choose(on_device).path == "triton"
    assert_close(moments(on_device, out=empty().to(cuda)).cpu(), reference.moments(x))


@pytest.mark.gpu
def test_gpu_does_not_synchronise(cuda):
    x, rows = draw(64, 256, torch.bfloat16).to(cuda), torch.arange(0, 64, 2, device=cuda)
    keep, out = rows % 3 > 0, empty().to(cuda)
    moments(x, out=out, rows=rows, keep=keep)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        moments(x, out=out, rows=rows, keep=keep)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def hard(name):
    """Inputs that break careless sums, by name."""
    x = draw(12, 64, torch.float32)
    match name:
        case "nan and inf":
            x[0, 1], x[3, 4], x[3, 5] = torch.nan, torch.inf, -torch.inf
            x[7] = torch.nan
        case "nothing finite":
            x[:] = torch.nan
        case "powers overflow":
            x *= 1e30
        case "largest float":
            x[2, 2] = torch.finfo(torch.float32).max
        case "powers underflow":
            x *= 1e-20
        case "subnormal":
            x *= 1e-42
        case "constant":
            x[:] = 3.25
        case "zero":
            x[:] = 0
        case "one value":
            x = torch.tensor([[-7.5]])
    return x


HARD = [
    "nan and inf",
    "nothing finite",
    "powers overflow",
    "largest float",
    "powers underflow",
    "subnormal",
    "constant",
    "zero",
    "one value",
]


@pytest.mark.parametrize("name", HARD)
def test_hard_input(name, interpreted):
    x = hard(name)
    expected = reference.moments(x)
    assert_close(moments(x, out=empty()), expected)
    assert_close(interpreted(moments, x, out=empty()), expected)


@pytest.mark.parametrize("name", ["nan and inf", "powers overflow", "constant"])
def test_one_hard_site_leaves_its_neighbours_alone(name):
    easy = torch.stack([draw(12, 64, torch.float32, seed=s) for s in (1, 2)])
    raw = stacked_moments(torch.cat([easy[:1], hard(name)[None], easy[1:]]))
    assert torch.equal(raw[[0, 2]], stacked_moments(easy))
    assert_close(raw[1], reference.moments(hard(name)))


def test_large_offset(interpreted):
    """Mean 1000, deviation 1: the promise, and proof that the textbook form would not keep it."""
    x = 1000 + torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    exact = x.double()
    naive = (x.square().mean() - x.mean().square()).item()
    assert abs(naive / exact.var(correction=0).item() - 1) > 0.01
    for raw in (moments(x, out=empty()), interpreted(moments, x, out=empty())):
        table = finish(raw.numpy())
        assert abs(table["mean"] / exact.mean().item() - 1) < OFFSET
        assert abs(table["std"] / exact.std(correction=0).item() - 1) < OFFSET


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_and_keep(dtype, interpreted):
    wide = draw(40, 100, torch.float32).to(dtype)
    x = wide[::2, 7:90]  # rows lie apart
    rows = torch.tensor([19, 0, 3, 3, 8])
    keep = torch.tensor([True, False, True, True, True])
    for chosen in ({}, {"rows": rows}, {"keep": torch.arange(20) % 3 > 0}, {"rows": rows, "keep": keep}):
        expected = reference.moments(x, **chosen)
        assert_close(moments(x, out=empty(), **chosen), expected)
        if dtype != torch.float64:
            assert_close(interpreted(moments, x, out=empty(), **chosen), expected)


@pytest.mark.parametrize("chosen", [{"rows": torch.arange(0)}, {"keep": torch.zeros(6, dtype=torch.bool)}])
def test_nothing_taken(chosen, interpreted):
    x = draw(6, 64, torch.float32)
    for raw in (moments(x, out=empty(), **chosen), interpreted(moments, x, out=empty(), **chosen)):
        assert raw.tolist() == [0.0] * 9
        assert all(column.mask.all() for column in finish(raw.numpy()).values())


def test_a_stack_is_its_sites():
    sites = torch.stack([draw(33, 77, torch.bfloat16, seed=s) for s in range(5)])
    for raw, x in zip(stacked_moments(sites), sites, strict=True):
        assert_close(raw, reference.moments(x))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 70)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    scale=st.sampled_from([1e-4, 1.0, 300.0]),
    seed=st.integers(0, 2**16),
)
def test_any_shape(shape, dtype, scale, seed):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    for raw, site in zip(stacked_moments(x), x, strict=True):
        assert_close(raw, reference.moments(site))


def test_input_is_left_alone():
    x = draw(20, 64, torch.float32).requires_grad_()
    before = x.detach().clone()
    raw = moments(x, out=empty())
    assert torch.equal(x.detach(), before)
    assert not raw.requires_grad


def test_finish_closed_forms():
    """Of values -1 and 3 in equal numbers: mean 1, deviation 2, rms sqrt 5, kurtosis 1 (the least there is)."""
    raw = stacked_moments(torch.tensor([-1.0, 3.0]).repeat(1, 4, 8)).numpy()
    table = finish(raw)
    assert {name: column.item() for name, column in table.items()} == pytest.approx(
        {
            "mean": 1.0,
            "std": 2.0,
            "rms": math.sqrt(5),
            "absmax": 3.0,
            "kurtosis": 1.0,
            "zero_fraction": 0.0,
            "outlier_fraction": 0.0,
            "nonfinite": 0,
        },
        rel=1e-6,
    )


def test_finish_masks_what_does_not_exist():
    raw = np.stack([moments(hard(name), out=empty()).numpy() for name in ("constant", "nothing finite", "zero")])
    table = finish(raw)
    assert table["kurtosis"].mask.tolist() == [True, True, True]
    assert table["std"].mask.tolist() == [False, True, False]
    assert table["nonfinite"].tolist() == [0, 12 * 64, 0]
    assert table["zero_fraction"].tolist() == [0.0, None, 1.0]


def test_outliers_are_of_their_own_token():
    """One token a thousand times larger than the rest is no outlier; one entry of a hundred in a token of ones is."""
    x = torch.ones(4, 200)
    x[0] *= 1000
    x[1, 5] = 100
    assert moments(x, out=empty())[8] == 1


@pytest.mark.parametrize(
    ("x", "arguments", "said"),
    [
        (torch.zeros(3), {}, "expected x of shape"),
        (torch.zeros(3, 4, dtype=torch.int64), {}, "int64"),
        (torch.zeros(3, 4), {"out": torch.zeros(9)}, "float64"),
        (torch.zeros(3, 4), {"out": torch.zeros(8, dtype=torch.float64)}, r"\(9,\)"),
        (torch.zeros(3, 4), {"keep": torch.ones(2, dtype=torch.bool)}, r"keep of shape \(3,\)"),
    ],
)
def test_bad_arguments(x, arguments, said):
    with pytest.raises(ValueError, match=said):
        moments(x, **({"out": empty()} | arguments))


def test_bad_stack():
    with pytest.raises(ValueError, match="stack of shape"):
        stacked_moments(torch.zeros(3, 4))
