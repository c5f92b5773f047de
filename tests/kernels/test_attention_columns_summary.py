"""What the received masses say of a head, by definition and in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from lm_telemetry.kernels.attention_columns import SUMMARY_COLUMNS, summary


def plainly(masses):
    """Gini by its definition, the mean difference of all pairs over twice the mean; and the heavy share."""
    x = sorted(masses, reverse=True)
    differences = sum(abs(a - b) for a in x for b in x) / len(x) ** 2
    return differences / (2 * sum(x) / len(x)), sum(x[: math.ceil(len(x) / 10)]) / sum(x)


def named(row):
    return dict(zip(SUMMARY_COLUMNS, row.tolist(), strict=False))


def test_summary():
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(3, 2, 37, generator=generator).pow(4)
    visible = torch.ones(3, 1, 37, dtype=torch.bool)
    visible[1, :, :14] = False
    visible[2] = False  # a sequence of padding is not averaged
    mass = mass * visible
    rows = summary(mass, visible, top=3)
    assert rows.shape == (2, 6 + 6)
    for h, row in enumerate(rows):
        each = [plainly(mass[b, h, visible[b, 0]].tolist()) for b in range(2)]
        heaviest = mass[0, h].topk(3)
        assert named(row) == pytest.approx(
            {
                "n_sequences": 2,
                "n_keys": 37 + 23,
                "mean_mass": mass[:, h].sum().item() / 60,
                "max_mass": mass[:, h].max().item(),
                "gini": (each[0][0] + each[1][0]) / 2,
                "heavy_share": (each[0][1] + each[1][1]) / 2,
            },
            rel=1e-6,
        )
        assert row[6:9].tolist() == heaviest.indices.tolist()
        assert row[9:].tolist() == heaviest.values.tolist()


def test_summary_closed_forms():
    """All on one of n: 1 - 1/n, and the heaviest tenth has all. All equal: 0, and it has ceil(n/10)/n."""
    one, even = torch.zeros(21), torch.full((21,), 2.0)
    one[13] = 5.0
    rows = summary(torch.stack((one, even))[None], torch.ones(1, 1, 21, dtype=torch.bool), top=2)
    assert named(rows[0])["gini"] == pytest.approx(1 - 1 / 21)
    assert named(rows[0])["heavy_share"] == 1
    assert rows[0, 6] == 13
    assert named(rows[1])["gini"] == pytest.approx(0, abs=1e-12)
    assert named(rows[1])["heavy_share"] == pytest.approx(3 / 21)
    assert rows[1, 6:8].tolist() == [0, 1]


def test_summary_of_little():
    visible = torch.tensor([[[False, True, True, False]]])
    row = summary(torch.tensor([[[0.0, 1.0, 3.0, 0.0]]]), visible, top=6)[0]
    assert row[6:].tolist() == [2, 1, -1, -1, -1, -1, 3, 1, 0, 0, 0, 0]
    nothing = summary(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4, dtype=torch.bool), top=1)[0]
    assert nothing.tolist() == [0, 0, 0, 0, 0, 0, -1, 0]
    assert summary(torch.zeros(1, 1, 0), torch.zeros(1, 1, 0, dtype=torch.bool), top=1)[0].tolist() == nothing.tolist()
