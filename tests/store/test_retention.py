"""Old runs go as a whole, oldest first; what is live, newest or kept stays, and readers see a run or do not."""

import os
import shutil
import time

import pytest
from store_trees import fill

from lm_telemetry.compaction import compact, delete_retired
from lm_telemetry.errors import StoreError
from lm_telemetry.queries import connect
from lm_telemetry.repair import repair
from lm_telemetry.retention import prune
from lm_telemetry.verify import verify
from lm_telemetry.visibility import visible

DAY = 86_400


def age(store, run_id, days):
    """As if the run had been written to that long ago."""
    then = time.time() - days * DAY
    for path in store.path.rglob("*"):
        if f"run_id={run_id}" in str(path):
            os.utime(path, (then, then))


@pytest.fixture
def runs(store):
    """Runs that are 40, 30, 20 and 10 days old, and their size."""
    for i, run_id in enumerate(["a", "b", "c", "d"]):
        fill(store, run_id=run_id, parts=2)
        age(store, run_id, 40 - 10 * i)
    return store


def names(store):
    return [run for (run,) in connect(store.path).execute("SELECT DISTINCT run_id FROM steps ORDER BY 1").fetchall()]


def pruned(store, **options):
    return [run.run_id for run in prune(store, **options)]


def test_runs_past_an_age_go_oldest_first(runs):
    assert pruned(runs, max_age_days=25, dry_run=True) == ["a", "b"]
    assert names(runs) == ["a", "b", "c", "d"]
    assert pruned(runs, max_age_days=25) == ["a", "b"]
    assert names(runs) == ["c", "d"]
    assert pruned(runs, max_age_days=25) == ["a", "b"]  # waiting for their grace


def test_the_oldest_go_until_the_rest_fit(runs):
    sizes = {run.run_id: run.bytes for run in prune(runs, max_bytes=0, dry_run=True)}
    assert list(sizes) == ["a", "b", "c"]
    total = sum(sizes.values()) + sizes["a"]
    assert pruned(runs, max_bytes=total - sizes["a"] - 1, dry_run=True) == ["a", "b"]
    assert pruned(runs, max_bytes=total, dry_run=True) == []


def test_the_newest_and_those_to_keep_stay(runs):
    assert pruned(runs, max_age_days=0, max_bytes=0, keep=["b"]) == ["a", "c"]
    assert names(runs) == ["b", "d"]


def test_a_live_run_stays_however_old(runs, make_writer):
    make_writer(run_id="a", attempt=0)
    assert pruned(runs, max_age_days=0) == ["b", "c"]


def test_readers_lose_a_run_at_once_and_its_files_go_a_grace_later(runs):
    con = connect(runs.path)
    relation = con.sql("SELECT count(*) FROM steps")
    first = prune(runs, max_age_days=35)
    assert [(run.run_id, run.deleted) for run in first] == [("a", False)]
    assert relation.fetchall() == [(32,)]  # begun before, and answered in full
    assert con.execute("SELECT count(*) FROM steps").fetchone() == (24,)
    (again,) = prune(runs, grace_seconds=0)
    assert (again.run_id, again.deleted) == ("a", True)
    assert list(runs.path.glob("*/run_id=a")) == []
    assert prune(runs) == []
    assert con.execute("SELECT count(*) FROM steps").fetchone() == (24,)
    assert verify(runs.path) == []


def test_a_deletion_that_was_cut_short_is_not_seen_and_goes_on(runs):
    prune(runs, max_age_days=35)
    for table in ("steps", "layers"):
        shutil.rmtree(runs.path / table / "run_id=a")
    shutil.rmtree(runs.path / "_manifests" / "run_id=a" / "attempt=0")
    assert names(runs) == ["b", "c", "d"]
    assert verify(runs.path) == []
    assert repair(runs.path) == []
    assert runs.claim_attempt("a") == 1  # and not 0, which would be given up
    shutil.rmtree(runs.path / "_manifests" / "run_id=a" / "attempt=1")
    assert [run.deleted for run in prune(runs, grace_seconds=0)] == [True]
    assert list(runs.path.glob("*/run_id=a")) == []


def test_a_run_that_is_launched_again_before_it_is_deleted_is_kept(runs):
    prune(runs, max_age_days=35)
    attempt = runs.claim_attempt("a")
    fill(runs, run_id="a", attempt=attempt, parts=1, first=9)
    assert prune(runs, grace_seconds=0) == []
    assert connect(runs.path).execute("SELECT count(*) FROM raw.steps WHERE run_id = 'a'").fetchone() == (12,)


def test_hidden_files_go_with_their_run_and_count_once(runs):
    compact(runs, "a", 0)
    files = [p for p in runs.path.rglob("*") if p.is_file() and "run_id=a" in str(p)]
    size = sum(p.stat().st_size for p in files)
    assert [p.suffix for p in files].count(".merged") == 2
    (run,) = prune(runs, max_age_days=35, dry_run=True)
    assert (run.run_id, run.bytes) == ("a", size)
    for hidden in (runs.path / "_merged").rglob("*.merged"):
        (runs.path / visible(str(hidden.relative_to(runs.path)))).hardlink_to(hidden)
    (run,) = prune(runs, max_age_days=35, dry_run=True)
    assert run.bytes == size
    prune(runs, max_age_days=35, grace_seconds=0)
    assert list(runs.path.rglob("run_id=a")) == []


def test_a_run_that_was_given_up_is_left_hidden(runs):
    compact(runs, "a", 0)
    prune(runs, max_age_days=35)
    assert delete_retired(runs, "a", 0, grace_seconds=0) == 0
    assert list(runs.path.glob("*/run_id=a/rank=0/compact-*")) == []


def test_a_run_that_was_given_up_is_not_compacted(runs):
    prune(runs, max_age_days=35)
    done = compact(runs, "a", 0)
    assert (done.files_after, done.busy) == (0, False)
    assert list(runs.path.rglob("run_id=a/rank=0/compact-*")) == []


def test_a_broken_mark_is_named_and_put_aside(runs):
    mark = runs.manifests("a") / "pruned.json"
    mark.write_text("{")
    with pytest.raises(StoreError, match="verify --repair") as caught:
        connect(runs.path)
    assert caught.value.path == str(mark)
    assert [f.severity for f in verify(runs.path)] == ["error"]
    assert [action.kind for action in repair(runs.path)] == ["quarantined"]
    assert names(runs) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("limit", [{"max_age_days": -1}, {"max_bytes": -1}])
def test_a_negative_limit_is_refused(store, limit):
    with pytest.raises(ValueError, match="0 or more"):
        prune(store, **limit)
