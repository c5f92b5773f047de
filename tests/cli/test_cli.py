"""The command line from inside: formats, refusals, exit codes."""

import csv
import io
import json
import sys

import duckdb
import pyarrow.parquet as pq
import pytest

from lm_telemetry.cli import main
from lm_telemetry.queries import list_views

QUERY = "SELECT step, loss, time, [1, 2] AS list, 'a,\"b\"' AS word FROM steps ORDER BY step"


def test_csv_is_read_back_by_python(lmt):
    code, out, _ = lmt("sql", QUERY, "--format", "csv")
    assert code == 0
    assert list(csv.reader(io.StringIO(out))) == [
        ["step", "loss", "time", "list", "word"],
        ["1", "2.0", "1970-01-01T00:00:01", "[1, 2]", 'a,"b"'],
        ["2", "", "1970-01-01T00:00:02", "[1, 2]", 'a,"b"'],
        ["3", "NaN", "1970-01-01T00:00:03", "[1, 2]", 'a,"b"'],
    ]


def test_json_tells_null_from_nan(lmt):
    code, out, _ = lmt("sql", QUERY, "--format", "json")
    assert code == 0
    rows = json.loads(out, parse_constant=pytest.fail)
    assert [row["loss"] for row in rows] == [2.0, None, "NaN"]
    assert rows[0] == {"step": 1, "loss": 2.0, "time": "1970-01-01T00:00:01", "list": [1, 2], "word": 'a,"b"'}


@pytest.mark.parametrize(
    ("value", "in_csv", "in_json"),
    [
        ("sum(step)", "6", 6),
        ("sum(step::HUGEINT) << 60", str(6 << 60), 6 << 60),
        ("1.50", "1.50", 1.5),
        ("{'d': 0.25}", '"{""d"": 0.25}"', {"d": 0.25}),
        (r"'\xff\x00'::BLOB", "ff00", "ff00"),
    ],
)
def test_numbers_are_numbers(lmt, value, in_csv, in_json):
    query = f"SELECT {value} AS v FROM steps" + ("" if "sum" in value else " LIMIT 1")
    assert lmt("sql", query, "--format", "csv") == (0, f"v\n{in_csv}\n", "")
    code, out, _ = lmt("sql", query, "--format", "json")
    assert (code, json.loads(out)) == (0, [{"v": in_json}])


@pytest.mark.parametrize("format_", ["csv", "json"])
def test_a_date_that_python_cannot_hold_is_told(lmt, format_):
    code, _, err = lmt("sql", "SELECT 'infinity'::TIMESTAMP AS t", "--format", format_)
    assert code == 2
    assert "CAST(... AS VARCHAR)" in err
    assert lmt("sql", "SELECT CAST('infinity'::TIMESTAMP AS VARCHAR) AS t", "--format", "csv")[1] == "t\ninfinity\n"


def test_an_answer_that_fails_at_once_has_no_head(lmt):
    code, out, err = lmt("sql", "SELECT CASE WHEN step > 0 THEN error('boom') END AS a FROM steps", "--format", "csv")
    assert (code, out) == (2, "")
    assert "boom" in err


@pytest.mark.parametrize(("format_", "empty"), [("json", "[]\n"), ("csv", "step\n")])
def test_no_rows_are_still_a_document(lmt, format_, empty):
    assert lmt("sql", "SELECT step FROM steps WHERE false", "--format", format_) == (0, empty, "")


def test_parquet_goes_to_a_file(lmt, tmp_path):
    target = tmp_path / "answer.parquet"
    assert lmt("sql", QUERY, "--format", "parquet", "-o", str(target)) == (0, "", "")
    table = pq.read_table(target)
    assert table["step"].to_pylist() == [1, 2, 3]
    assert table["loss"].null_count == 1


def test_parquet_is_not_shown_on_a_terminal(lmt, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    code, out, err = lmt("sql", QUERY, "--format", "parquet")
    assert (code, out) == (2, "")
    assert "-o FILE" in err


def test_the_box_is_as_wide_as_the_terminal(lmt, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    _, out, _ = lmt("sql", "FROM steps")
    assert max(map(len, out.splitlines())) <= 100
    monkeypatch.setenv("COLUMNS", "500")
    _, out, _ = lmt("sql", "FROM steps")
    assert "gradient_noise_scale" in out


def test_every_format_goes_to_a_file(lmt, tmp_path):
    for format_ in ("table", "csv", "json"):
        _, shown, _ = lmt("sql", QUERY, "--format", format_)
        target = tmp_path / format_
        assert lmt("sql", QUERY, "--format", format_, "-o", str(target)) == (0, "", "")
        assert target.read_text(encoding="utf-8") == shown


def test_a_file_that_cannot_be_written_is_named(lmt, tmp_path):
    code, _, err = lmt("sql", "SELECT 1", "-o", str(tmp_path / "no" / "where"))
    assert code == 1
    assert f"cannot write {tmp_path}/no/where" in err


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1 AS n",
        "FROM training",
        "WITH a AS (SELECT 1) FROM a",
        "DESCRIBE steps",
        "SHOW TABLES",
        "SUMMARIZE SELECT step FROM steps",
        "PIVOT steps ON step IN (1, 2) USING sum(loss)",
        pytest.param(
            "PIVOT steps ON step USING sum(loss)",
            marks=pytest.mark.skipif(duckdb.__version__ < "2", reason="before DuckDB 2 this makes a type first"),
        ),
        "EXPLAIN SELECT 1",
        "EXPLAIN ANALYZE FROM steps",
        "VALUES (1)",
        "-- a comment\nSELECT 1;",
    ],
)
def test_reading_statements_are_answered(lmt, query):
    code, out, err = lmt("sql", query)
    assert (code, err) == (0, "")
    assert out


@pytest.mark.parametrize(
    ("query", "complaint"),
    [
        ("SELEC 1", "syntax error"),
        ("FROM nowhere", "nowhere does not exist"),
        ("SELECT los FROM steps", "loss"),
        ("SELECT error('boom')", "boom"),
        ("", "got 0"),
        ("SELECT 1; SELECT 2", "got 2"),
        ("COPY (SELECT 1) TO '{store}/x.csv'", "COPY does more"),
        ("EXPLAIN ANALYZE COPY (SELECT 1) TO '{store}/x.csv'", "COPY does more"),
        ("EXPLAIN (ANALYZE) COPY (SELECT 1) TO '{store}/x.csv'", ""),
        ("EXPLAIN /* */ ANALYZE COPY (SELECT 1) TO '{store}/x.csv'", ""),
        ("PREPARE p AS COPY (SELECT 1) TO '{store}/x.csv'", "PREPARE does more"),
        ("ATTACH '{store}/x.db'", "ATTACH does more"),
        ("EXPORT DATABASE '{store}/x'", "EXPORT does more"),
        ("CREATE TABLE x AS SELECT 1", "CREATE does more"),
        ("SET threads = 1", "SET does more"),
        ("UPDATE EXTENSIONS", "does more"),  # a kind that the Python client has no name for
        ("FROM read_text('/etc/hostname')", "Permission"),
    ],
)
def test_other_statements_are_refused_without_a_traceback(lmt, store, query, complaint):
    before = sorted(store.path.rglob("*"))
    code, out, err = lmt("sql", query.format(store=store.path))
    assert (code, out) == (2, "")
    assert err.startswith("lmt: ")
    assert complaint in err
    assert "Traceback" not in err
    assert sorted(store.path.rglob("*")) == before


@pytest.mark.parametrize("words", [["sql", "-"], ["sql"]])
def test_a_query_may_come_from_standard_input(lmt, monkeypatch, words):
    monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT 42 AS answer"))
    assert lmt(*words, "--format", "csv") == (0, "answer\n42\n", "")


def test_a_plan_is_shown_as_a_plan(lmt):
    _, out, _ = lmt("sql", "EXPLAIN FROM training")
    assert "\\n" not in out
    assert len(out.splitlines()) > 5


def test_no_store_is_exit_code_1(lmt, tmp_path):
    code, out, err = lmt("runs", store=tmp_path / "nowhere")
    assert (code, out) == (1, "")
    assert str(tmp_path / "nowhere") in err


def test_the_environment_names_the_store(store, monkeypatch, capsys):
    monkeypatch.setenv("LM_TELEMETRY_STORE", str(store.path))
    assert main(["sql", "SELECT count(*) AS n FROM steps", "--format", "csv"]) == 0
    assert capsys.readouterr().out == "n\n3\n"


def test_views_are_listed_with_their_questions(lmt):
    code, out, _ = lmt("views")
    assert code == 0
    for view in list_views():
        assert any(line.split() == [view.name, *view.question.split()] for line in out.splitlines())


def test_a_view_is_shown_with_header_and_sql_that_runs(lmt):
    code, out, _ = lmt("views", "training")
    assert code == 0
    assert out.startswith("-- question:")
    assert lmt("sql", out, "--format", "csv") == lmt("sql", "FROM training", "--format", "csv")


def test_an_unknown_view_names_the_known_ones(lmt):
    code, _, err = lmt("views", "trainning")
    assert code == 2
    assert "attention_health" in err


@pytest.mark.parametrize("words", [[], ["nonsense"], ["sql", "SELECT 1", "--format", "xml"]])
def test_a_wrong_command_line_is_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_an_interrupt_is_exit_code_130(lmt, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lm_telemetry.cli.output.write", interrupted)
    assert lmt("sql", "SELECT 1")[0] == 130
