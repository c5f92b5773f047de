"""Views of massive activations, of collapsing ranks and of CKA, on planted rows whose answers are known."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import planted
import pytest
import torch
from planted import by

from lm_telemetry.kernels import geometry

approx = pytest.approx
NAN, INFINITY = float("nan"), float("inf")
NAMES = ("massive_activations", "rank_collapse", "drift_between", "cka_layers", "cka_runs")


@pytest.fixture
def plant(store):
    return partial(planted.plant, store)


@pytest.fixture
def ask(store):
    return partial(planted.ask, store)


def site(step, *, layer=0, site="resid", stack="decoder", **columns):
    return {"step": step, "stack": stack, "layer": layer, "site": site} | columns


@pytest.mark.parametrize("view", NAMES[:2])
@pytest.mark.parametrize("value", [NAN, INFINITY, None])
def test_a_capture_without_a_number_changes_nothing(view, value, plant, ask):
    rows = [
        site(s, n_tokens=9, width=4, massive_value=v, massive_ratio=v, effective_rank=v)
        for s, v in ((1, 2.0), (2, 3.0))
    ]
    broken = dict.fromkeys(
        ["massive_value", "massive_ratio", "effective_rank", "participation_ratio", "anisotropy"], value
    )
    plant("representations", rows, run_id="a")
    plant("representations", [*rows, site(3, n_tokens=9, width=4, **broken)], run_id="b")
    activations = [site(s, absmax=5.0, rms=1.0) for s in (1, 2)]
    plant("layers", activations, run_id="a")
    plant("layers", [*activations, site(3, absmax=value, rms=value)], run_id="b")
    one, other = ask(f"FROM {view} ORDER BY run_id")
    assert other | {"run_id": "a"} == one


# -- massive activations -------------------------------------------------------------------------------------------


def massive(step, value, ratio, channel, position, **where):
    place = {"massive_sequence": 1, "massive_channel": channel, "massive_position": position}
    return site(step, massive_value=value, massive_ratio=ratio, **place, **where)


def test_a_massive_activation_emerges(plant, ask):
    plant(
        "representations",
        [
            massive(100, 20.0, 5000.0, 9, 9),  # far from the median, but small
            massive(200, -150.0, 900.0, 9, 9),  # large, but so is the median
            massive(300, -200.0, 2000.0, 7, 3),
            massive(400, 220.0, 2200.0, 7, 0),
            massive(500, 240.0, 2400.0, 8, 0),
            massive(600, 260.0, 2600.0, 7, 0),
        ],
    )
    plant(
        "layers",
        [
            site(s, absmax=a, rms=r)
            for s, a, r in ((10, 150.0, 2.0), (20, 90.0, 0.1), (30, 150.0, 1.4), (40, 99.0, 0.5))
        ],
    )
    (row,) = ask("FROM massive_activations")
    assert (row["probe_step"], row["since_step"], row["previous_step"], row["is_massive"]) == (600, 300, 200, True)
    place = ("massive_value", "massive_ratio", "massive_sequence", "massive_position", "massive_channel")
    assert tuple(row[name] for name in place) == (260, 2600, 1, 0, 7)
    assert (row["channel_share"], row["position_share"]) == (0.75, 0.75)
    assert (row["batch_step"], row["absmax"], row["absmax_ratio"], row["batch_since_step"]) == (40, 99, 198, 30)


def test_probe_and_batch_may_be_alone(plant, ask):
    plant("representations", [massive(1, 500.0, 5000.0, 3, 0), massive(2, 5.0, 5.0, 3, 0)], run_id="probe", rank=2)
    plant("representations", [massive(1, 500.0, 5000.0, 3, None, layer=4, site="final")], run_id="flat")
    plant(
        "layers", [site(9, absmax=500.0, rms=2.0, layer=-1, site="embed"), site(9, absmax=5.0, rms=0.0)], run_id="batch"
    )
    found = by(ask("FROM massive_activations"), "run_id", "site")
    names = (
        "rank",
        "probe_step",
        "since_step",
        "previous_step",
        "position_share",
        "batch_step",
        "absmax_ratio",
        "is_massive",
    )
    assert {key: tuple(row[n] for n in names) for key, row in found.items()} == {
        ("probe", "resid"): (2, 2, 1, None, 1, None, None, False),
        ("flat", "final"): (0, 1, 1, None, None, None, None, True),
        ("batch", "embed"): (0, None, None, None, None, 9, 250, True),
        ("batch", "resid"): (0, None, None, None, None, 9, None, False),
    }


# -- rank collapse -------------------------------------------------------------------------------------------------


def form(step, rank, *, n_tokens=101, width=64, nonfinite=0, **columns):
    return site(step, effective_rank=rank, n_tokens=n_tokens, width=width, nonfinite=nonfinite, **columns)


def test_a_rank_that_falls_over_training_has_its_rate(plant, ask):
    at = np.arange(100, 2100, 100)
    logs = 3.5 - 0.0007 * at + np.random.default_rng(0).normal(0, 0.02, len(at))
    tilt = np.linspace(0.2, 0.75, len(at))
    plant("representations", [form(int(s), float(np.exp(y)), participation_ratio=8 - s / 500, anisotropy=float(a))
                              for s, y, a in zip(at, logs, tilt, strict=True)])  # fmt: skip
    (row,) = ask("FROM rank_collapse")
    (slope, _), covariance = np.polyfit(at, logs, 1, cov=True)
    assert (row["rank_trend"], row["rank_trend_stderr"]) == (
        approx(slope, rel=1e-4),
        approx(covariance[0, 0] ** 0.5, rel=1e-3),
    )
    assert row["rank_change"] == approx(np.exp(logs[-1] - logs[0]), rel=1e-5)
    assert row["rank_share"] == approx(np.exp(logs[-1]) / 64, rel=1e-5)
    assert (row["participation_change"], row["anisotropy_change"]) == (approx(4 / 7.8), approx(0.55))
    assert (row["captures"], row["first_step"], row["last_step"]) == (20, 100, 2000)
    assert (row["rank_over_below"], row["rank_over_entry"]) == (None, 1)
    assert row["flag"] == "over training, anisotropic"


def test_a_rank_that_falls_with_depth(plant, ask):
    stream = [(-1, "embed", 32.0), (0, "resid", 24.0), (1, "resid", 18.0), (2, "resid", 9.0), (3, "final", 27.0)]
    for scale, step in ((2.0, 1), (1.0, 2)):
        plant("representations", [form(step, scale * r, layer=n, site=s) for n, s, r in stream])
    plant("representations", [form(2, r, layer=n, site="mlp_out") for n, r in ((0, 4.0), (1, 3.0))])
    plant("representations", [form(2, 60.0, layer=9, stack="encoder"), form(1, 1.0, layer=-1, stack="encoder")])
    found = by(ask("FROM rank_collapse"), "stack", "site", "layer")
    names = ("rank_over_below", "rank_over_entry", "rank_change", "flag")
    assert {key: tuple(row[n] for n in names) for key, row in found.items()} == {
        ("decoder", "embed", -1): (None, 1, 0.5, "ok"),
        ("decoder", "resid", 0): (0.75, 0.75, 0.5, "ok"),
        ("decoder", "resid", 1): (0.75, 0.5625, 0.5, "ok"),
        ("decoder", "resid", 2): (0.5, 0.28125, 0.5, "with depth"),
        ("decoder", "final", 3): (3, 0.84375, 0.5, "ok"),
        ("decoder", "mlp_out", 0): (None, 1, 1, "ok"),
        ("decoder", "mlp_out", 1): (0.75, 0.75, 1, "ok"),
        ("encoder", "resid", -1): (None, 1, 1, "ok"),
        ("encoder", "resid", 9): (None, 1, 1, "ok"),  # their last captures are not of one step
    }


def test_ranks_of_other_numbers_of_tokens_are_not_compared(plant, ask):
    plant(
        "representations",
        [form(1, 30.0), form(2, 20.0, nonfinite=50), form(3, 8.0, n_tokens=51), form(4, 6.0, n_tokens=51)],
    )
    plant("representations", [form(4, 60.0, layer=1), form(4, 0.0, layer=2)])
    found = by(ask("FROM rank_collapse"), "layer")
    names = ("captures", "n_tokens", "first_step", "rank_change", "rank_share", "rank_over_below")
    assert {layer: tuple(row[n] for n in names) for layer, row in found.items()} == {
        0: (3, 51, 2, approx(0.3), 6 / 50, None),
        1: (1, 101, 4, 1, 60 / 64, None),
        2: (1, 101, 4, None, 0, 0),
    }


# -- CKA between steps, layers and runs ----------------------------------------------------------------------------


def sketch(step, gram, *, n_tokens=3, **where):
    return site(step, gram=gram, n_tokens=n_tokens, **where)


def unbiased_cka(one, other):
    """From features (n, d), by the unbiased estimator of HSIC (Song et al. 2012), in fp64 and without U-centring."""

    def hsic(a, b):
        k, m = ((f @ f.T) * (1 - np.eye(len(f))) for f in (a, b))
        n, ones = len(a), np.ones(len(a))
        cross = ones @ k @ ones * (ones @ m @ ones) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (ones @ k @ m @ ones)
        return (np.trace(k @ m) + cross) / (n * (n - 3))

    return hsic(one, other) / np.sqrt(hsic(one, one) * hsic(other, other))


def test_cka_is_that_of_the_features(plant, ask):
    chance = np.random.default_rng(0)
    features = [chance.normal(size=(16, 5))]
    for _ in range(3):
        features.append(features[-1] + 0.7 * chance.normal(size=(16, 5)))
    grams = [geometry.sketch(torch.tensor(f @ f.T)).tolist() for f in features]
    plant("sketches", [sketch(s, gram, n_tokens=16) for s, gram in enumerate(grams, 1)], run_id="steps")
    plant("sketches", [sketch(1, gram, n_tokens=16, layer=n) for n, gram in enumerate(grams)], run_id="layers")
    pairs = by(ask("FROM drift_between WHERE run_id = 'steps'"), "step_a", "step_b")
    matrix = by(ask("FROM cka_layers WHERE run_id = 'layers'"), "place", "other_place")
    assert len(pairs) == 6
    assert set(matrix) == set(itertools.product(range(4), repeat=2))
    for i, j in itertools.product(range(4), repeat=2):
        cka = unbiased_cka(features[i], features[j])
        assert matrix[i, j]["cka"] == approx(cka, abs=1e-6)
        if i < j:
            pair = pairs[i + 1, j + 1]
            assert (pair["cka"], pair["drift"]) == (approx(cka, abs=1e-6), approx(1 - cka, abs=1e-6))
            assert pair["drift_per_100_steps"] == approx(100 * pair["drift"] / (j - i))


@pytest.mark.parametrize("n", [2, 32, 33, 34, 63, 100, 257])
def test_of_many_sketches_some_are_paired(n, plant, ask):
    plant("sketches", [sketch(10 * i, [1.0, float(i)]) for i in range(n)])
    found = ask("FROM drift_between")
    chosen = sorted({row["step_a"] for row in found} | {row["step_b"] for row in found})
    assert len(found) == len(chosen) * (len(chosen) - 1) // 2
    assert len(chosen) == min(n, 32)
    assert (chosen[0], chosen[-1]) == (0, 10 * (n - 1))
    gaps = np.diff(chosen)
    assert gaps.max() - gaps.min() <= 10
    assert all(row["steps_between"] == row["step_b"] - row["step_a"] > 0 for row in found)


def test_drift_is_of_one_place_and_one_probe(plant, ask):
    plant("sketches", [sketch(1, [3.0, 4.0]), sketch(2, [4.0, 3.0]), sketch(2, [1.0, 1.0], layer=1)])
    plant("sketches", [sketch(3, [1.0], n_tokens=2), sketch(4, [0.0, 0.0])])
    plant("sketches", [sketch(2, [1.0, 1.0])], rank=1)
    for attempt, probe in enumerate(("x", "y", "y")):
        plant("runs", [{"step": 0, "probe_sha256": probe}], run_id="again", attempt=attempt)
        plant("sketches", [sketch(10 * attempt + 1, [1.0, 1.0])], run_id="again", attempt=attempt)
    found = by(ask("FROM drift_between"), "run_id", "step_a", "step_b")
    assert {key: (row["cka"], row["drift"]) for key, row in found.items()} == {
        ("r", 1, 2): (approx(0.96), approx(0.04)),
        ("r", 1, 4): (None, None),
        ("r", 2, 4): (None, None),
        ("again", 11, 21): (approx(1.0), approx(0.0, abs=1e-12)),
    }


def test_the_matrix_of_layers_is_of_one_step_in_order_of_depth(plant, ask):
    places = [(-1, "embed"), (0, "attn_out"), (0, "mlp_out"), (0, "resid"), (1, "resid"), (2, "final")]
    for step in (5, 6):
        plant(
            "sketches", [sketch(step, [float(i), 1.0], layer=n, site=s) for i, (n, s) in reversed([*enumerate(places)])]
        )
    plant("sketches", [sketch(5, [1.0], layer=9, n_tokens=2), sketch(5, [1.0, 0.0], stack="encoder")])
    matrix = [
        row for row in ask("FROM cka_layers WHERE step = 5") if row["stack"] == "decoder" and row["n_tokens"] == 3
    ]
    assert [(r["layer"], r["site"]) for r in matrix[::6]] == places
    assert [(r["place"], r["other_place"]) for r in matrix] == [*itertools.product(range(6), repeat=2)]
    for r in matrix:
        i, j = r["place"], r["other_place"]
        assert r["cka"] == approx((i * j + 1) / np.sqrt((i * i + 1) * (j * j + 1)))
    assert {(r["stack"], r["n_tokens"]) for r in ask("FROM cka_layers WHERE step = 5")} == {
        ("decoder", 3), ("decoder", 2), ("encoder", 3),
    }  # fmt: skip


def test_runs_are_compared_at_equal_steps_on_one_probe(plant, ask):
    for run_id, probe in (("a", "x"), ("b", "x"), ("c", "y"), ("d", None), ("e", None)):
        plant("runs", [{"step": 0, "probe_sha256": probe}], run_id=run_id)
        plant("sketches", [sketch(s, [3.0, 4.0] if run_id == "a" else [4.0, 3.0]) for s in (5, 6)], run_id=run_id)
    plant("sketches", [sketch(7, [1.0, 0.0]), sketch(5, [1.0, 0.0], layer=2, site="final")], run_id="a")
    plant("sketches", [sketch(5, [1.0, 0.0], layer=1), sketch(5, [2.0, 0.0], layer=4, site="final")], run_id="b")
    plant("runs", [{"step": 0, "probe_sha256": "x"}], run_id="b", rank=1)
    plant("sketches", [sketch(5, [1.0, 0.0])], run_id="b", rank=1)
    found = by(ask("FROM cka_runs"), "run_a", "run_b", "step", "layer_a", "layer_b")
    assert {key: row["cka"] for key, row in found.items()} == {
        ("a", "b", 5, 0, 0): approx(0.96),
        ("b", "a", 5, 0, 0): approx(0.96),
        ("a", "b", 6, 0, 0): approx(0.96),
        ("b", "a", 6, 0, 0): approx(0.96),
        ("a", "b", 5, 2, 4): 1.0,
        ("b", "a", 5, 4, 2): 1.0,
    }
