"""`lmt describe`: what columns are, and which are filled."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm_telemetry.catalogue import TABLES, columns
from lm_telemetry.cli import describe
from lm_telemetry.queries import list_views


def described(lmt, name):
    code, out, err = lmt("describe", name, "--format", "json")
    assert (code, err) == (0, "")
    return {row["column"]: row for row in json.loads(out)}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_is_described_by_the_catalogue(lmt, table):
    found = described(lmt, table)
    assert list(found) == ["run_id", "rank", *(m.name for m in columns(table))]
    for m in columns(table):
        row = found[m.name]
        assert (row["unit"], row["meaning"], row["source"] or "") == (m.unit, m.meaning, m.source)


@pytest.mark.parametrize("view", [view.name for view in list_views()])
def test_a_view_is_described_by_its_header(lmt, view):
    (known,) = (v for v in list_views() if v.name == view)
    found = described(lmt, view)
    assert {name: (row["unit"], row["meaning"]) for name, row in found.items()} == {
        c.name: (c.unit, c.meaning) for c in known.columns
    }


def test_values_are_counted(lmt):
    found = described(lmt, "steps")
    assert (found["loss"]["filled"], found["loss"]["rows"], found["loss"]["type"]) == (2, 3, "DOUBLE")
    assert (found["grad_norm"]["filled"], found["run_id"]["filled"]) == (0, 3)
    _, out, _ = lmt("describe", "STEPS")
    title, _, head, *lines = out.splitlines()
    assert (title, head.split()) == (
        "steps: one row per optimizer step",
        ["column", "type", "unit", "filled", "meaning"],
    )
    where = slice(head.index("filled"), head.index("meaning"))
    shares = {line.split()[0]: line[where].strip() for line in lines}
    assert (shares["loss"], shares["grad_norm"], shares["tokens"]) == ("66.7 %", "-", "all")


@pytest.mark.parametrize("width", [10, 60, 80, 200])
def test_meanings_are_whole_however_narrow_the_terminal(lmt, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    _, out, _ = lmt("describe", "heads")
    head, *lines = out.splitlines()[2:]
    begin = head.index("meaning")
    assert max(map(len, lines)) <= max(width, begin + describe.LEAST_MEANING)
    assert {line[:begin].split()[0] for line in lines if line[:begin].strip()} == {*described(lmt, "heads")}
    said = " ".join(line[begin:] for line in lines)
    for m in columns("heads"):
        assert (f"{m.meaning} ({m.source})" if m.source else m.meaning) in said


def test_a_share_is_never_rounded_to_all_or_nothing():
    assert [describe._share(n, 10_000) for n in (0, 1, 9_999, 10_000)] == ["-", "0.1 %", "99.9 %", "all"]
    assert [describe._share(None, None), describe._share(0, 0)] == ["?", "-"]


def test_counting_that_takes_too_long_is_left_out(lmt, monkeypatch):
    monkeypatch.setattr(describe, "COUNT_SECONDS", 0.2)
    endless = "CREATE OR REPLACE VIEW slow AS SELECT a.range FROM range(1000000000) AS a, range(1000000000) AS b"
    rows = describe._rows

    def of_an_endless_view(connection, relation, bare):
        connection.execute(endless + " WHERE a.range * b.range % 7 = 9")
        return rows(connection, "slow", bare)

    monkeypatch.setattr(describe, "_rows", of_an_endless_view)
    code, out, err = lmt("describe", "steps", "--format", "json")
    assert (code, err) == (0, "")
    assert [(row["column"], row["filled"]) for row in json.loads(out)] == [("range", None)]


def test_a_column_of_a_later_version_is_shown(lmt, store):
    rows = pa.table({"attempt": [0], "step": [1], "novel": [1.5]})
    target = store.partition("steps", "later", 0) / "part-0-0.parquet"
    target.parent.mkdir(parents=True)
    pq.write_table(rows, target)
    found = described(lmt, "steps")["novel"]
    assert (found["filled"], found["type"], found["meaning"]) == (
        1,
        "DOUBLE",
        "found in the files, and not in the catalogue",
    )


def test_overtaken_rows_are_in_raw(lmt):
    assert described(lmt, "raw.steps")["loss"]["rows"] == 3


@pytest.mark.parametrize(
    ("name", "near"),
    [("stepps", "steps"), ("Trainign", "training"), ("raw.training", "training"), ("qqq", "`lmt views`")],
)
def test_an_unknown_name_is_told_with_what_is_near(lmt, name, near):
    code, out, err = lmt("describe", name)
    assert (code, out) == (2, "")
    assert near in err
