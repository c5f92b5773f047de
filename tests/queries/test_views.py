"""The answers of the views, against ones worked out by hand."""

import math
from datetime import UTC, datetime, timedelta

import planted
import pytest

from lm_telemetry.queries import connect

approx = pytest.approx

EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 DuckDB hands out plain timestamps, in UTC


@pytest.fixture
def ask(store):
    def answer(query):
        con = connect(store.path)
        relation = con.sql(query)
        return [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]

    return answer


def test_training_counts_and_smooths(put, ask):
    for step in range(1, 31):
        put("steps", step, loss=[float(step)], tokens=[10], seconds=[0.5], telemetry_seconds=[0.005], grad_norm=[2.0])
    rows = ask("FROM training")
    assert [row["step"] for row in rows] == list(range(1, 31))
    # The mean of 1..s is (s+1)/2; of the 20 numbers up to s it is s - 9.5.
    assert [row["smoothed_loss"] for row in rows] == approx([(s + 1) / 2 if s < 20 else s - 9.5 for s in range(1, 31)])
    assert [row["tokens_so_far"] for row in rows] == [10 * s for s in range(1, 31)]
    assert {row["tokens_per_second"] for row in rows} == {20.0}
    assert [row["telemetry_share"] for row in rows] == approx([0.01] * 30)


def test_training_keeps_runs_and_ranks_apart(put, ask):
    for run_id, rank, loss in (("a", 0, 1.0), ("a", 1, 3.0), ("b", 0, 5.0)):
        put("steps", 1, run_id=run_id, rank=rank, loss=[loss], tokens=[1])
    assert [
        (row["run_id"], row["rank"], row["smoothed_loss"], row["tokens_so_far"]) for row in ask("FROM training")
    ] == [("a", 0, 1.0, 1), ("a", 1, 3.0, 1), ("b", 0, 5.0, 1)]


def test_training_follows_the_launch_that_took_over(store, ask):
    # Attempt 0 went to step 6; 1 resumed at 4 and fell at 5; 2 resumed at 5. Rank 1 was never resumed.
    for attempt, steps in ((0, range(1, 7)), (1, range(4, 6)), (2, range(5, 8))):
        rows = [{"step": step, "loss": 10.0 * attempt + step, "tokens": 1} for step in steps]
        planted.plant(store, "steps", rows, attempt=attempt)
    planted.plant(store, "steps", [{"step": 6, "loss": 0.0, "tokens": 1}], rank=1)
    rows = ask("FROM training WHERE rank = 0")
    assert [row["loss"] for row in rows] == [1, 2, 3, 14, 25, 26, 27]
    assert rows[-1]["tokens_so_far"] == 7
    assert len(ask("FROM training WHERE rank = 1")) == 1


def test_training_shows_nan_and_survives_nulls_and_zeros(put, ask):
    put("steps", 1, loss=[float("nan")], seconds=[0.0], telemetry_seconds=[0.0], tokens=[5])
    put("steps", 2, loss=[1.0])
    first, second = ask("FROM training")
    assert math.isnan(first["loss"])
    assert math.isnan(second["smoothed_loss"])
    assert (first["tokens_per_second"], first["telemetry_share"]) == (None, None)
    assert (second["tokens_so_far"], second["tokens_per_second"]) == (5, None)


def test_edge_of_stability_compares_like_with_like(put, ask):
    put("steps", 8, loss=[2.5])
    put("steps", 9, loss=[None])
    put("steps", 11, loss=[1.5])
    estimate = {"scope": ["all"], "estimator": ["lanczos"], "index": [0], "residual": [0.1], "converged": [True]}
    put("curvature", 10, operator=["hessian"], value=[150.0], threshold=[200.0], **estimate)
    put("curvature", 11, operator=["hessian"], value=[190.0], threshold=[200.0], **estimate)
    put("curvature", 11, operator=["preconditioned"], value=[30.0], threshold=[38.0], **estimate)
    put("curvature", 12, operator=["gauss_newton"], value=[9.0], threshold=[None], **estimate)
    put("curvature", 13, operator=["hessian"], value=[None], threshold=[200.0], **estimate)
    columns = "operator, step, ratio, at_edge, training_loss"
    assert [tuple(row.values()) for row in ask(f"SELECT {columns} FROM edge_of_stability")] == [
        ("hessian", 10, 0.75, False, 2.5),
        ("hessian", 11, 0.95, True, 1.5),
        ("preconditioned", 11, approx(30 / 38), False, 1.5),
    ]


def test_edge_of_stability_leaves_out_an_overtaken_launch(store, ask):
    def estimates(values, attempt):
        about = {"operator": "hessian", "scope": "all", "estimator": "critical", "threshold": 1.0}
        planted.plant(store, "curvature", [{"step": s, "value": v} | about for s, v in values.items()], attempt=attempt)

    planted.plant(store, "steps", [{"step": 40, "loss": 4.0}, {"step": 60, "loss": 9.0}])
    estimates({40: 0.4, 50: 0.5}, 0)
    planted.plant(store, "steps", [{"step": 41, "loss": 3.0}], attempt=1)
    estimates({100: 0.7}, 1)
    assert [(row["step"], row["value"], row["training_loss"]) for row in ask("FROM edge_of_stability")] == [
        (40, 0.4, 4.0),
        (100, 0.7, 3.0),
    ]


def test_an_estimate_that_is_no_number_is_not_at_the_edge(put, ask):
    put("curvature", 1, operator=["hessian"], estimator=["critical"], value=[float("nan")], threshold=[1.0])
    (row,) = ask("FROM edge_of_stability")
    assert math.isnan(row["ratio"])
    assert row["at_edge"] is False


def heads(**columns):
    base = {
        "stack": "decoder",
        "layer": 0,
        "kind": "self",
        "head": 0,
        "entropy": 2.0,
        "normalized_entropy": 0.5,
        "sink_mass": 0.1,
        "max_logit": 5.0,
        "nonfinite": 0,
    }
    return {name: [value] for name, value in (base | columns).items()}


@pytest.mark.parametrize(
    ("columns", "flag"),
    [
        ({}, "ok"),
        ({"normalized_entropy": 0.049}, "entropy collapse"),
        ({"normalized_entropy": 0.05}, "ok"),
        ({"sink_mass": 0.51}, "sink"),
        ({"sink_mass": 0.5}, "ok"),
        ({"max_logit": 50.1}, "logit growth"),
        ({"normalized_entropy": 0.01, "sink_mass": 0.99, "max_logit": 80.0}, "entropy collapse, logit growth, sink"),
        ({"nonfinite": 3, "entropy": None, "normalized_entropy": None, "max_logit": float("nan")}, "nonfinite"),
        ({"normalized_entropy": None, "sink_mass": None, "max_logit": None, "nonfinite": None}, "ok"),
        ({"sink_mass": float("nan")}, "ok"),
    ],
)
def test_attention_health_flags(put, ask, columns, flag):
    put("heads", 1, **heads(**columns))
    assert [row["flag"] for row in ask("FROM attention_health")] == [flag]


def test_attention_health_compares_first_and_last(put, ask):
    put("heads", 10, **heads(entropy=3.0))
    put("heads", 20, **heads(entropy=1.0, sink_mass=0.9))
    put("heads", 30, **heads(entropy=None, nonfinite=None))  # a row of other columns, by another instrument
    put("heads", 20, **heads(head=1, entropy=4.0))
    put("heads", 20, **heads(kind="cross", entropy=5.0))
    rows = ask("FROM attention_health ORDER BY kind DESC, head")
    assert [(r["kind"], r["head"], r["first_step"], r["last_step"], r["entropy_change"], r["flag"]) for r in rows] == [
        ("self", 0, 10, 20, -2.0, "sink"),
        ("self", 1, 20, 20, 0.0, "ok"),
        ("cross", 0, 20, 20, 0.0, "ok"),
    ]


def layers(**columns):
    base = {
        "stack": "decoder",
        "layer": 0,
        "site": "resid",
        "rms": 1.0,
        "absmax": 5.0,
        "kurtosis": 3.0,
        "zero_fraction": 0.0,
        "outlier_fraction": 0.0,
        "nonfinite": 0,
    }
    return {name: [value] for name, value in (base | columns).items()}


@pytest.mark.parametrize(
    ("columns", "flag"),
    [
        ({}, "ok"),
        ({"nonfinite": 1}, "nonfinite"),
        ({"nonfinite": 9, "rms": None}, "nonfinite"),
        ({"rms": 10.5}, "exploding"),
        ({"rms": 10.0}, "ok"),
        ({"rms": 0.09}, "vanishing"),
        ({"rms": 1e-7}, "vanishing, dead"),
        ({"zero_fraction": 0.9995}, "dead"),
        ({"absmax": 101.0}, "massive activations"),
        ({"absmax": 99.0}, "ok"),
        ({"absmax": 101.0, "rms": 2.0}, "ok"),
        ({"absmax": float("nan"), "zero_fraction": float("nan"), "kurtosis": float("nan")}, "ok"),
        ({"absmax": 5000.0, "rms": 20.0, "nonfinite": 1}, "nonfinite, exploding, massive activations"),
    ],
)
def test_layer_health_flags(put, ask, columns, flag):
    for step in range(1, 11):
        put("layers", step, **layers())
    put("layers", 11, **layers(**columns))
    assert [row["flag"] for row in ask("FROM layer_health")] == [flag]


def test_growth_from_the_start_is_no_explosion(put, ask):
    course = [0.02 * 40 ** min(1.0, step / 5) for step in range(40)]
    for step, rms in enumerate(course):
        put("layers", step, **layers(rms=rms, absmax=3 * rms))
    (row,) = ask("FROM layer_health")
    assert (row["growth"], row["flag"]) == (approx(40.0, rel=1e-6), "ok")
    assert ask("FROM dead_layers") == []


def test_layer_health_measures_growth(put, ask):
    put("layers", 100, **layers(rms=1.0, absmax=2.0))
    put("layers", 2100, **layers(rms=4.0, absmax=7.0))
    put("layers", 100, **layers(layer=1, rms=0.0))
    put("layers", 200, **layers(layer=1, rms=3.0))
    put("layers", 100, **layers(layer=2))
    grown, from_nothing, once = ask("FROM layer_health")
    assert (grown["first_rms"], grown["rms"], grown["growth"], grown["absmax"]) == (1.0, 4.0, 4.0, 7.0)
    assert grown["growth_per_1000_steps"] == approx(2.0)  # doubled every thousand steps
    assert (from_nothing["growth"], from_nothing["flag"]) == (None, "ok")
    assert (once["growth"], once["growth_per_1000_steps"]) == (1.0, None)


def test_overview_tells_how_far_runs_got(store, ask):
    about = {"model_class": "Llama", "n_parameters": 7}
    planted.plant(store, "runs", [{"step": 0, "optimizer": "AdamW"} | about], run_id="a")
    planted.plant(store, "runs", [{"step": 3, "optimizer": "SGD"} | about], run_id="a", attempt=1)
    took = {"tokens": 100, "seconds": 1.0}
    for rank, loss in ((0, 1.0), (1, 2.0)):
        for attempt, steps in ((0, {1: 9.0, 2: 8.0, 3: 7.0, 4: 6.0}), (1, {3: loss})):
            rows = [{"step": s, "loss": x, "telemetry_seconds": 0.01 * s} | took for s, x in steps.items()]
            planted.plant(store, "steps", rows, run_id="a", rank=rank, attempt=attempt)
    planted.plant(store, "steps", [{"step": 5, "loss": 4.0}], run_id="b")
    a, b = ask("FROM overview ORDER BY run_id")
    assert a == {
        "run_id": "a", "model_class": "Llama", "n_parameters": 7, "optimizer": "SGD", "attempts": 2, "ranks": 2,
        "began": EPOCH, "last_row": EPOCH + timedelta(seconds=3),
        "last_step": 3, "last_loss": 1.5, "tokens": 600, "telemetry_share": approx(0.02),
    }  # fmt: skip
    assert (b["model_class"], b["attempts"], b["ranks"], b["last_step"], b["last_loss"]) == (None, 1, 1, 5, 4.0)
    assert b["began"].replace(tzinfo=UTC).timestamp() == 5
