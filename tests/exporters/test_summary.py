"""Summaries of groups against numpy and DuckDB, group by group."""

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_telemetry.exporters.summary import Groups

STATS = ("mean", "p90", "max", "min", "norm")
ROWS = st.lists(
    st.tuples(
        st.sampled_from(["decoder", "encoder", None]),
        st.integers(0, 3),
        st.one_of(st.none(), st.floats(-1e6, 1e6, width=32)),
    ),
    min_size=1,
    max_size=60,
)


def table(found):
    stack, layer, value = zip(*found, strict=True)
    return pa.table({"stack": stack, "layer": layer, "value": pa.array(value, pa.float32())})


@given(ROWS)
def test_like_numpy_on_each_group(found):
    rows = table(found)
    summaries = Groups(rows, ("stack", "layer")).summarise(rows["value"], STATS)
    groups = {}
    for stack, layer, value in found:
        if value is not None:
            groups.setdefault((stack, layer), []).append(np.float64(np.float32(value)))
    expected = {
        (key, stat): of(values)
        for key, values in groups.items()
        for stat, of in {
            "mean": np.mean,
            "p90": lambda v: np.percentile(v, 90),
            "max": np.max,
            "min": np.min,
            "norm": np.linalg.norm,
        }.items()
    }
    assert summaries == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_the_percentile_is_that_of_sql():
    rng = np.random.default_rng(0)
    rows = pa.table({"layer": np.repeat(np.arange(4), [1, 2, 12, 32]), "value": rng.standard_normal(47)})
    summaries = Groups(rows, ("layer",)).summarise(rows["value"], ("p90",))
    with duckdb.connect() as con:
        con.register("heads", rows)
        expected = dict(con.execute("SELECT layer, quantile_cont(value, 0.9) FROM heads GROUP BY layer").fetchall())
    assert {key[0]: value for (key, _), value in summaries.items()} == pytest.approx(expected, rel=1e-12)


def test_nan_shows_and_infinities_do_no_harm():
    inf, nan = float("inf"), float("nan")
    rows = pa.table({"layer": [0, 0, 1, 1, 2, 2], "value": [1.0, nan, inf, -inf, inf, inf]})
    found = Groups(rows, ("layer",)).summarise(rows["value"], STATS)
    assert np.isnan([found[(0,), "mean"], found[(0,), "max"], found[(1,), "mean"]]).all()
    assert (found[(0,), "min"], found[(1,), "max"], found[(1,), "min"], found[(2,), "p90"]) == (1.0, inf, -inf, inf)


def test_whole_columns_of_nothing_give_nothing():
    rows = pa.table({"layer": [0, 1], "value": pa.array([None, None], pa.float32())})
    assert Groups(rows, ("layer",)).summarise(rows["value"], STATS) == {}
