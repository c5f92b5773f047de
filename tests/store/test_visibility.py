"""Whoever reads a table's directory without our manifests sees every row exactly once, whatever a compaction is at."""

import json
import multiprocessing as mp
import os
import shutil
import signal
from pathlib import Path

import duckdb
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import real_parts
from compaction_children import compact_and_die
from store_trees import STEPS_A_PART, fill, written

from lm_telemetry.compaction import compact, delete_retired
from lm_telemetry.queries import connect
from lm_telemetry.repair import repair
from lm_telemetry.store import Store
from lm_telemetry.upkeep import FEW_PARTS, compact_own
from lm_telemetry.verify import verify

ROWS = "SELECT run_id, rank, attempt, step, loss FROM raw.steps ORDER BY ALL"
PARTITION = "steps/run_id=r/rank=0"
HIDDEN = "_merged/steps/run_id=r/rank=0"
GRACE = 60.0


def by_pyarrow_dataset(table):
    return ds.dataset(table, partitioning="hive").to_table()["step"].to_pylist()


def by_pyarrow_parquet(table):
    return pq.read_table(table)["step"].to_pylist()


def by_pandas(table):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    return pandas.read_parquet(table)["step"].tolist()


def by_polars(table):
    polars = pytest.importorskip("polars", reason="Polars is not installed")
    return polars.scan_parquet(table).collect()["step"].to_list()


def by_glob(table):
    return [
        s for f in Path(table).glob("**/*.parquet") for s in pq.read_table(f, partitioning=None)["step"].to_pylist()
    ]


def by_duckdb(pattern):
    def read(table):
        query = f"SELECT step FROM read_parquet('{table}/{pattern}', hive_partitioning = true)"
        with duckdb.connect() as connection:
            return [step for (step,) in connection.execute(query).fetchall()]

    return read


def by_spark(table):
    try:
        from pyspark.sql import SparkSession
    except ImportError:
        real_parts.missing("pyspark")
    if "JAVA_HOME" not in os.environ and shutil.which("java") is None:
        real_parts.missing("java")
    options = {
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
        "spark.ui.enabled": "false",
    }
    session = SparkSession.builder.master("local[1]").config(map=options).getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    return [row.step for row in session.read.parquet(table).select("step").collect()]


@pytest.fixture
def spark_ends():
    yield
    from pyspark.sql import SparkSession

    session = SparkSession.getActiveSession()
    if session is not None:
        session.stop()


READERS = {
    "pyarrow.dataset": by_pyarrow_dataset,
    "pyarrow.parquet": by_pyarrow_parquet,
    "pandas": by_pandas,
    "Polars": by_polars,
    "a glob": by_glob,
    "DuckDB, *.parquet": by_duckdb("*/*/*.parquet"),
    "DuckDB, **/*.parquet": by_duckdb("**/*.parquet"),
    "DuckDB, all files": by_duckdb("**"),
}


def steps(store, read=by_glob):
    return sorted(read(str(store.path / "steps")))


def age(store):
    """As if all that was replaced so far had been replaced two graces ago."""
    path = store.manifests("r") / "compaction" / "rank=0.json"
    document = json.loads(path.read_text())
    for entry in document["retired"]:
        entry["at"] = "2026-01-01T00:00:00.000+00:00"
    path.write_text(json.dumps(document))


def names(store, place=PARTITION):
    return sorted(path.name for path in (store.path / place).glob("*"))


@pytest.mark.parametrize("reader", READERS)
def test_every_row_is_seen_once_before_and_after_the_switch(store, reader):
    live_a_life(store, READERS[reader])


def test_spark_sees_every_row_once_before_and_after_the_switch(store, spark_ends):
    live_a_life(store, by_spark)


def live_a_life(store, read):
    """Compactions of several kinds; after each, `read` sees every row once."""
    parts = FEW_PARTS
    fill(store, parts=parts)
    compact_own(store, "r", 0)  # what a run does at its end
    assert names(store, HIDDEN) == ["compact-1-0.merged"]
    assert steps(store, read) == list(range(1, parts * STEPS_A_PART + 1)), "while it is hidden"
    fill(store, parts=2, first=1 + parts * STEPS_A_PART, seq=parts)
    parts += 2
    compact(store, "r", 0, grace_seconds=GRACE)
    everything = list(range(1, parts * STEPS_A_PART + 1))
    assert steps(store, read) == everything, "while another is hidden"
    age(store)
    assert delete_retired(store, "r", 0, grace_seconds=GRACE) == 2 * parts
    assert names(store) == ["compact-1-0.parquet", "compact-2-0.parquet"]
    assert steps(store, read) == everything, "when they are visible"
    compact(store, "r", 0, grace_seconds=GRACE)
    assert names(store) == ["compact-1-0.parquet", "compact-2-0.parquet"]
    assert steps(store, read) == everything, "while what replaces them is hidden"
    compact(store, "r", 0, grace_seconds=0)
    assert names(store) == ["compact-3-0.parquet"]
    assert steps(store, read) == everything, "when all is in one"
    assert connect(store.path).execute(ROWS).fetchall() == written(parts)
    assert verify(store.path, deep=True) == []


def test_without_a_grace_all_happens_in_one_call(store):
    fill(store, parts=3)
    assert compact(store, "r", 0, grace_seconds=0).deleted == 6
    assert names(store) == ["compact-1-0.parquet"]
    assert names(store, HIDDEN) == []


def test_queries_that_were_given_the_hidden_name_have_a_grace_after_the_switch(store):
    fill(store, parts=3)
    compact(store, "r", 0, grace_seconds=GRACE)
    con = connect(store.path)
    relation = con.sql("SELECT count(*), count(DISTINCT step) FROM steps")
    assert {part.file for part in con.snapshot.tables["steps"]} == {f"{HIDDEN}/compact-1-0.merged"}
    age(store)
    compact(store, "r", 0, grace_seconds=GRACE)
    assert names(store) == ["compact-1-0.parquet"]
    assert relation.fetchall() == [(12, 12)]
    assert con.execute("SELECT count(*), count(DISTINCT step) FROM steps").fetchone() == (12, 12)
    assert {part.file for part in con.snapshot.tables["steps"]} == {f"{PARTITION}/compact-1-0.parquet"}
    age(store)
    assert delete_retired(store, "r", 0, grace_seconds=GRACE) == 0  # nothing that others saw
    assert names(store, HIDDEN) == []
    assert con.execute(ROWS).fetchall() == written(3)


def test_a_file_waits_for_all_that_it_replaces_and_for_nothing_else(store):
    fill(store, parts=4)
    compact(store, "r", 0, grace_seconds=GRACE, file_rows=2 * STEPS_A_PART)
    age(store)
    fill(store, parts=2, first=17, seq=4)
    compact(store, "r", 0, grace_seconds=GRACE, file_rows=2 * STEPS_A_PART)
    assert names(store) == ["compact-1-0.parquet", "compact-1-1.parquet", "part-0-4.parquet", "part-0-5.parquet"]
    assert steps(store) == list(range(1, 25))
    assert connect(store.path).execute(ROWS).fetchall() == written(6)


@pytest.fixture(scope="module")
def due(tmp_path_factory):
    """A store with a hidden file that is due, and parts that are not merged."""
    store = Store.open_for_writing(tmp_path_factory.mktemp("due") / "store")
    fill(store, parts=2)
    compact(store, "r", 0, grace_seconds=GRACE)
    age(store)
    fill(store, parts=2, first=9, seq=2)
    return store


@pytest.mark.parametrize("grace_seconds", [0.0, GRACE])
def test_a_kill_at_any_change_of_a_file_is_mended(due, tmp_path, grace_seconds):
    # With a grace, the child makes the first file visible and leaves a second one hidden.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["compaction_children"])
    doubled, exitcode = 0, -signal.SIGKILL
    for change in range(50):
        store = Store(tmp_path / str(change))
        shutil.copytree(due.path, store.path)
        child = context.Process(target=compact_and_die, args=(store.path, change, grace_seconds))
        child.start()
        child.join()
        exitcode = child.exitcode
        found = steps(store)
        assert set(found) == set(range(1, 17)), change  # never missing
        doubled += len(found) > 16
        assert connect(store.path).execute(ROWS).fetchall() == written(4), change
        kinds = {f.kind for f in verify(store.path)}
        assert kinds <= {"temporary", "orphan"}, change
        assert len(found) == 16 or "orphan" in kinds, change
        copy = Store(tmp_path / f"{change} with copies for links")
        shutil.copytree(store.path, copy.path)
        compact(copy, "r", 0, grace_seconds=GRACE)
        repair(store.path)
        assert repair(store.path) == [], change
        for mended in (copy, store):
            assert steps(mended) == list(range(1, 17)), change
            assert connect(mended.path).execute(ROWS).fetchall() == written(4), change
            assert verify(mended.path, deep=True) == [], change
        age(store)
        compact(store, "r", 0, grace_seconds=GRACE)
        assert steps(store) == list(range(1, 17)), change  # what was mended goes on as it should
        if exitcode == 0:
            break
    assert exitcode == 0
    assert change > 10
    assert doubled > 1  # kills came between the new name and the last deletion


def test_where_there_are_no_links_the_file_is_copied(store, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    fill(store, parts=3)
    compact(store, "r", 0, grace_seconds=GRACE)
    age(store)
    delete_retired(store, "r", 0, grace_seconds=GRACE)
    assert names(store) == ["compact-1-0.parquet"]
    assert (store.path / PARTITION / "compact-1-0.parquet").stat().st_nlink == 1
    assert verify(store.path, deep=True) == []
    assert connect(store.path).execute(ROWS).fetchall() == written(3)
    compact(store, "r", 0, grace_seconds=0)
    assert names(store, HIDDEN) == []


def test_a_store_in_which_the_merged_file_was_never_hidden_is_read_and_brought_to_its_end(store):
    fill(store, parts=3)
    compact(store, "r", 0, grace_seconds=GRACE)
    for table in ("steps", "layers"):
        hidden = store.path / "_merged" / table / "run_id=r/rank=0/compact-1-0.merged"
        hidden.rename(store.path / table / "run_id=r/rank=0/compact-1-0.parquet")
    shutil.rmtree(store.path / "_merged")
    path = store.manifests("r") / "compaction" / "rank=0.json"
    document = json.loads(path.read_text().replace("_merged/", "").replace(".merged", ".parquet"))
    for entry in document["retired"]:
        del entry["by"]
    path.write_text(json.dumps(document))
    assert verify(store.path, deep=True) == []
    assert connect(store.path).execute(ROWS).fetchall() == written(3)
    fill(store, parts=2, first=13, seq=3)
    compact(store, "r", 0, grace_seconds=GRACE)
    assert connect(store.path).execute(ROWS).fetchall() == written(5)
    assert delete_retired(store, "r", 0, grace_seconds=0) == 12
    assert names(store) == ["compact-2-0.parquet"]
    assert connect(store.path).execute(ROWS).fetchall() == written(5)


def test_a_visible_file_that_is_lost_soon_after_the_switch_is_had_from_its_hidden_name(store):
    fill(store, parts=3)
    compact(store, "r", 0, grace_seconds=GRACE)
    age(store)
    delete_retired(store, "r", 0, grace_seconds=GRACE)
    (store.path / PARTITION / "compact-1-0.parquet").unlink()
    assert ("error", "missing") in {(f.severity, f.kind) for f in verify(store.path)}
    repair(store.path)
    assert verify(store.path, deep=True) == []
    assert repair(store.path) == []
    assert steps(store) == list(range(1, 13))
    assert connect(store.path).execute(ROWS).fetchall() == written(3)


@pytest.mark.parametrize("gone", [[], [0], [0, 1]])
def test_a_switch_that_was_killed_is_brought_to_its_end_where_its_manifest_is_lost(store, gone):
    fill(store, parts=3)
    compact(store, "r", 0, grace_seconds=GRACE)
    for table in ("steps", "layers"):
        directory = store.path / table / "run_id=r/rank=0"
        hidden = store.path / "_merged" / table / "run_id=r/rank=0/compact-1-0.merged"
        (directory / "compact-1-0.parquet").hardlink_to(hidden)
        for seq in gone:
            (directory / f"part-0-{seq}.parquet").unlink()
    (store.manifests("r") / "compaction" / "rank=0.json").unlink()
    repair(store.path)
    assert names(store) == ["compact-1-0.parquet"]
    assert connect(store.path).execute(ROWS).fetchall() == written(3)
    assert verify(store.path, deep=True) == []
    assert repair(store.path) == []
