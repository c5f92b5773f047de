"""Columns become Arrow tables without losing or inventing anything; what does not fit is named."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_telemetry.catalogue import TABLES
from lm_telemetry.columns import Captured, ColumnError, split, to_rows, to_table
from lm_telemetry.schema import schema
from lm_telemetry.store import Store

STAMP = {"attempt": 1, "step": 7, "time_us": 1_700_000_000_000_000}

VALUES = {
    pa.bool_(): st.booleans(),
    pa.int32(): st.integers(-(2**31), 2**31 - 1),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float32(): st.floats(width=32),
    pa.float64(): st.floats(),
    pa.string(): st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    pa.list_(pa.int32()): st.lists(st.integers(-(2**31), 2**31 - 1), max_size=4),
    pa.list_(pa.float32()): st.lists(st.floats(width=32), max_size=4),
}


@st.composite
def batches(draw):
    """A table's name and columns for it, some left out, with NULL, NaN and infinities in them."""
    table = draw(st.sampled_from(sorted(TABLES)))
    rows = draw(st.integers(0, 5))
    fields = draw(st.lists(st.sampled_from(list(schema(table))[3:]), unique_by=lambda f: f.name, min_size=1))
    columns = {f.name: draw(st.lists(st.none() | VALUES[f.type], min_size=rows, max_size=rows)) for f in fields}
    return table, columns


def same(given, found):
    """Equality in which NaN equals NaN and 0.0 is not -0.0."""
    if isinstance(given, list):
        return isinstance(found, list) and len(given) == len(found) and all(map(same, given, found))
    if isinstance(given, float):
        return isinstance(found, float) and (
            math.isnan(found)
            if math.isnan(given)
            else (given, math.copysign(1, given)) == (found, math.copysign(1, found))
        )
    return given == found


@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_what_goes_in_comes_out_of_the_file(batch, tmp_path_factory):
    table, columns = batch
    rows = to_table(table, columns, **STAMP)
    count = len(next(iter(columns.values())))
    assert rows.num_rows == count
    if not count:
        return
    store = Store(tmp_path_factory.mktemp("store"))
    part = store.write_part(rows, table=table, run_id="r", rank=0, attempt=1, seq=0)
    found = pq.read_table(store.path / part.file, partitioning=None)
    assert found.schema.equals(schema(table))
    for field in schema(table):
        got = found[field.name].to_pylist()
        if field.name in columns:
            assert all(map(same, columns[field.name], got)), field.name
        elif field.name not in {"attempt", "step", "time"}:
            assert got == [None] * count
    assert found["step"].to_pylist() == [7] * count
    assert found["attempt"].to_pylist() == [1] * count
    assert found["time"].to_pylist()[0].timestamp() == 1_700_000_000


AS_ARRAYS = {
    pa.int32(): st.sampled_from([np.int32, np.int64, np.float64]),
    pa.float32(): st.sampled_from([np.float32, np.float64]),
}


@st.composite
def flushes(draw):
    """A table's name, and columns of several captures: others in each, in lists, arrays and masked arrays."""
    table = draw(st.sampled_from(["layers", "steps", "sketches"]))
    kinds = {f.name: f.type for f in list(schema(table))[3:]}
    captures = []
    for _ in range(draw(st.integers(1, 4))):
        rows, columns = draw(st.integers(0, 3)), {}
        for name in draw(st.lists(st.sampled_from(sorted(kinds)), unique=True, min_size=1, max_size=4)):
            kind = kinds[name]
            if kind in AS_ARRAYS and draw(st.booleans()):
                dtype = draw(AS_ARRAYS[kind])
                columns[name] = np.array(draw(st.lists(VALUES[kind], min_size=rows, max_size=rows)), dtype)
                if draw(st.booleans()):
                    columns[name] = np.ma.array(
                        columns[name], mask=draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
                    )
            else:
                columns[name] = draw(st.lists(st.none() | VALUES[kind], min_size=rows, max_size=rows))
        captures.append(columns)
    return table, captures


@settings(max_examples=300, deadline=None)
@given(flush=flushes())
def test_the_captures_of_a_flush_are_the_rows_they_are_one_by_one(flush):
    table, captures = flush
    stamps = [{"step": step, "time_us": 10 * step} for step in range(len(captures))]
    checked = [Captured.check(table, columns, **at) for columns, at in zip(captures, stamps, strict=True)]
    alone = [to_table(table, columns, attempt=2, **at) for columns, at in zip(captures, stamps, strict=True)]
    together = to_rows(table, checked, attempt=2).to_pylist()
    assert len(together) == sum(captured.rows for captured in checked)
    for got, want in zip(together, pa.concat_tables(alone).to_pylist(), strict=True):
        assert all(same(want[name], got[name]) for name in want), (got, want)


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 1, 2), (1, 2, 0), (2, 1, 1), (0, 3, 1)])
def test_a_list_column_that_a_capture_lacks_is_null_there(order):
    layer = {"layer": [0, 1]}
    captures = [
        layer | {"gram": np.array([[1, 2], [3, 4]], np.float32)},
        layer,
        layer | {"gram": [[5.0], None]},
        layer | {"gram": np.ones((2, 3), np.float32)},
    ]
    want = [[[1.0, 2.0], [3.0, 4.0]], [None, None], [[5.0], None], [[1.0] * 3, [1.0] * 3]]
    checked = [Captured.check("sketches", captures[i], step=1, time_us=i) for i in order]
    got = to_rows("sketches", checked, attempt=0)["gram"].to_pylist()
    assert got == [entry for i in order for entry in want[i]]


def test_masked_entries_of_a_matrix_are_null():
    gram = np.ma.array(np.ones((2, 2), np.float32), mask=[[True, False], [False, False]])
    checked = [Captured.check("sketches", {"gram": gram}, step=step, time_us=0) for step in (1, 2)]
    for captures in (checked[:1], checked):
        got = to_rows("sketches", captures, attempt=0)["gram"].to_pylist()
        assert got == [[None, 1.0], [1.0, 1.0]] * len(captures)


def test_rows_are_split_into_the_captures_they_came_from():
    captures = [
        Captured.check("layers", {"rms": list(range(count))}, step=step, time_us=time)
        for count, step, time in [(2, 1, 10), (1, 1, 11), (3, 2, 11)]
    ]
    rows = to_rows("layers", captures, attempt=0)
    assert [piece["rms"].to_pylist() for piece in split(rows)] == [[0, 1], [0], [0, 1, 2]]
    assert [piece["step"].to_pylist() for piece in split(rows.slice(1, 3))] == [[1], [1], [2]]
    (whole,) = split(rows.slice(3))
    assert whole.equals(rows.slice(3))


def test_keys_that_repeat_are_told_from_keys_that_do_not():
    keys = [["a", "b"], ["a", "b"], ["a", None], ["b", "a"]]
    checked = [Captured.check("layers", {"site": site}, step=1, time_us=0) for site in keys]
    for captures in (checked[:2], checked):
        want = [entry for captured in captures for entry in captured.columns["site"]]
        assert to_rows("layers", captures, attempt=0)["site"].to_pylist() == want


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(width=32), st.booleans()), min_size=1))
def test_masked_entries_are_null_and_nan_is_not(entries):
    values, mask = (np.array(part) for part in zip(*entries, strict=True))
    array = np.ma.array(values.astype(np.float32), mask=mask.astype(bool))
    got = to_table("layers", {"rms": array}, **STAMP)["rms"].to_pylist()
    assert all(same(None if hidden else float(value), g) for (value, hidden), g in zip(entries, got, strict=True))


@pytest.mark.parametrize(
    "values",
    [
        np.array([1, 2], dtype=np.int8),
        np.array([1.0, 2.0]),
        np.array([1, 2], dtype=">i4"),
        np.array([9, 1, 9, 2])[1::2],
        np.array([1, 2], dtype=object),
        (1, 2.0),
        [np.int64(1), np.float32(2)],
        np.ma.array([1, 2]),
    ],
    ids=["int8", "float64", "big-endian", "strided", "object", "mixed", "scalars", "masked"],
)
def test_whole_numbers_fit_an_integer_column_whatever_holds_them(values):
    assert to_table("layers", {"layer": values}, **STAMP)["layer"].to_pylist() == [1, 2]


def test_what_lies_under_a_mask_does_not_matter():
    array = np.ma.array([1e300, 2.0], mask=[True, False])
    assert to_table("layers", {"layer": array}, **STAMP)["layer"].to_pylist() == [None, 2]
    assert to_table("layers", {"rms": [np.ma.masked, 2.0]}, **STAMP)["rms"].to_pylist() == [None, 2.0]


def test_a_matrix_fills_a_list_column():
    rows = to_table("sketches", {"gram": np.array([[1, 2], [3, 4]], np.float32)}, **STAMP)
    assert rows["gram"].to_pylist() == [[1.0, 2.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("layer", [1.5]),
        ("layer", np.array([1.5])),
        ("layer", [float("nan")]),
        ("layer", np.array([np.nan])),
        ("layer", [2**31]),
        ("layer", np.array([2**31])),
        ("layer", ["1"]),
        ("layer", np.array(["1"])),
        ("rms", np.array(["1"])),
        ("rms", ["1"]),
        ("rms", [[1.0]]),
        ("rms", np.ones((2, 2))),
        ("rms", np.float32(1)),
        ("rms", np.array(1.0)),
        ("rms", 1.0),
        ("site", [1]),
        ("site", "resid"),
        ("site", ["\ud800"]),
        ("kurtosiss", [3.0]),
        ("step", [3]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(column, values):
    with pytest.raises(ColumnError, match=f"layers.{column}") as caught:
        to_table("layers", {column: values}, **STAMP)
    assert (caught.value.table, caught.value.column) == ("layers", column)


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(ColumnError, match=r"layers.rms has 1 rows where layers.layer has 2") as caught:
        to_table("layers", {"layer": [0, 1], "rms": [1.0]}, **STAMP)
    assert caught.value.column == "rms"


def test_an_unknown_table_is_refused():
    with pytest.raises(ColumnError, match="no table 'layer'") as caught:
        to_table("layer", {"rms": [1.0]}, **STAMP)
    assert caught.value.column is None


def test_no_columns_are_no_rows():
    assert to_table("layers", {}, **STAMP).num_rows == 0
