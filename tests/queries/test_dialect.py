"""Translation rule by rule, and the script of tables and views: what is in it, and in which order."""

import re

import pytest
import sqlglot
from sqlglot import exp

from lm_telemetry.catalogue import TABLES, columns
from lm_telemetry.cli import main
from lm_telemetry.errors import QueryError
from lm_telemetry.queries import list_views
from lm_telemetry.queries.dialect import DIALECTS, tables_of, translate
from lm_telemetry.queries.dialect_script import base_tables, script, view_statements

VIEWS = {view.name: view for view in list_views()}


def flat(sql):
    """On one line, without the spaces that only make it pretty."""
    return re.sub(r"(?<=\() | (?=\))", "", re.sub(r"\s+", " ", sql))


def translated(expression, dialect):
    text = flat(translate(f"SELECT {expression} AS x FROM steps AS s, sketches AS g", dialect))
    return text.removeprefix("SELECT ").partition(" AS x FROM ")[0]


@pytest.mark.parametrize(
    ("expression", "spark"),
    [
        ("quantile_cont(s.loss, 0.9)", "PERCENTILE(s.loss, 0.9)"),
        ("median(s.loss)", "MEDIAN(s.loss)"),
        ("isnan(s.loss)", "(s.loss = CAST('NaN' AS DOUBLE))"),
        ("max_by(s.loss, s.step)", "MAX_BY(s.loss, CASE WHEN NOT s.loss IS NULL THEN s.step END)"),
        ("s.loss / 2", "CAST(s.loss AS DOUBLE) / 2"),
        ("s.loss / nullif(s.seconds, 0)", "CAST(s.loss AS DOUBLE) / NULLIF(s.seconds, 0)"),
        (
            "s.loss / s.step",
            "CASE WHEN s.step = 0 THEN s.loss * CAST('Infinity' AS DOUBLE) ELSE CAST(s.loss AS DOUBLE) / s.step END",
        ),
        ("ln(s.loss)", "CASE WHEN s.loss = 0 THEN CAST('-Infinity' AS DOUBLE) ELSE LN(s.loss) END"),
        ("ln(CASE WHEN s.loss > 0 THEN s.loss END)", "LN(CASE WHEN s.loss > 0 THEN s.loss END)"),
        ("row_number() OVER (ORDER BY s.step)", "ROW_NUMBER() OVER (ORDER BY s.step NULLS LAST)"),
        ("row_number() OVER (ORDER BY s.step DESC)", "ROW_NUMBER() OVER (ORDER BY s.step DESC)"),
        ("concat(s.run_id, '.', s.rank)", "CONCAT(COALESCE(s.run_id, ''), '.', COALESCE(s.rank, ''))"),
    ],
)
def test_what_spark_takes_otherwise(expression, spark):
    assert translated(expression, "spark") == spark


@pytest.mark.parametrize(
    ("expression", "trino"),
    [
        ("isnan(s.loss)", "IS_NAN(s.loss)"),
        ("s.step / 2", "CAST(s.step AS DOUBLE) / 2"),
        ("max_by(s.loss, s.step)", "MAX_BY(s.loss, CASE WHEN NOT s.loss IS NULL THEN s.step END)"),
        ("greatest(s.loss, 0)", "ARRAY_MAX(FILTER(ARRAY[s.loss, 0], v -> NOT v IS NULL))"),
        (
            "regr_sxy(s.loss, s.step)",
            "(COVAR_POP(s.loss, s.step) * COUNT(CASE WHEN NOT s.loss IS NULL THEN s.step END))",
        ),
        (
            "regr_syy(s.loss, s.step) OVER w",
            (
                "(COVAR_POP(s.loss, CASE WHEN NOT s.step IS NULL THEN s.loss END) OVER w"
                " * COUNT(CASE WHEN NOT s.loss IS NULL THEN s.step END) OVER w)"
            ),
        ),
    ],
)
def test_what_trino_takes_otherwise(expression, trino):
    assert translated(expression, "trino") == trino


def test_a_quantile_on_trino_is_exact():
    text = translated("quantile_cont(s.loss, 0.9)", "trino")
    assert "APPROX" not in text
    assert "ARRAY_SORT(ARRAY_AGG(s.loss))" in text
    assert "ARRAY_SORT(ARRAY_AGG(s.loss) OVER w)" in translated("quantile_cont(s.loss, 0.9) OVER w", "trino")
    assert "(ARRAY_AGG(s.loss) FILTER(WHERE s.step > 1))" in translated("median(s.loss) FILTER (s.step > 1)", "trino")


@pytest.mark.parametrize(("dialect", "fold"), [("spark", "AGGREGATE"), ("trino", "REDUCE")])
def test_the_cosine_of_lists_is_in_doubles(dialect, fold):
    text = translated("list_cosine_similarity(g.gram, g.gram)", dialect)
    assert text.count(f"{fold}(") == 3
    assert "LIST_COSINE" not in text
    assert text.count("CAST(0 AS DOUBLE)") == 3


def test_only_the_recursive_view_names_columns_of_ctes_on_trino_and_all_of_them():
    tree = sqlglot.parse_one(translate(VIEWS["pathways"], "trino"), read="trino")
    for cte in tree.find_all(exp.CTE):
        names = [column.name for column in cte.args["alias"].columns]
        assert names
        assert "*" not in names
    assert "overview(" not in translate(VIEWS["overview"], "trino")


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("view", VIEWS)
def test_a_translated_view_has_its_columns(view, dialect):
    tree = sqlglot.parse_one(translate(VIEWS[view], dialect), read=dialect)
    assert tree.named_selects == [column.name for column in VIEWS[view].columns]
    assert not tree.find(exp.ApproxQuantile, exp.Placeholder)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_everything_is_made_after_what_it_reads(dialect):
    made = [*base_tables(dialect, "/store"), *view_statements(dialect)]
    assert {statement.name for statement in made} >= set(TABLES) | set(VIEWS)
    known = set()
    for statement in made:
        if statement.name in VIEWS:
            assert set(tables_of(VIEWS[statement.name])) <= known
        known.add(statement.name)
    assert script(dialect, "/store").removesuffix(";").split(";\n\n")[-len(made) :] == [s.sql for s in made]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_one_view_comes_with_what_it_needs_and_nothing_else(dialect):
    made = re.findall(r"^CREATE .*?(\w+) (?:AS|\()$", script(dialect, "/store", ["sharpening"]), flags=re.MULTILINE)
    tables = ["steps", "curvature"]
    raw = [f"raw_{table}" for table in tables]
    assert made == [*raw, "attempt_starts", *tables, "edge_of_stability", "sharpening"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_table_that_was_never_written_has_no_rows_but_all_columns(dialect):
    made = {s.name: s.sql for s in base_tables(dialect, "/store", ["spectra"], present=["steps"])}
    assert made["raw_spectra"].endswith("WHERE FALSE")
    assert "/store/steps" in "".join(s.sql for s in base_tables(dialect, "/store", ["spectra"], present=["steps"]))
    for name in ("run_id", "rank", *(m.name for m in columns("spectra"))):
        assert f" AS {name}" in made["raw_spectra"]


def test_places_are_quoted():
    spark, trino = (base_tables(dialect, "s3://b/it's [1]/", ["steps"])[0].sql for dialect in DIALECTS)
    assert r"(path 's3://b/it\'s \\[1\\]/steps'," in spark
    assert "external_location = 's3://b/it''s [1]/steps'" in trino


@pytest.mark.parametrize("ask", [lambda d: translate("SELECT 1 AS x", d), lambda d: script(d, "/s"), view_statements])
def test_an_unknown_dialect_names_the_known_ones(ask):
    with pytest.raises(QueryError, match="spark, trino"):
        ask("oracle")


def test_the_command_line_writes_the_script(tmp_path, capsys):
    (tmp_path / "steps").mkdir()
    words = ["--dialect", "spark", "--store", str(tmp_path)]
    assert main(["views", *words]) == 0
    out = capsys.readouterr().out
    assert out == script("spark", str(tmp_path), present=["steps"]) + "\n"
    assert f"path '{tmp_path}/steps'" in out
    assert main(["views", "training", *words[:2], "--location", "s3a://b/s", "--store", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out == script("spark", "s3a://b/s", ["training"]) + "\n"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--dialect", "oracle"], "spark, trino"),
        (["trainning", "--dialect", "spark"], "attention_health"),
        (["--location", "s3a://b/s"], "goes with --dialect"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(words, complaint, capsys):
    assert main(["views", *words]) == 2
    assert complaint in capsys.readouterr().err
