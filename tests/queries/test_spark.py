"""Every view says the same on a real Spark as in DuckDB, over the same files.

One session serves all tests, on one core and without pages, in a zone whose clocks change while the runs are on. It
compiles little, since nothing runs for long.
"""

import math
import os
import shutil
from datetime import datetime, timedelta

import pytest
import real_parts
from busy_store import busy_store

from lm_telemetry.catalogue import TABLES, columns
from lm_telemetry.compaction import compact, delete_retired
from lm_telemetry.queries import connect, list_views
from lm_telemetry.queries.dialect import translate
from lm_telemetry.queries.dialect_script import base_tables, script, view_statements

VIEWS = [view.name for view in list_views()]
EXACT = 1e-9
"""Relative difference of numbers that both engines compute in double precision, in another order."""
EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 DuckDB's are plain
ZERO = 1e-11
"""Values of order one whose difference is below this are the same."""
OPTIONS = {
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.memory": "1g",
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
    "spark.sql.adaptive.enabled": "false",
    "spark.sql.session.timeZone": "America/New_York",
    "spark.sql.shuffle.partitions": "1",
    "spark.ui.enabled": "false",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = busy_store(tmp_path_factory.mktemp("busy") / "a [busy] {store}, 'quoted'")
    compact(store, "a", 1)
    delete_retired(store, "a", 1, grace_seconds=0)
    assert list(store.path.glob("steps/run_id=a/rank=1/compact-*"))
    assert not list(store.path.glob("steps/run_id=a/rank=1/part-*"))
    return store.path


@pytest.fixture(scope="module")
def duck(store):
    with connect(store) as connection:
        yield connection


@pytest.fixture(scope="module")
def spark(store, tmp_path_factory):
    """A session that has the tables, and is in the zone that the script sets."""
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        real_parts.missing("pyspark")
    if "JAVA_HOME" not in os.environ and shutil.which("java") is None:
        real_parts.missing("java")
    scratch = tmp_path_factory.mktemp("spark")
    options = OPTIONS | {"spark.local.dir": str(scratch), "spark.sql.warehouse.dir": str(scratch / "warehouse")}
    session = SparkSession.builder.master("local[1]").config(map=options).getOrCreate()
    try:
        session.sparkContext.setLogLevel("OFF")
        session.sql(script("spark", str(store)).partition(";")[0])
        for statement in base_tables("spark", str(store)):
            session.sql(statement.sql)
        yield session
    finally:
        session.stop()


def in_duck(connection, name):
    """The names of the columns, and the rows."""
    answer = connection.execute(f"SELECT * FROM {name}")
    names = [column[0] for column in answer.description]
    return names, sorted((tuple(map(plain, row)) for row in answer.fetchall()), key=place)


def in_spark(session, name, names):
    kinds = {field.name: field.dataType.typeName() for field in session.table(name).schema}
    chosen = [f"unix_micros({n}) AS {n}" if kinds[n] == "timestamp" else n for n in names]
    found = session.sql(f"SELECT {', '.join(chosen)} FROM {name}").collect()
    return sorted((tuple(map(plain, row)) for row in found), key=place)


def plain(value):
    """A value as both engines' would be: NaN is as good as NULL, a time is microseconds in UTC."""
    if isinstance(value, datetime):
        return (value - EPOCH) // timedelta(microseconds=1)
    if isinstance(value, list):
        return tuple(map(plain, value))
    if value is None or isinstance(value, str | bool | int):
        return value
    return None if math.isnan(value) else float(value)


def place(row):
    """An order of rows in which values that are nearly the same are not told apart."""
    return [(v is not None, float(f"{v:.6g}") if isinstance(v, float) else v) for v in row]


def same(one, other):
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return one == other or math.isclose(one, other, rel_tol=EXACT, abs_tol=ZERO)
    return type(one) is type(other) and one == other


def differences(names, expected, found):
    if len(expected) != len(found):
        return f"{len(expected)} rows in DuckDB, {len(found)} in Spark"
    return [
        (name, one, other)
        for row, other_row in zip(expected, found, strict=True)
        for name, one, other in zip(names, row, other_row, strict=True)
        if not same(one, other)
    ][:10]


@pytest.mark.parametrize("table", TABLES)
def test_a_table_has_the_surviving_rows(table, duck, spark):
    names = ["run_id", "rank", *(m.name for m in columns(table))]
    _, expected = in_duck(duck, f"(SELECT {', '.join(names)} FROM {table})")
    assert expected
    assert not differences(names, expected, in_spark(spark, table, names))
    kinds = dict(spark.table(table).dtypes)
    assert list(kinds) == [m.name for m in columns(table)] + ["run_id", "rank"]
    assert (kinds["run_id"], kinds["rank"], kinds["time"]) == ("string", "int", "timestamp")


def test_time_reads_utc(duck, spark):
    expected = duck.execute("SELECT min(CAST(time AS VARCHAR)), max(CAST(time AS VARCHAR)) FROM steps").fetchone()
    assert (
        tuple(spark.sql("SELECT min(CAST(time AS STRING)), max(CAST(time AS STRING)) FROM steps").first()) == expected
    )


ROW_BY_ROW = """
    SELECT
        run_id, rank, step, isnan(loss) AS is_nan, NOT isnan(grad_norm) AS is_number, tokens / seconds AS speed,
        (loss - loss) / (step - step) AS undefined, tokens / 7 AS weeks, 0.5 / tokens AS half,
        ln(step - 1) AS log_before, log10(seconds) AS decades,
        greatest(loss, grad_norm, 1.5) AS larger, least(loss, grad_norm) AS smaller,
        max_by(update_norm, step) OVER so_far AS last_update, min_by(update_norm, step) OVER so_far AS first_update,
        quantile_cont(loss, 0.3) OVER (PARTITION BY run_id, rank) AS low_loss,
        median(loss) OVER (PARTITION BY run_id, rank) AS middle_loss,
        regr_sxy(loss, step) OVER so_far AS products, regr_syy(loss, step) OVER so_far AS squares,
        concat(run_id, ':', CAST(tokens AS VARCHAR)) AS label, concat_ws('-', run_id, CAST(tokens AS VARCHAR)) AS name,
        row_number() OVER (PARTITION BY run_id, rank ORDER BY update_norm, step) AS from_smallest,
        row_number() OVER (PARTITION BY run_id, rank ORDER BY update_norm DESC, step) AS from_largest,
        round(loss) AS rounded, round(-2.5) AS away, loss > 100 AS is_large, power(loss, 2) AS squared
    FROM steps
    WINDOW so_far AS (PARTITION BY run_id, rank ORDER BY step ROWS BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW)
    ORDER BY run_id, rank, step"""


def test_null_nan_zero_and_infinity_come_out_as_in_duckdb_value_by_value(duck, spark):
    answer = duck.execute(ROW_BY_ROW)
    names = [column[0] for column in answer.description]
    expected = [tuple(map(numeric, row)) for row in answer.fetchall()]
    found = [tuple(map(numeric, row)) for row in spark.sql(translate(ROW_BY_ROW, "spark")).collect()]
    assert not differences(names, expected, found)


def numeric(value):
    """A value with NaN told from NULL, and all numbers that are not whole as floats."""
    if value is None or isinstance(value, str | bool | int):
        return value
    return "NaN" if math.isnan(value) else float(value)


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_says_the_same(view, duck, spark):
    names, expected = in_duck(duck, view)
    assert expected, f"nothing in tests/support/busy_store.py for {view} to tell of"
    for statement in view_statements("spark", [view]):
        spark.sql(statement.sql)
    assert not differences(names, expected, in_spark(spark, view, names))
