"""The views of heads and of the keys they attend to, on planted rows whose answers are known."""

from __future__ import annotations

from functools import partial

import numpy as np
import planted
import pytest
from planted import by

approx = pytest.approx
NAN, INFINITY = float("nan"), float("inf")
VIEWS = (
    "entropy_collapse",
    "logit_growth",
    "attention_sinks",
    "induction_heads",
    "heavy_hitters",
    "head_redundancy",
)


@pytest.fixture
def plant(store):
    return partial(planted.plant, store)


@pytest.fixture
def ask(store):
    return partial(planted.ask, store)


def head(column, values, *, layer=0, index=0, kind="self", **columns):
    """Rows of a head with one column by step."""
    place = {"stack": "decoder", "layer": layer, "kind": kind, "head": index}
    return [{"step": step, column: value} | place | columns for step, value in values.items()]


def losses(*steps):
    """A loss that tells the step it is of."""
    return [{"step": step, "loss": step / 1000} for step in steps]


def fit(at, values):
    """Slope and its standard error, by numpy."""
    (slope, _), covariance = np.polyfit(at, values, 1, cov=True)
    return slope, covariance[0, 0] ** 0.5


def series(at, values):
    return dict(zip(np.asarray(at).tolist(), np.asarray(values).tolist(), strict=True))


@pytest.mark.parametrize("view", VIEWS)
def test_nothing_is_said_of_rows_without_numbers(view, plant, ask):
    odd = [NAN, INFINITY, None]
    names = ["normalized_entropy", "max_logit", "sink_mass", "induction_score", "top1_mass", "prev_token_mass"]
    rows = [
        {"step": i, "stack": "decoder", "layer": 0, "kind": "self", "head": h} | dict.fromkeys(names, v)
        for i, v in enumerate(odd)
        for h in (0, 1)
    ]
    plant("heads", rows)
    plant("key_mass", head("heavy_share", dict(enumerate(odd))))
    assert ask(f"FROM {view}") == []


@pytest.mark.parametrize("view", VIEWS[:5])
def test_odd_captures_among_others_change_nothing(view, plant, ask):
    """One of NaN, infinity or NULL in the same file; the runs differ in it alone."""
    names = {
        "normalized_entropy": 0.01,
        "max_logit": 60.0,
        "sink_mass": 0.4,
        "induction_score": 0.5,
        "heavy_share": 0.6,
    }
    for run_id, extra in {"plain": {}, "nan": {40: NAN}, "infinite": {40: INFINITY}, "null": {40: None}}.items():
        for name, scale in names.items():
            values = {10: 1.1 * scale, 20: 1.2 * scale, 30: 1.3 * scale} | extra
            plant("key_mass" if name == "heavy_share" else "heads", head(name, values), run_id=run_id)
        plant("steps", losses(10, 20, 30), run_id=run_id)
    rows = by(ask(f"FROM {view}"), "run_id")
    assert rows["plain"]["last_step"] == 30
    assert set(rows) == {"plain", "nan", "infinite", "null"}
    for run_id, row in rows.items():
        assert row | {"run_id": "plain"} == rows["plain"], run_id


@pytest.mark.parametrize("view", VIEWS)
def test_nan_is_passed_over_in_a_table_of_one_file(view, plant, ask):
    """Whose statistics, which leave NaN out, DuckDB might take for those of all rows."""
    columns = ("normalized_entropy", "max_logit", "sink_mass", "induction_score", "top1_mass", "prev_token_mass")
    place = {"stack": "decoder", "layer": 0, "kind": "self"}
    captures = {10: 0.04, 20: 0.03, 30: NAN}
    for table, names in (("heads", (*columns, "local_mass")), ("key_mass", ("heavy_share",))):
        plant(
            table,
            [{"step": s, "head": h} | place | dict.fromkeys(names, v) for s, v in captures.items() for h in (0, 1)],
        )
    assert {row["captures"] for row in ask(f"FROM {view}")} == {2}


@pytest.mark.parametrize(
    ("view", "column", "others"),
    [
        ("entropy_collapse", "normalized_entropy", ("first_normalized_entropy", "highest_normalized_entropy")),
        ("logit_growth", "max_logit", ("first_max_logit", "highest_max_logit")),
        ("attention_sinks", "sink_mass", ("first_sink_mass", "highest_sink_mass")),
        ("induction_heads", "induction_score", ("first_score", "highest_score")),
        ("heavy_hitters", "heavy_share", ("first_heavy_share",)),
    ],
)
def test_first_last_and_highest_of_a_series(view, column, others, plant, ask):
    plant("key_mass" if view == "heavy_hitters" else "heads", head(column, {30: 0.25, 10: 0.625, 40: 0.375, 20: 0.875}))
    (row,) = ask(f"FROM {view}")
    assert (row["captures"], row["first_step"], row["last_step"]) == (4, 10, 40)
    assert row[column] == 0.375
    assert [row[name] for name in others] == [0.625, 0.875][: len(others)]


@pytest.mark.parametrize("view", VIEWS[:5])
def test_runs_ranks_layers_and_kinds_stay_apart(view, plant, ask):
    columns = dict.fromkeys(["normalized_entropy", "max_logit", "sink_mass", "induction_score"], 0.04)
    for run_id, rank, layer, kind in (
        ("a", 0, 0, "self"),
        ("a", 1, 0, "self"),
        ("b", 0, 1, "self"),
        ("b", 0, 1, "cross"),
    ):
        for table, measured in (("heads", columns), ("key_mass", {"heavy_share": 0.04})):
            rows = head("step", {1: 1, 2: 2}, layer=layer, kind=kind, **measured)
            plant(table, rows, run_id=run_id, rank=rank)
    found = ask(f"FROM {view} ORDER BY run_id, rank, kind")
    assert [(r["run_id"], r["rank"], r["layer"], r["kind"], r["captures"]) for r in found] == [
        ("a", 0, 0, "self", 2),
        ("a", 1, 0, "self", 2),
        ("b", 0, 1, "cross", 2),
        ("b", 0, 1, "self", 2),
    ]


# -- entropy collapse ----------------------------------------------------------------------------------------------


def test_a_collapse_has_its_slope_and_its_step(plant, ask):
    at = np.arange(10, 410, 10)
    values = np.clip(0.9 - 0.0025 * at + np.random.default_rng(0).normal(0, 0.005, len(at)), 0.001, 1).astype("float32")
    plant("heads", head("normalized_entropy", series(at, values), max_logit=7.0))
    plant("steps", losses(*at.tolist()))
    (row,) = ask("FROM entropy_collapse")
    slope, stderr = fit(at, values)
    assert (row["slope"], row["slope_stderr"]) == (approx(slope), approx(stderr))
    below = at[values < 0.05]
    assert (row["collapse_step"], row["previous_step"], row["captures_below"]) == (below[0], below[0] - 10, len(below))
    assert (row["collapse_loss"], row["collapse_max_logit"], row["is_collapsed"]) == (below[0] / 1000, 7.0, True)
    assert (row["captures"], row["first_step"], row["last_step"]) == (40, 10, 400)
    assert row["remaining"] == approx(values[-1] / values.max())


def test_white_noise_and_a_slow_decline_are_no_collapse(plant, ask):
    noise = 0.5 + np.random.default_rng(1).normal(0, 0.03, 400)
    plant("heads", head("normalized_entropy", series(range(400), noise)))
    plant("heads", head("normalized_entropy", {1: 0.9, 2: 0.7, 3: 0.46}, index=1))
    assert ask("FROM entropy_collapse") == []


def test_heads_that_fell_or_recovered_or_never_had_entropy(plant, ask):
    plant("heads", head("normalized_entropy", {1: 0.3, 2: 0.9, 3: 0.44}))
    plant("heads", head("normalized_entropy", {1: 0.5, 2: 0.04, 3: 0.5}, index=1))
    plant("heads", head("normalized_entropy", {5: 0.01}, index=2))
    plant("heads", head("normalized_entropy", {1: 0.5, 5: 0.0}, index=3))
    found = by(ask("FROM entropy_collapse"), "head")
    names = ("collapse_step", "previous_step", "captures_below", "is_collapsed", "slope_stderr")
    assert {h: tuple(row[n] for n in names) for h, row in found.items() if h} == {
        1: (2, 1, 1, False, approx(0.46 / 3**0.5)),  # residuals 1, -2, 1 times .46 / 3
        2: (5, None, 1, True, None),
        3: (5, 1, 1, True, None),
    }
    assert (found[0]["collapse_step"], found[0]["highest_normalized_entropy"]) == (None, approx(0.9))
    assert (found[2]["slope"], found[3]["slope"]) == (None, -0.125)


# -- growth of logits ----------------------------------------------------------------------------------------------


def test_logits_that_double_are_foretold(plant, ask):
    at = np.arange(100, 1100, 100)
    values = 2.0 * 2 ** (at / 300)  # 20.2 at step 1000
    plant("heads", head("max_logit", series(at, values)))
    plant("heads", head("max_logit", series(at, values * 10), index=1))
    plant("steps", losses(*at.tolist()))
    growing, passed = ask("FROM logit_growth")
    assert (growing["growth_rate"], growing["doubling_time"]) == (approx(np.log(2) / 300), approx(300))
    assert growing["growth_rate_stderr"] == approx(0, abs=1e-8)
    assert (growing["bound_step"], growing["bound_loss"]) == (None, None)
    assert growing["steps_to_bound"] == approx(300 * np.log2(50 / values[-1]), rel=1e-5)
    first = at[values * 10 > 50][0]
    assert (passed["bound_step"], passed["previous_step"], passed["bound_loss"]) == (first, first - 100, first / 1000)
    assert (passed["steps_to_bound"], passed["highest_max_logit"]) == (None, approx(values[-1] * 10))


def test_the_rate_has_its_error_and_noise_no_doubling_time(plant, ask):
    at = np.arange(10, 410, 10)
    noise = np.random.default_rng(0).normal(0, 0.1, len(at))
    plant("heads", head("max_logit", series(at, np.exp(1 + 0.005 * at + noise))))
    plant("heads", head("max_logit", series(at, np.exp(1 + noise[::-1] - fit(at, noise[::-1])[0] * at)), index=1))
    plant("heads", head("max_logit", series(at, np.exp(3 - 0.005 * at)), index=2))
    growing, still, falling = ask("FROM logit_growth")
    slope, stderr = fit(at, 1 + 0.005 * at + noise)
    assert (growing["growth_rate"], growing["growth_rate_stderr"]) == (approx(slope), approx(stderr, rel=1e-5))
    assert growing["doubling_time"] == approx(np.log(2) / slope)
    assert [(r["doubling_time"], r["steps_to_bound"]) for r in (still, falling)] == [(None, None)] * 2
    assert falling["growth_rate"] == approx(-0.005)


def test_logits_at_or_below_zero_are_shown_but_not_fitted(plant, ask):
    plant("heads", head("max_logit", {1: -2.0, 2: 0.0, 3: 1.0, 5: 4.0}))
    plant("heads", head("max_logit", {1: -2.0}, index=1))
    first, other = ask("FROM logit_growth")
    assert (first["captures"], first["fitted"], first["first_max_logit"]) == (4, 2, -2.0)
    assert (first["growth_rate"], first["growth_rate_stderr"]) == (approx(np.log(2)), None)
    assert (other["fitted"], other["growth_rate"], other["steps_to_bound"]) == (0, None, None)


def test_rows_without_a_finite_logit_are_told_with_their_step(plant, ask):
    plant("heads", head("max_logit", {1: 3.0, 2: 5.0}, nonfinite=0) + head("max_logit", {3: NAN, 4: None}, nonfinite=2))
    plant("heads", head("max_logit", {4: None}, index=1, nonfinite=1))
    one, all_lost = ask("FROM logit_growth")
    assert (one["captures"], one["last_step"], one["max_logit"], one["nonfinite_step"]) == (2, 2, 5.0, 3)
    assert (all_lost["captures"], all_lost["max_logit"], all_lost["nonfinite_step"]) == (0, None, 4)


# -- sinks ---------------------------------------------------------------------------------------------------------


def test_sinks_have_their_step_and_their_rate(plant, ask):
    rows = head("sink_mass", {1: 0.1, 50: 0.29, 100: 0.31, 150: 0.8})
    plant("heads", [row | {"output_norm": row["step"] / 150} for row in rows])
    plant("heads", head("sink_mass", {1: 0.9, 150: 0.2}, index=1, output_norm=3.0))
    plant("heads", head("sink_mass", {150: 0.25}, index=2, output_norm=NAN))
    plant("heads", head("sink_mass", {150: 0.4}, layer=1, output_norm=0.0))
    plant("heads", head("sink_mass", {150: 0.1}, kind="cross"))
    plant("steps", losses(100))
    rows = by(ask("FROM attention_sinks"), "layer", "kind", "head")
    formed = rows[0, "self", 0]
    assert (formed["formation_step"], formed["previous_step"], formed["formation_loss"]) == (100, 50, 0.1)
    assert (formed["first_sink_mass"], formed["sink_mass"]) == (approx(0.1), approx(0.8))
    assert (formed["layer_sink_rate"], formed["sink_rate"]) == (approx(1 / 3), 0.5)
    assert formed["output_ratio"] == 0.5  # 1 of a mean of 2
    dissolved = rows[0, "self", 1]
    assert (dissolved["formation_step"], dissolved["previous_step"], dissolved["is_sink"]) == (1, None, False)
    assert dissolved["highest_sink_mass"] == approx(0.9)
    assert {key: row["is_sink"] for key, row in rows.items()} == {
        (0, "cross", 0): False,
        (0, "self", 0): True,
        (0, "self", 1): False,
        (0, "self", 2): False,
        (1, "self", 0): True,
    }
    assert (rows[0, "cross", 0]["sink_rate"], rows[1, "self", 0]["output_ratio"]) == (0, None)


# -- induction -----------------------------------------------------------------------------------------------------


def test_an_induction_head_forms_where_its_score_rises(plant, ask):
    at = np.arange(0, 500, 25)
    score = 0.02 + 0.8 / (1 + np.exp(-(at - 210) / 20))
    rows = head("induction_score", series(at, score), layer=1)
    plant("heads", [row | {"n_induction": row["step"]} for row in rows])
    plant("heads", head("induction_score", series(at, np.full(len(at), 0.02)), index=1))
    plant("heads", head("induction_score", {0: 0.0, 25: 0.0}, index=2))
    plant("steps", losses(*at.tolist()))
    formed, flat, nothing = ask("FROM induction_heads")
    first = at[score > score.max() / 2][0]
    assert first == 225
    assert (formed["place"], formed["layer"], formed["is_induction"], formed["n_induction"]) == (1, 1, True, 475)
    assert (formed["formation_step"], formed["previous_step"]) == (225, 200)
    assert (formed["formation_loss"], formed["last_loss"]) == (0.225, 0.475)
    assert (flat["place"], flat["formation_step"], flat["previous_step"], flat["is_induction"]) == (2, 0, None, False)
    assert (nothing["formation_step"], nothing["highest_score"]) == (None, 0)


def test_a_head_that_lost_its_induction_is_none(plant, ask):
    plant("heads", head("induction_score", {1: 0.1, 2: 0.9, 3: 0.29}) + head("induction_score", {1: 0.31}, index=1))
    kept, lost = ask("FROM induction_heads")
    assert (lost["formation_step"], lost["previous_step"], lost["highest_score"]) == (2, 1, approx(0.9))
    assert [(r["head"], r["is_induction"]) for r in (kept, lost)] == [(1, True), (0, False)]


# -- heavy hitters -------------------------------------------------------------------------------------------------


def test_even_causal_attention_is_as_heavy_as_the_header_says():
    n = 20000
    received = np.cumsum(1 / np.arange(n, 0, -1))  # by the last key, the last but one, ...: 1/n, 1/n + 1/(n-1), ...
    assert received[-n // 10 :].sum() / received.sum() == approx(0.1 * (1 + np.log(10)), rel=1e-3)
    assert (2 * np.arange(1, n + 1) - n - 1) @ received / (n * received.sum()) == approx(0.5, rel=1e-3)


def test_heavy_hitters_beyond_the_sink(plant, ask):
    at = np.arange(100, 600, 100)
    shares = np.array([0.3, 0.4, 0.45, 0.6, 0.75], dtype="float32")
    rows = head("heavy_share", series(at, shares), mean_mass=0.5)
    plant("key_mass", [r | {"gini": r["step"] / 1000, "max_mass": r["step"] / 50, "n_keys": r["step"]} for r in rows])
    plant("key_mass", head("heavy_share", {500: 0.2}, index=1, mean_mass=0.0))
    plant("heads", head("sink_mass", {400: 0.9, 500: 0.25}))
    heavy, even = ask("FROM heavy_hitters")
    slope, stderr = fit(at, shares)
    assert (heavy["heavy_slope"], heavy["heavy_slope_stderr"]) == (approx(slope), approx(stderr))
    assert (heavy["heavy_step"], heavy["previous_step"], heavy["is_heavy"]) == (400, 300, True)
    assert (heavy["first_heavy_share"], heavy["max_ratio"], heavy["n_keys"]) == (approx(0.3), 20, 500)
    assert heavy["gini"] == 0.5
    assert (heavy["sink_mass"], heavy["beyond_sink"]) == (0.25, 0.5)
    assert (even["is_heavy"], even["heavy_step"], even["sink_mass"], even["beyond_sink"]) == (False, None, None, None)
    assert (even["max_ratio"], even["heavy_slope"]) == (None, None)
