"""Compaction: the same rows in fewer files, beside writers, readers and other compactors, also if it is killed."""

import json
import multiprocessing as mp
import random
import time

import duckdb
import pyarrow.parquet as pq
import pytest
from store_children import compact_for_ever, write_for_ever
from store_trees import LAYERS, STEPS_A_PART, fill, written

from lm_telemetry.compaction import compact, delete_retired, locked
from lm_telemetry.errors import StoreError
from lm_telemetry.merging import sort_keys
from lm_telemetry.queries import connect
from lm_telemetry.verify import verify

ROWS = "SELECT run_id, rank, attempt, step, loss FROM raw.steps ORDER BY ALL"


def files(store, pattern="*"):
    return sorted(p.name for p in (store.path / "steps/run_id=r/rank=0").glob(pattern))


def test_rows_are_the_same_and_sorted_in_one_file_of_each_table(store):
    fill(store, parts=5)
    done = compact(store, "r", 0, grace_seconds=0)
    assert (done.files_before, done.files_after, done.busy) == (10, 2, False)
    assert connect(store.path).execute(ROWS).fetchall() == written(5)
    layers = pq.read_table(store.path / "layers/run_id=r/rank=0/compact-1-0.parquet", partitioning=None)
    keys = [tuple(row[k] for k in sort_keys("layers")) for row in layers.to_pylist()]
    assert keys == sorted(keys)
    assert len(keys) == 5 * STEPS_A_PART * LAYERS
    assert verify(store.path, deep=True) == []


def test_what_was_replaced_is_deleted_only_after_the_grace(store):
    fill(store, parts=3)
    compact(store, "r", 0, grace_seconds=60)
    assert len(files(store, "part-*")) == 3
    assert delete_retired(store, "r", 0, grace_seconds=60) == 0
    assert delete_retired(store, "r", 0, grace_seconds=0) == 6
    assert files(store) == ["compact-1-0.parquet"]
    assert connect(store.path).execute(ROWS).fetchall() == written(3)


def test_what_was_merged_several_times_within_a_grace_is_one_file_in_the_end(store):
    for i in range(3):
        fill(store, parts=2, first=1 + 2 * i * STEPS_A_PART, seq=2 * i)
        compact(store, "r", 0, grace_seconds=60)
    assert len(files(store)) == 6
    delete_retired(store, "r", 0, grace_seconds=0)
    assert files(store) == [f"compact-{i}-0.parquet" for i in (1, 2, 3)]
    compact(store, "r", 0, grace_seconds=0)
    assert files(store) == ["compact-4-0.parquet"]
    assert connect(store.path).execute(ROWS).fetchall() == written(6)
    assert verify(store.path, deep=True) == []


def test_full_files_are_left_alone_and_hold_whole_parts(store):
    fill(store, parts=5)
    compact(store, "r", 0, grace_seconds=0, file_rows=2 * STEPS_A_PART)
    assert files(store, "compact-*") == [f"compact-1-{i}.parquet" for i in range(3)]
    fill(store, parts=2, first=1 + 5 * STEPS_A_PART, seq=5)
    compact(store, "r", 0, grace_seconds=0, file_rows=2 * STEPS_A_PART)
    delete_retired(store, "r", 0, grace_seconds=0)
    assert files(store) == ["compact-1-0.parquet", "compact-1-1.parquet", "compact-2-0.parquet", "compact-2-1.parquet"]
    assert connect(store.path).execute(ROWS).fetchall() == written(7)
    assert verify(store.path) == []


def test_attempts_are_merged_and_the_surviving_history_is_as_before(store):
    fill(store, parts=3)
    fill(store, attempt=1, parts=2, first=6)
    question = "SELECT attempt, step FROM steps ORDER BY ALL"
    before = connect(store.path).execute(question).fetchall()
    compact(store, "r", 0, grace_seconds=0)
    delete_retired(store, "r", 0, grace_seconds=0)
    assert connect(store.path).execute(question).fetchall() == before
    assert before == [(0, s) for s in range(1, 6)] + [(1, s) for s in range(6, 14)]


def test_a_second_compactor_leaves_the_rank_alone(store):
    fill(store, parts=3)
    directory = store.manifests("r") / "compaction"
    directory.mkdir()
    with locked(directory / ".rank=0.lock"):
        assert compact(store, "r", 0).busy
    assert not compact(store, "r", 0).busy


def test_what_a_killed_compactor_left_is_removed(store):
    fill(store, parts=3)
    compact(store, "r", 0, grace_seconds=60)
    manifest = store.manifests("r") / "compaction" / "rank=0.json"
    before = manifest.read_bytes()
    fill(store, parts=3, first=13, seq=3)
    compact(store, "r", 0, grace_seconds=60)
    manifest.write_bytes(before)  # as if it had been killed before its last act
    temporary = store.path / "steps/run_id=r/rank=0/.compact-3-0.parquet.9.tmp"
    temporary.write_bytes(b"half")
    assert connect(store.path).execute(ROWS).fetchall() == written(6)
    compact(store, "r", 0, grace_seconds=0)
    delete_retired(store, "r", 0, grace_seconds=0)
    assert files(store) == ["compact-2-0.parquet"]
    assert not temporary.exists()
    assert connect(store.path).execute(ROWS).fetchall() == written(6)
    assert verify(store.path) == []


@pytest.mark.parametrize("lost", ["the manifest of the compaction", "all manifests"])
def test_compacted_files_without_a_manifest_are_never_taken_for_leftovers(store, lost):
    fill(store, parts=3)
    compact(store, "r", 0, grace_seconds=0)
    delete_retired(store, "r", 0, grace_seconds=0)
    (store.manifests("r") / "compaction" / "rank=0.json").unlink()
    if lost == "all manifests":
        store.manifest_path("r", 0, 0).unlink()
    with pytest.raises(StoreError, match="verify --repair"):
        compact(store, "r", 0, grace_seconds=0)
    assert files(store) == ["compact-1-0.parquet"]


@pytest.mark.parametrize("damage", [b"", b"PAR1 and then nothing"])
def test_a_damaged_part_is_named_and_nothing_changes(store, damage):
    part = fill(store, parts=3).parts[2]
    (store.path / part.file).write_bytes(damage)
    with pytest.raises(StoreError, match="verify --repair") as caught:
        compact(store, "r", 0)
    assert caught.value.path == str(store.path / part.file)
    assert not (store.manifests("r") / "compaction" / "rank=0.json").exists()


def test_a_part_with_fewer_rows_than_acknowledged_is_not_merged(store):
    part = fill(store, parts=3).parts[0]
    path = store.path / part.file
    pq.write_table(pq.read_table(path, partitioning=None).slice(1), path)
    with pytest.raises(StoreError, match="4 rows were expected, 3 came"):
        compact(store, "r", 0)


@pytest.mark.parametrize("text", ["", "[]", '{"generation": 1, "replaces": {}, "files": {}, "retired": [{}]}'])
def test_a_broken_manifest_of_a_compaction_is_named(store, text):
    fill(store, parts=3)
    path = store.manifests("r") / "compaction" / "rank=0.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(StoreError) as caught:
        compact(store, "r", 0)
    assert caught.value.path == str(path)


def test_killing_a_compactor_at_any_moment_changes_no_answer(store):
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["store_children"])
    rng = random.Random(0)
    parts = 0
    for kill in range(10):
        fill(store, parts=20, first=1 + parts * STEPS_A_PART, seq=parts)
        parts += 20
        child = context.Process(target=compact_for_ever, args=(store.path, 0.05))
        child.start()
        time.sleep(0.1 + 0.15 * rng.random())
        child.kill()
        child.join()
        found = duckdb_count(store)
        assert found == (parts * STEPS_A_PART, parts * STEPS_A_PART), f"kill {kill}"
        assert {f.kind for f in verify(store.path)} <= {"temporary", "orphan"}
    compact(store, "r", 0, grace_seconds=0)
    delete_retired(store, "r", 0, grace_seconds=0)
    assert verify(store.path, deep=True) == []
    assert len(files(store)) == 1


def duckdb_count(store):
    return connect(store.path).execute("SELECT count(*), count(DISTINCT step) FROM steps").fetchone()


def test_reads_are_right_while_a_writer_writes_and_two_compactors_compact(store):
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["store_children"])
    acknowledged, ours = context.Pipe(duplex=False)
    children = [context.Process(target=write_for_ever, args=(store.path, ours, 0, 0.01))]
    children += [context.Process(target=compact_for_ever, args=(store.path, 2.0, 200)) for _ in range(2)]
    for child in children:
        child.start()
    ours.close()
    last, reads, wrong, merged, switched = acknowledged.recv(), 0, [], 0, False
    try:
        con = connect(store.path)
        while reads < 200 or (reads < 2000 and not has_visible_files(store)):
            while acknowledged.poll():
                last = acknowledged.recv()
            found = con.execute("SELECT count(*), sum(loss), count(DISTINCT step), max(step) FROM steps").fetchone()
            n = found[3]
            if n < last or found != (n, n * (n + 1) / 2, n, n):
                wrong.append((last, found))
            reads += 1
        merged = json.loads((store.manifests("r") / "compaction/rank=0.json").read_text())["generation"]
        switched = has_visible_files(store)
        assert all(child.is_alive() for child in children)
    finally:
        for child in children:
            child.kill()
            child.join()
    assert wrong == []
    assert merged > 3  # files were replaced while we read
    assert switched  # and some became visible to all readers


def has_visible_files(store):
    manifest = json.loads((store.manifests("r") / "compaction/rank=0.json").read_text())
    return any(not file["file"].startswith("_merged/") for file in manifest["files"]["steps"])


def test_duckdb_s_own_error_is_what_a_query_over_deleted_files_gets(store):
    # The reason for the grace: without it a query that has resolved its files fails, it does not answer short.
    fill(store, parts=3)
    con = connect(store.path)
    relation = con.sql("SELECT count(*) FROM steps")
    compact(store, "r", 0, grace_seconds=0)
    delete_retired(store, "r", 0, grace_seconds=0)
    with pytest.raises(duckdb.Error):
        relation.fetchall()
    assert con.execute("SELECT count(*) FROM steps").fetchone() == (12,)
