"""Numbers of a report: what goes in comes out, as closely as is promised, once, and inert."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from made_up_report import made_up

from lm_telemetry.exporters.report.encode import Pool, document, family, reach
from lm_telemetry.exporters.report.model import Axis, Line, Lines


def decoded(entry):
    kind, text = entry
    return np.frombuffer(base64.b64decode(text), dtype=f"<{kind}")


@given(arrays.arrays(np.float64, st.integers(0, 40), elements=st.floats(width=64)))
def test_values_keep_what_is_seen_of_them(values):
    pool = Pool()
    pool.add(values, exact=False)
    out = decoded(pool.arrays[0]).astype(np.float64)
    finite = np.isfinite(values)
    assert (np.isnan(out) == np.isnan(values)).all()
    assert (out[~finite & ~np.isnan(values)] == values[~finite & ~np.isnan(values)]).all()
    np.testing.assert_allclose(out[finite], values[finite], rtol=6e-8, atol=0)


@given(arrays.arrays(np.int64, st.integers(1, 40), elements=st.integers(-(2**53), 2**53)))
def test_places_come_out_exactly(places):
    pool = Pool()
    pool.add(places, exact=True)
    assert (decoded(pool.arrays[0]).astype(np.int64) == places).all()


@pytest.mark.parametrize(
    ("values", "exact", "kind"),
    [
        ([1.0, 2.0, 2.0**24], True, "f4"),
        ([2.0**24 + 1], True, "f8"),
        ([0.1], True, "f8"),
        ([0.1], False, "f4"),
        ([1e300], False, "f8"),
        ([1e-50], False, "f8"),
        ([1e-40], False, "f8"),  # float32 has it with few digits
        ([np.inf, np.nan, -0.0], False, "f4"),
        ([], True, "f4"),
    ],
)
def test_float64_only_where_it_is_needed(values, exact, kind):
    pool = Pool()
    pool.add(np.array(values), exact=exact)
    assert pool.arrays[0][0] == kind


def test_equal_arrays_are_kept_once():
    pool = Pool()
    steps = np.arange(10)
    assert pool.add(steps, exact=True) == pool.add(steps.astype(np.float32), exact=True) == 0
    assert pool.add(steps + 1, exact=True) == 1
    report = made_up(steps=300, points=100, columns=10, layers=2, heads=2)
    kept = len(json.loads(document(report))["arrays"])
    assert kept < sum(2 * len(f.body.lines) for f in report.figures if isinstance(f.body, Lines)) + 30


def test_a_matrix_is_kept_row_by_row():
    pool = Pool()
    values = np.arange(6.0).reshape(2, 3)
    pool.add(np.asfortranarray(values), exact=False)
    assert decoded(pool.arrays[0]).tolist() == values.ravel().tolist()


def test_the_document_is_the_report():
    report = made_up(steps=100, points=50, columns=10, layers=2, heads=3)
    out = json.loads(document(report))
    assert out["runs"] == [run.run_id for run in report.runs]
    assert [figure["kind"] for figure in out["figures"]] == [type(f.body).__name__.lower() for f in report.figures]
    loss, cost = out["figures"][0], out["figures"][-1]
    smooth = report.figures[0].body.lines[1]
    line = loss["body"]["lines"][1]
    assert (line["name"], line["role"], line["low"]) == (smooth.name, "value", None)
    assert (decoded(out["arrays"][line["y"]["array"]]) == smooth.y.astype(np.float32)).all()
    assert loss["reach"] == [1.0, 100.0]
    assert (loss["body"]["bands"][1]["label"], "reach" in cost) == ("progressive sharpening", False)


def test_what_json_has_no_word_for_is_null():
    report = made_up(steps=10, points=5, columns=5, layers=1, heads=1)
    cost = replace(report.figures[-1], body=replace(report.figures[-1].body, limit=float("nan")))
    out = json.loads(document(replace(report, figures=(cost,))))
    assert out["figures"][0]["body"]["limit"] is None


def test_the_reach_of_a_log_axis_leaves_out_what_is_not_positive():
    line = Line(name="a", run=0, x=np.array([-1.0, 0.0, 2.0, np.nan, 8.0, np.inf]), y=np.zeros(6))
    linear = Lines(x=Axis(label="x"), y=Axis(label="y"), lines=(line,))
    assert reach(linear) == [-1.0, 8.0]
    assert reach(replace(linear, x=Axis(label="x", scale="log"))) == [2.0, 8.0]
    assert reach(replace(linear, lines=())) is None


def test_figures_of_several_runs_are_one_family():
    assert [family(name) for name in ("rms", "rms-1", "rms-12", "rank-4a")] == ["rms", "rms", "rms", "rank-4a"]
