"""A store as a database: types, comments, live runs, foreign files, and what is no store."""

import builtins
import json
import math
import shutil

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm_telemetry.catalogue import TABLES, columns
from lm_telemetry.columns import to_table
from lm_telemetry.errors import QueryError, StoreError
from lm_telemetry.queries import connect, list_views
from lm_telemetry.store import Manifest

TYPES = {
    "bool": "BOOLEAN",
    "int32": "INTEGER",
    "int64": "BIGINT",
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "string": "VARCHAR",
    "timestamp": "TIMESTAMP",
    "list<int32>": "INTEGER[]",
    "list<float32>": "FLOAT[]",
}


def described(con, table):
    return {name: type_ for name, type_, *_ in con.execute(f"DESCRIBE {table}").fetchall()}


def expected(table):
    return {"run_id": "VARCHAR", "rank": "INTEGER"} | {m.name: TYPES[m.type] for m in columns(table)}


@pytest.mark.parametrize("table", TABLES)
def test_a_table_has_the_catalogue_s_types_before_and_after_its_first_row(table, store, put):
    con = connect(store.path)
    assert described(con, table) == expected(table)
    assert con.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    put(table, 1, **{columns(table)[3].name: [None]})
    con = connect(store.path)
    assert described(con, table) == expected(table)
    assert con.execute(f"SELECT count(*) FROM {table}").fetchone() == (1,)


def test_columns_and_tables_are_commented_from_the_catalogue(store):
    con = connect(store.path)
    comments = dict(con.execute("SELECT table_name || '.' || column_name, comment FROM duckdb_columns()").fetchall())
    for table in TABLES:
        for m in columns(table):
            assert comments[f"{table}.{m.name}"].startswith(m.meaning)
    assert comments["steps.loss"].endswith("[nats]")
    views = dict(con.execute("SELECT view_name, comment FROM duckdb_views() WHERE NOT internal").fetchall())
    assert views == TABLES | {view.name: view.question for view in list_views()}


def test_runs_keep_their_names_whatever_they_look_like(store, put):
    names = ["123", "1e5", "true", "2024-01-01", "a.b_c-d"]
    for name in names:
        put("steps", 1, run_id=name, loss=[1.0])
    found = connect(store.path).execute("SELECT run_id FROM steps").fetchall()
    assert sorted(found) == sorted((name,) for name in names)


def test_rows_flushed_later_are_seen_by_the_same_connection(store, put):
    put("steps", 1, loss=[1.0])
    con = connect(store.path)
    put("steps", 2, loss=[0.5])
    put("steps", 1, run_id="other", rank=3, loss=[2.0])
    assert con.execute("SELECT run_id, rank, loss FROM steps ORDER BY loss").fetchall() == [
        ("r", 0, 0.5),
        ("r", 0, 1.0),
        ("other", 3, 2.0),
    ]


def test_time_is_utc_wherever_one_is(store, put, monkeypatch):
    monkeypatch.setenv("TZ", "America/New_York")
    put("steps", 3600, loss=[1.0])
    (time,) = connect(store.path).execute("SELECT time FROM steps").fetchone()
    assert time.isoformat() == "1970-01-01T01:00:00"


def test_null_and_nan_stay_apart(store, put):
    put("steps", 1, loss=[float("nan"), None])
    found = connect(store.path).execute("SELECT count(loss), count(*), bool_or(isnan(loss)) FROM steps").fetchone()
    assert found == (1, 2, True)


def test_files_of_other_versions_fit_in(store, put):
    put("steps", 2, loss=[0.5])
    older = store.path / "steps" / "run_id=old" / "rank=0" / "part-0-0.parquet"
    older.parent.mkdir(parents=True)
    pq.write_table(
        pa.table({"step": pa.array([1], pa.int32()), "loss": pa.array([1], pa.int64()), "extra": ["x"]}), older
    )
    con = connect(store.path)
    assert described(con, "steps") == expected("steps") | {"extra": "VARCHAR"}
    assert con.execute("SELECT run_id, step, loss, extra, attempt FROM steps ORDER BY step").fetchall() == [
        ("old", 1, 1.0, "x", None),
        ("r", 2, 0.5, None, 0),
    ]


def test_a_store_of_old_files_alone_has_all_columns(store):
    older = store.path / "steps" / "run_id=old" / "rank=0" / "part-0-0.parquet"
    older.parent.mkdir(parents=True)
    pq.write_table(pa.table({"step": [1]}), older)
    con = connect(store.path)
    assert described(con, "steps") == expected("steps")
    assert con.execute("SELECT step, loss FROM steps").fetchall() == [(1, None)]


def test_temporary_files_are_not_read(store, put):
    put("steps", 1, loss=[1.0])
    (store.path / "steps/run_id=r/rank=0/.part-0-9.parquet.1.tmp").write_bytes(b"half")
    assert connect(store.path).execute("SELECT count(*) FROM steps").fetchone() == (1,)


@pytest.mark.parametrize("name", ["it's", "a [1] *", "день", 'quo"te', "a?b"])
def test_any_directory_name_will_do(tmp_path, put, store, name):
    put("steps", 1, loss=[1.0])
    moved = shutil.move(store.path, tmp_path / name)
    con = connect(moved)
    con.confine()
    assert con.execute("SELECT count(*) FROM steps").fetchone() == (1,)


def test_a_copy_without_manifests_is_a_store(store, put):
    put("steps", 1, loss=[1.0])
    shutil.rmtree(store.path / "_manifests")
    assert connect(store.path).execute("SELECT count(*) FROM steps").fetchone() == (1,)


@pytest.mark.parametrize("kind", ["nothing", "empty", "file", "foreign"])
def test_what_is_no_store_is_refused(tmp_path, kind):
    path = tmp_path / "place"
    if kind == "file":
        path.write_text("")
    elif kind != "nothing":
        path.mkdir()
    if kind == "foreign":
        (path / "steps").mkdir()
        (path / "steps" / "data.parquet").write_bytes(b"")
    with pytest.raises(StoreError, match="store") as caught:
        connect(path)
    assert caught.value.path == str(path)


def test_without_duckdb_the_error_says_what_to_install(store, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "duckdb":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(QueryError, match="pip install duckdb"):
        connect(store.path)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM read_text('/etc/hostname')",
        "COPY (SELECT 1) TO '{outside}/x.csv'",
        "ATTACH '{outside}/x.db'",
        "SET enable_external_access = true",
        "SET allowed_directories = ['/']",
        "SELECT * FROM read_text('{store}/../secret')",
        "INSTALL httpfs",
    ],
)
def test_a_confined_connection_reaches_nothing_outside(store, put, tmp_path, query):
    put("steps", 1, loss=[1.0])
    (tmp_path / "secret").write_text("secret")
    con = connect(store.path)
    con.confine()
    with pytest.raises(duckdb.Error):
        con.execute(query.format(outside=tmp_path, store=store.path)).fetchall()
    assert con.execute("SELECT loss FROM training").fetchall() == [(1.0,)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret", "store"]


def test_an_extension_that_is_missing_is_not_taken_for_damage(store):
    with connect(store.path) as con:
        con.execute("SET autoinstall_known_extensions = false")
        con.execute("SET autoload_known_extensions = false")
        with pytest.raises(duckdb.Error, match="sqlite"):
            con.execute("FROM sqlite_scan('some.db', 'some')").fetchall()


@pytest.mark.parametrize("name", ["per%41cent", "what?", "two\nlines", "__HIVE_DEFAULT_PARTITION__"])
def test_a_run_whose_name_hive_readers_take_for_another_is_named(store, put, name):
    put("steps", 1, loss=[1.0])
    shutil.copytree(next((store.path / "steps").glob("run_id=*")), store.path / "steps" / f"run_id={name}")
    with pytest.raises(StoreError, match="take for another") as caught:
        connect(store.path)
    assert repr(f"run_id={name}") in str(caught.value)


@pytest.mark.parametrize("fact", ["rows", "bytes", "first_step", "last_step"])
@pytest.mark.parametrize("value", ["12", 1e400, [1], True])
def test_a_manifest_whose_numbers_are_none_is_named(store, fact, value):
    rows = to_table("steps", {"loss": [1.0]}, attempt=0, step=1, time_us=1)
    part = store.write_part(rows, table="steps", run_id="r", rank=0, attempt=0, seq=0)
    store.write_manifest(Manifest(run_id="r", rank=0, attempt=0, parts=[part]))
    assert connect(store.path).execute("SELECT count(*) FROM steps").fetchone() == (1,)
    path = store.manifest_path("r", 0, 0)
    document = json.loads(path.read_text())
    next(iter(document["parts"].values()))[0][fact] = value
    path.write_text(json.dumps(document))
    with pytest.raises(StoreError, match=path.name):
        connect(store.path)


@pytest.mark.parametrize("losses", [[2.0, 1.0, 3.0], [2.0, math.nan, 3.0], [math.nan, math.nan], [math.inf, 1.0]])
def test_extremes_and_nan_are_what_the_rows_say(store, put, losses):
    """Not what a file's statistics say, which leave NaN out."""
    put("steps", 1, loss=losses)
    con = connect(store.path)
    nan = any(map(math.isnan, losses))
    finite = [loss for loss in losses if math.isfinite(loss)]
    asked = ("max(loss)", "min(loss)", "count(*) FILTER (isnan(loss))", "count(*) FILTER (loss > 100)")
    largest, smallest, isnan, above = (con.execute(f"SELECT {a} FROM steps").fetchone()[0] for a in asked)
    assert math.isnan(largest) if nan else largest == max(losses)
    assert smallest == min(finite) if finite else math.isnan(smallest)
    assert (isnan, above) == (sum(map(math.isnan, losses)), sum(not loss <= 100 for loss in losses))
    for condition, expected in (
        ("isnan(loss)", isnan),
        ("loss > 100", above),
        ("loss < 2.5", sum(x < 2.5 for x in losses)),
    ):
        assert con.execute(f"SELECT count(*) FROM steps WHERE {condition}").fetchone() == (expected,)
