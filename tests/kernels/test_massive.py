"""The massive activation, against NumPy on the whole array."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_telemetry.kernels.massive import COLUMNS, massive_activation


def found(x, *, real=None, rows=None, keep=None):
    rows = torch.arange(len(x)) if rows is None else rows
    keep = torch.ones(len(rows), dtype=torch.bool) if keep is None else keep
    raw = massive_activation(x, rows=rows, keep=keep, real=real)
    assert raw.dtype == torch.float64
    return dict(zip(COLUMNS, raw.tolist(), strict=True))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 20)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    broken=st.integers(0, 3),
    seed=st.integers(0, 2**16),
)
def test_any(shape, dtype, broken, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    x.view(-1)[torch.randint(x.numel(), (broken,), generator=generator)] = torch.nan
    real = torch.rand(shape[0], generator=generator) < 0.7
    real[0] = True
    rows, keep = torch.randint(shape[0], (5,), generator=generator), torch.rand(5, generator=generator) < 0.7
    got = found(x, real=real, rows=rows, keep=keep)
    magnitude = x.double().abs().numpy()
    finite = np.where(np.isfinite(magnitude) & real.numpy()[:, None], magnitude, -1)
    assert got["magnitude"] == finite.max()
    if got["magnitude"] >= 0:
        entry = float(x[int(got["token"]), int(got["channel"])])
        assert (got["value"], abs(entry)) == (entry, got["magnitude"])
        assert real[int(got["token"])]
    sampled = magnitude[rows[keep].numpy()]
    sampled = np.sort(sampled[np.isfinite(sampled)])
    if len(sampled):
        assert got["median"] == pytest.approx(sampled[(len(sampled) - 1) // 2], rel=1e-6)


def test_its_place_and_sign():
    x = torch.ones(4, 6)
    x[2, 5], x[3, 1] = -1000.0, torch.inf
    assert found(x) == {"magnitude": 1000, "value": -1000, "token": 2, "channel": 5, "median": 1}


def test_padding_is_not_looked_at():
    x = torch.ones(4, 6)
    x[0, 0], x[1, 3] = 1e6, 7.0
    assert found(x, real=torch.tensor([False, True, True, True]))["value"] == 7


def test_nothing_finite():
    got = found(torch.full((3, 4), torch.nan))
    assert got["magnitude"] == -1
    assert math.isnan(got["median"])
