"""The view `head_importance`, against answers worked out by hand."""

from __future__ import annotations

from functools import partial

import planted
import pytest

approx = pytest.approx


@pytest.fixture
def ask(store):
    return partial(planted.ask, store)


@pytest.fixture
def effect(store):
    def write(step, head, value, *, stderr=0.5, layer=0, kind="self", ablation="mean", **where):
        columns = {"stack": "decoder", "layer": layer, "kind": kind, "head": head, "ablation": ablation}
        columns |= {"step": step, "effect": value, "stderr": stderr}
        planted.plant(store, "head_effects", [columns], **where)

    return write


@pytest.fixture
def attention(store):
    def write(step, head, score, *, layer=0, kind="self", entropy=1.0, **where):
        columns = {"stack": "decoder", "layer": layer, "kind": kind, "head": head}
        columns |= {"step": step, "induction_score": score, "prev_token_mass": 0.25, "entropy": entropy}
        planted.plant(store, "heads", [columns], **where)

    return write


def test_heads_are_placed_by_their_last_effect(effect, ask):
    effect(10, 0, 9.0)
    effect(20, 0, 1.0)
    effect(20, 1, 2.0, stderr=0.25)
    effect(10, 0, 4.0, layer=1, stderr=None)  # its turn came earlier
    effect(20, 1, -0.5, layer=1, stderr=0.0)
    rows = ask("FROM head_importance")
    assert [(r["place"], r["layer"], r["head"], r["step"], r["effect"], r["z"], r["share"]) for r in rows] == [
        (1, 1, 0, 10, 4.0, None, 1.0),
        (2, 0, 1, 20, 2.0, 8.0, 0.5),
        (3, 0, 0, 20, 1.0, 2.0, 0.25),
        (4, 1, 1, 20, -0.5, None, -0.125),
    ]
    assert {r["attention_step"] for r in rows} == {None}


def test_runs_ranks_and_ablations_are_apart(effect, ask):
    effect(1, 0, 1.0)
    effect(1, 0, 2.0, ablation="zero")
    effect(1, 0, 3.0, rank=1)
    effect(1, 0, 4.0, run_id="s")
    effect(1, 0, -1.0, run_id="t")
    rows = ask("FROM head_importance")
    assert [(r["run_id"], r["rank"], r["ablation"], r["place"], r["share"]) for r in rows] == [
        ("r", 0, "mean", 1, 1.0),
        ("r", 0, "zero", 1, 1.0),
        ("r", 1, "mean", 1, 1.0),
        ("s", 0, "mean", 1, 1.0),
        ("t", 0, "mean", 1, None),
    ]


def test_statistics_are_those_of_the_nearest_step(effect, attention, ask):
    effect(100, 0, 1.0)
    effect(100, 1, 0.5)
    effect(100, 0, 0.25, kind="cross")
    attention(80, 0, 0.125)
    attention(90, 0, 0.5)
    attention(110, 0, 0.75)  # as near; the earlier one is taken
    attention(101, 0, None, entropy=None)  # a row of other columns
    attention(100, 0, 0.875, layer=1)
    attention(500, 1, 0.25)
    attention(100, 0, 1.0, rank=1)
    columns = "head, kind, attention_step, induction_score, prev_token_mass, output_norm"
    assert [tuple(row.values()) for row in ask(f"SELECT {columns} FROM head_importance")] == [
        (0, "self", 90, 0.5, 0.25, None),
        (1, "self", 500, 0.25, 0.25, None),
        (0, "cross", None, None, None, None),
    ]


def test_the_launch_that_took_over_counts(store, effect, attention, ask):
    for attempt, step in ((0, 1), (1, 100)):
        planted.plant(store, "steps", [{"step": step}], attempt=attempt)
    effect(200, 0, 9.0)
    effect(100, 0, 1.0, attempt=1)
    attention(120, 0, 0.75)  # of the launch that failed, beyond where the next one began
    attention(40, 0, 0.25)
    attention(110, 0, 0.5, attempt=1)
    (row,) = ask("FROM head_importance")
    assert (row["step"], row["effect"], row["attention_step"]) == (100, 1.0, 110)
    assert row["induction_score"] == approx(0.5)
