"""The views of training dynamics on planted rows whose answers are known."""

from __future__ import annotations

from functools import partial

import numpy as np
import planted
import pytest
from planted import by, is_nan

approx = pytest.approx
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def plant(store):
    return partial(planted.plant, store)


@pytest.fixture
def ask(store):
    return partial(planted.ask, store)


def steps(losses, **columns):
    """Rows of `steps` from 1 on; a column is a value, or a function of the step."""
    return [
        {"step": s, "loss": loss} | {name: c(s) if callable(c) else c for name, c in columns.items()}
        for s, loss in enumerate(losses, start=1)
    ]


def noise(n, seed=0, mean=3.0, sd=0.1):
    return np.random.default_rng(seed).normal(mean, sd, n)


# -- spikes --------------------------------------------------------------------------------------------------------


def test_white_noise_has_no_spikes(plant, ask):
    for seed, (run_id, rank) in enumerate((r, k) for r in "ab" for k in range(2)):
        plant("steps", steps(noise(2500, seed)), run_id=run_id, rank=rank)
    assert ask("FROM spikes") == []


def test_a_planted_spike_is_found_where_it_is(plant, ask):
    losses = noise(600)
    losses[399] += 1.0
    plant("steps", steps(losses), run_id="a", rank=1)
    plant("steps", steps(noise(600, 1, mean=5.0)), run_id="a", rank=0)
    plant("steps", steps(noise(600, 2)), run_id="b")
    (spike,) = ask("FROM spikes")
    assert (spike["run_id"], spike["rank"], spike["step"], spike["last_step"], spike["n_steps"]) == (
        "a",
        1,
        400,
        400,
        1,
    )
    window = losses[299:399]
    assert (spike["baseline"], spike["baseline_sd"]) == approx((window.mean(), window.std(ddof=1)))
    assert spike["sigmas"] == approx((losses[399] - window.mean()) / window.std(ddof=1))
    assert (spike["loss"], spike["peak_loss"]) == (losses[399], losses[399])
    assert spike["loss_after"] == approx(losses[400:420].mean())


def test_a_large_spike_does_not_hide_the_next(plant, ask):
    losses = noise(300)
    losses[199] += 100.0
    losses[219] += 1.0
    plant("steps", steps(losses))
    first, second = ask("FROM spikes")
    assert (first["step"], second["step"]) == (200, 220)
    assert second["baseline"] == approx(np.delete(losses[119:219], 80).mean())


def test_a_loss_that_is_no_number_is_a_spike(plant, ask):
    losses = noise(100)
    losses[4] = NAN  # before there is any baseline
    losses[49:52] = NAN, 50.0, INFINITY
    losses[80:] = NAN
    plant("steps", steps(losses))
    alone, mixed, ending = ask("FROM spikes")
    assert (alone["step"], alone["n_nonfinite"], alone["baseline_sd"] is not None) == (5, 1, True)
    assert is_nan(alone["loss"])
    assert (alone["peak_loss"], alone["sigmas"]) == (None, None)
    assert (mixed["step"], mixed["last_step"], mixed["n_steps"], mixed["n_nonfinite"]) == (50, 52, 3, 2)
    assert mixed["peak_loss"] == 50.0
    assert mixed["baseline"] == approx(np.delete(losses[:49], 4).mean())
    assert (ending["step"], ending["last_step"], ending["n_nonfinite"], ending["loss_after"]) == (81, 100, 20, None)


def test_what_else_moved(plant, ask):
    losses = noise(200)
    losses[149:151] += 2.0, 3.0
    moved = {
        "grad_norm": lambda s: NAN if s == 100 else 20.0 if s == 150 else 2.0,
        "learning_rate": lambda s: 1e-3 if s < 150 else 2e-3,
        "update_norm": lambda s: float(s) if s % 50 == 0 else None,
    }
    plant("steps", steps(losses, **moved))
    estimate = {"operator": "hessian", "scope": "all", "threshold": 100.0}
    top = estimate | {"estimator": "lanczos"}
    plant(
        "curvature",
        [
            {"step": 100, "index": 0, "value": 300.0} | top,
            {"step": 140, "index": 0, "value": 96.0} | top,
            {"step": 140, "index": 1, "value": 500.0} | top,
            {"step": 140, "value": 98.0, "estimator": "critical"} | estimate,
            {"step": 145, "index": 0, "value": NAN} | top,
            {"step": 151, "index": 0, "value": 120.0} | top,
        ],
    )
    plant("layers", [{"step": s, "layer": i, "nonfinite": n} for s, i, n in ((149, 0, 9), (150, 0, 3), (151, 1, 4))])
    plant("events", [{"step": 150, "severity": s, "kind": "k"} for s in ("warning", "info", "error")])
    (spike,) = ask("FROM spikes")
    assert (spike["step"], spike["last_step"], spike["peak_loss"]) == (150, 151, losses[150])
    assert (spike["grad_norm"], spike["grad_norm_ratio"]) == (20.0, approx(10.0))
    assert (spike["learning_rate"], spike["learning_rate_ratio"], spike["update_norm"]) == (2e-3, approx(2.0), 150.0)
    assert (spike["edge_ratio"], spike["nonfinite_activations"], spike["alarms"]) == (0.98, 7, 2)


def test_a_loss_that_stays_high_becomes_the_baseline(plant, ask):
    losses = noise(400)
    losses[200:] += 3.0
    plant("steps", steps(losses))
    rows = ask("FROM spikes")
    assert rows[0]["step"] == 201
    assert rows[-1]["last_step"] < 215
    assert rows[0]["loss_after"] == approx(6.0, abs=0.2)


@pytest.mark.parametrize(
    "losses",
    [
        [3.0] * 15 + [9.0] + [3.0] * 5,  # too early to know what is usual
        [3.0 + 1e-7 * (s % 2) for s in range(100)] + [3.000001],  # rounding
        [10.0 * 0.97**s for s in range(300)],
        [None] * 50,
        [0.0] * 100,
    ],
    ids=["early", "rounding", "falling", "null", "zero"],
)
def test_no_false_alarm(losses, plant, ask):
    plant("steps", steps(losses))
    assert ask("FROM spikes") == []


# -- update ratios -------------------------------------------------------------------------------------------------


def test_update_ratios_take_a_block_together(plant, ask):
    rows = [
        {"name": "h.0.a", "stack": "decoder", "layer": 0, "norm": 3.0, "update_norm": 0.003},
        {"name": "h.0.b", "stack": "decoder", "layer": 0, "norm": 4.0, "update_norm": 0.004},
        {"name": "h.0.c", "stack": "decoder", "layer": 0, "norm": 1e3, "update_norm": None},  # not its turn
        {"name": "h.1.a", "stack": "decoder", "layer": 1, "norm": 1.0, "update_norm": 0.02},
        {"name": "h.2.a", "stack": "decoder", "layer": 2, "norm": 1.0, "update_norm": 5e-5},
        {"name": "h.3.a", "stack": "decoder", "layer": 3, "norm": 1.0, "update_norm": NAN},
        {"name": "h.4.a", "stack": "decoder", "layer": 4, "norm": 0.0, "update_norm": 0.1},
        {"name": "embed", "norm": 2.0, "update_norm": 0.0},
        {"name": "head", "norm": INFINITY, "update_norm": 0.0},
    ]
    plant("params", [{"step": 7} | row for row in rows])
    plant("steps", [{"step": 7, "learning_rate": 1e-4}])
    plant("params", [{"step": 7, "name": "embed", "norm": 2.0, "update_norm": 0.002}], rank=1)
    found = by(ask("FROM update_ratios WHERE rank = 0"), "layer", "name")
    block = found[0, None]
    assert (block["n_tensors"], block["norm"], block["update_norm"]) == (2, approx(5.0), approx(0.005))
    assert (block["update_ratio"], block["decades"]) == (approx(1e-3), approx(0.0, abs=1e-7))
    assert (block["learning_rate"], block["step"]) == (1e-4, 7)
    assert found[1, None]["decades"] == approx(np.log10(20))
    assert {key: row["flag"] for key, row in found.items()} == {
        (0, None): "ok", (1, None): "fast", (2, None): "slow", (3, None): "nonfinite", (4, None): "ok",
        (None, "embed"): "still", (None, "head"): "nonfinite",
    }  # fmt: skip
    assert (found[4, None]["update_ratio"], found[None, "embed"]["decades"]) == (None, None)
    (other,) = ask("FROM update_ratios WHERE rank = 1")
    assert (other["flag"], other["learning_rate"]) == ("ok", None)


# -- critical batch ------------------------------------------------------------------------------------------------


def gradient_noise(n, *, square=4.0, variance=32.0, small=2, parts=4, seed=0):
    """(gradient_square, gradient_variance, grad_norm) of captures with |G|² = `square` and tr S = `variance`."""
    random = np.random.default_rng(seed)
    true = np.full(64, (square / 64) ** 0.5)
    micro = true + random.normal(0, (variance / 64 / small) ** 0.5, (n, parts, 64))
    b, B = small, small * parts
    g_b, g_B = (micro[:, 0] ** 2).sum(-1), (micro.mean(1) ** 2).sum(-1)
    return (B * g_B - b * g_b) / (B - b), (g_b - g_B) / (1 / b - 1 / B), g_B**0.5


def captures(squares, variances, norms):
    return [
        {"step": 10 * i, "gradient_square": s, "gradient_variance": v, "grad_norm": g}
        for i, (s, v, g) in enumerate(zip(squares, variances, norms, strict=True), start=1)
    ]


def test_the_critical_batch_is_a_ratio_of_averages(plant, ask):
    squares, variances, norms = gradient_noise(2000)
    plant("steps", captures(squares, variances, norms))
    rows = ask("FROM critical_batch ORDER BY step")
    assert {row["batch"] for row in rows} == {8.0}  # nobody stored it
    last = rows[-1]
    assert (last["step"], last["ranks"], last["captures"]) == (20_000, 1, 100)
    assert last["noise_scale"] == approx(variances[-100:].mean() / squares[-100:].mean())
    assert last["step_efficiency"] == approx(8 / (8 + last["noise_scale"]))
    assert last["token_efficiency"] == approx(1 - last["step_efficiency"])
    # Twenty windows without a common capture scatter as much as each says, about tr S / |G|² = 8.
    apart = rows[99::100]
    scatter = np.std([row["noise_scale"] for row in apart], ddof=1)
    assert np.mean([row["noise_scale_stderr"] for row in apart]) == approx(scatter, rel=0.4)
    assert np.mean([row["noise_scale"] for row in apart]) == approx(8.0, rel=0.05)
    assert {row["verdict"] for row in apart} == {"balanced"}


@pytest.mark.parametrize(("variance", "verdict"), [(400.0, "small"), (4.0, "large")])
def test_a_batch_far_from_the_noise_scale(variance, verdict, plant, ask):
    plant("steps", captures(*gradient_noise(300, variance=variance)))
    row = ask("FROM critical_batch ORDER BY step")[-1]
    assert (row["batch"], row["verdict"]) == (8.0, verdict)
    assert row["batch_ratio"] == approx(8 / row["noise_scale"])


def test_ranks_are_averaged_and_runs_are_not(plant, ask):
    for rank in range(2):
        plant("steps", captures([1.0 + 2 * rank], [4.0 + 4 * rank], [2.0**0.5 + rank]), rank=rank)
    plant("steps", captures([1.0], [-3.0], [1.0]), run_id="noisy")
    plant("steps", [{"step": 1, "loss": 1.0}, *captures([NAN, 2.0], [1.0, 2.0], [1.0, None])], run_id="sparse")
    found = by(ask("FROM critical_batch"), "run_id")
    assert (found["r"]["ranks"], found["r"]["gradient_square"], found["r"]["noise_scale"]) == (2, 2.0, 3.0)
    assert (found["noisy"]["noise_scale"], found["noisy"]["verdict"]) == (None, None)
    assert found["sparse"]["step"] == 20
    assert (found["sparse"]["batch"], found["sparse"]["noise_scale"], found["sparse"]["verdict"]) == (None, 1.0, None)


def test_a_norm_of_another_gradient_tells_no_batch(plant, ask):
    squares, variances, norms = gradient_noise(200)
    plant("steps", captures(squares, variances, 1.7 * norms))  # a loop that does not divide its losses
    rows = ask("FROM critical_batch WHERE captures >= 20")
    assert {row["batch"] for row in rows} == {row["batch_ratio"] for row in rows} == {None}
    assert all(row["noise_scale"] is not None for row in rows)
