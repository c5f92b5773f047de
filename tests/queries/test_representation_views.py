"""The views `representation_drift` and `cka` on planted rows, against answers worked out by hand."""

from __future__ import annotations

from functools import partial

import planted
import pytest

approx = pytest.approx


@pytest.fixture
def ask(store):
    return partial(planted.ask, store)


@pytest.fixture
def form(store):
    """`form(step, ...)` writes one row of `representations`."""

    def write(step, *, attempt=0, **columns):
        base = {"stack": "decoder", "layer": 0, "site": "resid", "n_tokens": 101, "nonfinite": 0, "neighbours": 10}
        planted.plant(store, "representations", [{"step": step} | base | columns], attempt=attempt)

    return write


@pytest.fixture
def sketched(store):
    """`sketched(step, gram, ...)` writes one sketch."""

    def write(step, gram, *, layer=0, site="resid", stack="decoder", n_tokens=3, **where):
        place = {"step": step, "stack": stack, "layer": layer, "site": site, "n_tokens": n_tokens}
        planted.plant(store, "sketches", [place | {"gram": gram}], **where)

    return write


def test_drift_by_layer_over_steps(form, ask):
    form(1, participation_ratio=8.0, effective_rank=20.0, cka_first=1.0, knn_first=1.0, first_step=1)
    form(
        51, participation_ratio=2.0, effective_rank=30.0, cka_first=0.75, cka_previous=0.75, knn_first=0.5,
        knn_previous=0.5, previous_step=1, first_step=1,
    )  # fmt: skip
    form(251, participation_ratio=4.0, effective_rank=10.0, cka_previous=0.5, previous_step=51, first_step=1)
    form(1, layer=1, participation_ratio=6.0)
    first, second, third, other = ask("FROM representation_drift")
    assert [(r["participation_change"], r["rank_change"]) for r in (first, second, third)] == [
        (1, 1), (0.25, 1.5), (0.5, 0.5),
    ]  # fmt: skip
    assert [r["drift_per_100_steps"] for r in (first, second, third)] == [None, 0.5, 0.25]
    assert [r["cka_first"] for r in (first, second, third)] == [1, 0.75, None]
    assert {r["knn_chance"] for r in (first, second, third)} == {0.1}
    assert (other["layer"], other["participation_change"], other["rank_change"]) == (1, 1, None)


def test_drift_does_not_compare_unequal_tokens(form, ask):
    form(1, participation_ratio=8.0, effective_rank=2.0)
    form(2, participation_ratio=2.0, effective_rank=2.0, nonfinite=51)
    form(3, participation_ratio=2.0, effective_rank=2.0, n_tokens=50)
    assert [(r["participation_change"], r["knn_chance"]) for r in ask("FROM representation_drift")] == [
        (1, 0.1), (None, approx(10 / 49)), (None, approx(10 / 49)),
    ]  # fmt: skip


def test_drift_leaves_out_an_overtaken_launch(store, form, ask):
    for attempt, step in ((0, 1), (1, 10)):
        planted.plant(store, "steps", [{"step": step}], attempt=attempt)
    for step, attempt in ((1, 0), (10, 0), (20, 0), (10, 1), (30, 1)):
        form(step, attempt=attempt, effective_rank=1.0 + attempt)
    assert [(r["attempt"], r["step"], r["rank_change"]) for r in ask("FROM representation_drift")] == [
        (0, 1, 1), (1, 10, 2), (1, 30, 2),
    ]  # fmt: skip


def test_cka_between_layers_is_of_the_last_step(sketched, ask):
    sketched(1, [1.0, 1.0, 1.0])
    sketched(1, [9.0, 0.0, 0.0], layer=1)
    for layer, gram in ((0, [1.0, 0.0, 0.0]), (1, [3.0, 4.0, 0.0]), (2, [0.0, 0.0, 2.0])):
        sketched(2, gram, layer=layer)
    sketched(2, [-1.0, 0.0, 0.0], layer=2, site="final")
    sketched(2, [1.0, 0.0, 0.0], stack="encoder")  # other tokens
    sketched(2, [1.0, 0.0], layer=7, n_tokens=2)
    found = ask("FROM cka WHERE comparison = 'layers'")
    assert {(r["layer"], r["site"], r["other_layer"], r["other_site"]): approx(r["cka"]) for r in found} == {
        (0, "resid", 1, "resid"): 0.6,
        (0, "resid", 2, "resid"): 0.0,
        (0, "resid", 2, "final"): -1.0,
        (1, "resid", 2, "resid"): 0.0,
        (1, "resid", 2, "final"): -0.6,
        (2, "final", 2, "resid"): 0.0,
    }
    assert {(r["step"], r["other_step"], r["other_run_id"]) for r in found} == {(2, 2, "r")}


def test_cka_between_steps_is_with_the_last(sketched, ask):
    for step, gram in ((1, [0.0, 2.0]), (10, [4.0, 3.0]), (20, [5.0, 0.0])):
        sketched(step, gram)
    sketched(20, [1.0, 1.0], rank=1)
    found = ask("FROM cka WHERE comparison = 'steps'")
    assert [(r["step"], r["other_step"], r["cka"]) for r in found] == [(1, 20, 0), (10, 20, approx(0.8))]


def test_cka_between_steps_across_a_restart_needs_the_same_probe(store, sketched, ask):
    for attempt, probe in ((0, "a"), (1, "b"), (2, "b")):
        planted.plant(store, "runs", [{"step": 0, "probe_sha256": probe}], attempt=attempt)
        sketched(10 * attempt + 1, [1.0, 1.0], attempt=attempt)
    assert [(r["step"], r["other_step"]) for r in ask("FROM cka")] == [(11, 21)]


def test_cka_between_runs_needs_the_same_probe(store, sketched, ask):
    for run_id, probe in (("a", "x"), ("b", "x"), ("c", "y"), ("d", None), ("e", None)):
        planted.plant(store, "runs", [{"step": 0, "probe_sha256": probe}], run_id=run_id)
        sketched(5, [3.0, 4.0] if run_id == "a" else [4.0, 3.0], run_id=run_id)
    sketched(5, [1.0, 0.0], run_id="a", layer=2, site="final")
    sketched(7, [2.0, 0.0], run_id="b", layer=4, site="final")  # a deeper model
    found = ask("FROM cka WHERE comparison = 'runs' ORDER BY site DESC")
    assert [(r["run_id"], r["other_run_id"], r["layer"], r["other_layer"], approx(r["cka"])) for r in found] == [
        ("a", "b", 0, 0, 0.96),
        ("a", "b", 2, 4, 1.0),
    ]


def test_cka_leaves_out_an_overtaken_launch_and_what_has_no_direction(store, sketched, ask):
    for attempt, step in ((0, 1), (1, 3)):
        planted.plant(store, "steps", [{"step": step}], attempt=attempt)
    sketched(5, [1.0, 0.0], attempt=0)
    sketched(3, [0.0, 0.0], attempt=1)
    sketched(4, [1.0, 1.0], attempt=1)
    assert [(r["comparison"], r["step"], r["other_step"], r["cka"]) for r in ask("FROM cka")] == [("steps", 3, 4, None)]
