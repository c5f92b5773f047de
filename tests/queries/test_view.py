"""Every view says what it answers, and its header is true."""

import duckdb
import pytest

from lm_telemetry.catalogue import TABLES, columns
from lm_telemetry.errors import QueryError
from lm_telemetry.queries import connect, list_views
from lm_telemetry.queries.view import parse_view

VIEWS = {view.name: view for view in list_views()}


def test_the_library():
    assert {"training", "edge_of_stability", "attention_health", "layer_health", "overview"} <= set(VIEWS)
    assert not set(VIEWS) & set(TABLES)


@pytest.mark.parametrize("name", VIEWS)
def test_a_header_names_the_columns_that_are_there_in_order(name, store):
    con = connect(store.path)
    assert [c.name for c in VIEWS[name].columns] == con.sql(f"FROM {name}").columns
    assert con.execute(f"SELECT count(*) FROM {name}").fetchone() == (0,)


@pytest.mark.parametrize("name", VIEWS)
def test_a_column_that_the_catalogue_has_too_has_its_unit(name):
    units = {}
    for table in ("steps", "layers", "heads", "curvature", "runs"):
        units |= {m.name: m.unit for m in columns(table) if m.type != "timestamp"}
    for column in VIEWS[name].columns:
        if column.name in units:
            assert column.unit == units[column.name], column.name


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_one_select_and_its_question_a_question(name):
    view = VIEWS[name]
    assert view.question.endswith("?")
    assert view.sql.split()[0] in {"SELECT", "WITH"}
    assert ";" not in view.sql
    (statement,) = duckdb.extract_statements(view.sql)
    assert statement.type == duckdb.StatementType.SELECT


def test_a_header_is_parsed_with_its_continuations():
    view = parse_view(
        "example",
        "-- question: Is this\n--   one question?\n"
        "-- columns:\n--   a [s]: first,\n--     and more\n--   b []: second\n"
        "-- source: here and\n--   there\nSELECT 1 AS a, 2 AS b;\n",
    )
    assert view.question == "Is this one question?"
    assert [(c.name, c.unit, c.meaning) for c in view.columns] == [("a", "s", "first, and more"), ("b", "", "second")]
    assert view.source == "here and there"
    assert view.sql == "SELECT 1 AS a, 2 AS b"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "SELECT 1",
        "-- question: a?\n-- columns:\n--   a []: b\nSELECT 1",
        "-- question: a?\n-- source: b\nSELECT 1",
        "-- columns:\n--   a []: b\n-- source: c\nSELECT 1",
        "-- question: a?\n-- columns:\n--   a: no unit\n-- source: c\nSELECT 1",
        "-- question: a?\n-- columns:\n--   a []: b\n-- source: c\n",
    ],
)
def test_a_file_without_a_proper_header_is_refused(text):
    with pytest.raises(QueryError, match=r"views/example\.sql must begin with"):
        parse_view("example", text)
