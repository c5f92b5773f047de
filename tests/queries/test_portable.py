"""Views keep to the SQL that DuckDB, Spark and Trino agree on; what does not is refused, with what to write instead."""

import sys

import pytest

from lm_telemetry.errors import QueryError
from lm_telemetry.queries import list_views
from lm_telemetry.queries.portable import parse


@pytest.mark.parametrize("view", list_views(), ids=lambda view: view.name)
def test_a_view_is_portable(view):
    parse(f"views/{view.name}.sql", view.sql)


@pytest.mark.parametrize(
    ("sql", "complaint"),
    [
        ("SELECT approx_count_distinct(step) FROM steps", r"`APPROX_COUNT_DISTINCT\(step\)`: .*count\(DISTINCT x\)"),
        ("SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY loss) FROM steps", r"approximates it .*quantile_cont"),
        ("SELECT quantile_cont(loss, [0.1, 0.9]) FROM steps", "one number q"),
        ("SELECT skewness(loss) FROM steps", "sums of powers"),
        ("SELECT kurtosis_pop(loss) FROM steps", "no such function"),
        ("SELECT any_value(loss) FROM steps", "breaks ties"),
        ("SELECT max_by(loss, step, 3) FROM steps", "lists are beyond"),
        ("SELECT list_sum(gram) FROM sketches", "no such function"),
        ("SELECT [x + 1 FOR x IN gram] FROM sketches", "lists are beyond"),
        ("SELECT gram[1] FROM sketches", "lists are beyond"),
        ("SELECT * EXCLUDE (loss) FROM steps", "name the columns"),
        ("SELECT * REPLACE (1 AS loss) FROM steps", "name the columns"),
        ("SELECT run_id, count(*) FROM steps GROUP BY ALL", "name the columns"),
        ("SELECT DISTINCT ON (run_id) run_id, loss FROM steps", "number the rows"),
        ("SELECT loss FROM steps QUALIFY row_number() OVER (ORDER BY step) = 1", "CTE and WHERE"),
        ("SELECT count(*) FILTER (WHERE loss > 1) OVER (ORDER BY step) FROM steps", "CASE into the argument"),
        ("SELECT s.loss FROM steps AS s ASOF JOIN curvature AS c ON s.step >= c.step", "plain join"),
        ("SELECT s.loss FROM steps AS s SEMI JOIN curvature AS c ON s.step = c.step", "plain join"),
        ("SELECT step // 2 FROM steps", r"floor\(a / b\)"),
        ("SELECT step % 2 FROM steps", "Spark and Trino"),
        ("SELECT CAST(loss AS BIGINT) FROM steps", "rounds where Spark cuts off"),
        ("SELECT CAST(loss AS HUGEINT) FROM steps", "types are"),
        ("SELECT CAST(gram AS FLOAT[]) FROM sketches", "types are"),
        ("SELECT loss AS x, x + 1 AS y FROM steps", "only ORDER BY may name"),
        ("SELECT loss AS x FROM steps WHERE x > 1", "only ORDER BY may name"),
        ("SELECT loss AS x FROM steps GROUP BY x", "only ORDER BY may name"),
        ("SELECT lost FROM steps", "lost.*no column"),
        ("SELECT 1; SELECT 2", "one SELECT"),
        ("DROP TABLE steps", "one SELECT"),
        ("SELECT FROM WHERE (", "not SQL"),
    ],
)
def test_what_is_outside_is_refused_with_advice(sql, complaint):
    with pytest.raises(QueryError, match=complaint):
        parse("my view", sql)


def test_all_complaints_come_at_once():
    with pytest.raises(QueryError, match=r"^my view .*SKEWNESS.*step % 2") as caught:
        parse("my view", "SELECT skewness(loss) AS a, step % 2 AS b FROM steps")
    assert str(caught.value).count("`: ") == 2


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT loss AS x FROM steps ORDER BY x DESC",
        "SELECT CAST(sum(tokens) AS BIGINT) AS n, CAST(round(avg(loss)) AS INTEGER) AS m FROM steps",
        "SELECT list_cosine_similarity(CAST(gram AS DOUBLE[]), CAST(gram AS DOUBLE[])) AS c FROM sketches",
        "SELECT quantile_cont(loss, 0.9) AS q, median(loss) AS m FROM steps",
        "WITH RECURSIVE a AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM a WHERE n < 5) SELECT n FROM a",
        "SELECT s.step FROM steps AS s WHERE NOT EXISTS (SELECT 1 FROM curvature AS c WHERE c.step = s.step)",
        "SELECT ratio FROM edge_of_stability",
    ],
)
def test_what_is_inside_passes(sql):
    parse("my view", sql)


def test_without_sqlglot_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sqlglot", None)
    with pytest.raises(QueryError, match=r"lm-telemetry\[dialects\]"):
        parse("my view", "SELECT 1")
