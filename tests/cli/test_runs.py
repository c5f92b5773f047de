"""`lmt runs`: how far runs got, which are live, how large they are."""

import json
import os

import pytest
from planted import plant

from lm_telemetry.cli import main
from lm_telemetry.liveness import hold
from lm_telemetry.store import Store


@pytest.fixture
def two(tmp_path):
    """A store with a run of two ranks and two attempts, and one that has begun and written nothing."""
    store = Store.open_for_writing(tmp_path / "store")
    for rank in (0, 1):
        plant(
            store, "steps", [{"step": s, "loss": 2.0 + rank, "tokens": 8} for s in range(1, 5)], run_id="a", rank=rank
        )
        rows = [{"step": s, "loss": 1.0 + rank, "tokens": 8} for s in range(3, 7)]
        plant(store, "steps", rows, run_id="a", rank=rank, attempt=1)
    store.claim_attempt("b")
    return store


def runs(store, capsys):
    assert main(["runs", "--format", "json", "--store", str(store.path)]) == 0
    return {run["run_id"]: run for run in json.loads(capsys.readouterr().out)}


def test_a_run_is_one_row(two, capsys):
    found = runs(two, capsys)
    assert set(found) == {"a", "b"}
    a = found["a"]
    assert (a["attempts"], a["ranks"], a["last_step"], a["last_loss"], a["tokens"]) == (2, 2, 6, 1.5, 96)
    files = list(two.path.glob("steps/run_id=a/**/*.parquet"))
    assert (a["files"], a["bytes"]) == (4, sum(file.stat().st_size for file in files))
    assert (found["b"]["last_step"], found["b"]["files"], found["b"]["bytes"]) == (None, 0, 0)


def test_a_run_is_live_while_its_lock_is_held(two, capsys):
    # Written a moment ago by this host, and nobody holds it.
    assert runs(two, capsys)["a"]["state"] == "finished"
    descriptor = hold(two.manifests("a") / "attempt=1")
    assert descriptor is not None
    try:
        assert runs(two, capsys)["a"]["state"] == "live"
    finally:
        os.close(descriptor)


def test_the_size_of_files_that_no_manifest_lists_is_from_the_disk(store, capsys):
    (first,) = runs(store, capsys).values()
    assert first["bytes"] == sum(file.stat().st_size for file in store.path.glob("steps/**/*.parquet"))
    assert (first["run_id"], first["last_step"], first["tokens"], first["last_loss"]) == ("first", 3, 30, "NaN")


def test_people_get_a_box(two, capsys):
    assert main(["runs", "--store", str(two.path)]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("│ a "))
    assert [cell.strip() for cell in row.split("│")][1:8] == [
        "a",
        "finished",
        "1970-01-01 00:00",
        "2",
        "2",
        "NULL",
        "6",
    ]


def test_a_store_at_an_url(two, capsys):
    pytest.importorskip("fsspec", reason="stores at URLs take fsspec")
    here = runs(two, capsys)
    assert main(["runs", "--format", "json", "--store", f"file://{two.path}"]) == 0
    there = {run["run_id"]: run for run in json.loads(capsys.readouterr().out)}
    # Planted in 1970, it is not live; the run that has written nothing has left no file to find it by.
    assert there == {"a": here["a"]}
