"""`lmt du`: rows, values, files and bytes, against what was written."""

import json

import pytest
from planted import plant

from lm_telemetry.cli import main
from lm_telemetry.compaction import compact
from lm_telemetry.store import Store


@pytest.fixture
def store(tmp_path):
    store = Store.open_for_writing(tmp_path / "store")
    for run_id in ("a", "b"):
        for first in (1, 11, 21):
            rows = [{"step": s, "loss": 1.0, "tokens": 8 if s % 2 else None} for s in range(first, first + 10)]
            plant(store, "steps", rows, run_id=run_id)
    plant(
        store,
        "sketches",
        [{"step": 1, "layer": 0, "site": "resid", "n_tokens": 3, "gram": [1.0, 2.0, 3.0]}],
        run_id="a",
    )
    return store


def du(store, capsys, *words):
    assert main(["du", *words, "--format", "json", "--store", str(store.path)]) == 0
    return {(row["run_id"], row["table"]): row for row in json.loads(capsys.readouterr().out)}


def on_disk(store, table, run_id, name="part-*"):
    """Bytes of these files, wherever in the store a compaction keeps them."""
    return sum(file.stat().st_size for file in store.path.glob(f"**/{table}/run_id={run_id}/*/{name}"))


def test_rows_values_and_bytes(store, capsys):
    found = du(store, capsys)
    assert set(found) == {("a", "steps"), ("b", "steps"), ("a", "sketches")}
    steps = found["a", "steps"]
    # A loss a step and tokens every other; step, attempt and time are keys.
    assert (steps["rows"], steps["values"], steps["parts"], steps["compacted"]) == (30, 45, 3, 0)
    assert steps["bytes"] == on_disk(store, "steps", "a")
    assert steps["bytes_per_value"] == pytest.approx(steps["bytes"] / 45)
    # A list counts as many as it holds; layer and site are keys.
    assert found["a", "sketches"]["values"] == 4


def test_a_compaction_is_seen_with_what_waits_to_be_deleted(store, capsys):
    before = on_disk(store, "steps", "a")
    compact(store, "a", 0)
    steps = du(store, capsys, "a")["a", "steps"]
    assert (steps["rows"], steps["values"], steps["parts"], steps["compacted"]) == (30, 45, 0, 1)
    assert (steps["bytes"], steps["waiting"]) == (on_disk(store, "steps", "a", "compact-*"), before)
    compact(store, "a", 0, grace_seconds=0)
    assert du(store, capsys, "a")["a", "steps"]["waiting"] == 0


def test_runs_may_be_chosen(store, capsys):
    assert set(du(store, capsys, "b")) == {("b", "steps")}
    assert main(["du", "c", "--store", str(store.path)]) == 1
    assert "there is no run c" in capsys.readouterr().err


def test_what_was_lost_is_told(store, capsys):
    for step in (1, 2):
        plant(store, "events", [{"step": step, "severity": "warning", "kind": "rows_dropped", "message": f"at {step}"}])
    plant(store, "events", [{"step": 1, "severity": "info", "kind": "other", "message": "quiet"}])
    assert main(["du", "--store", str(store.path)]) == 0
    out = capsys.readouterr().out
    assert "r: 2 x rows_dropped, last: at 2" in out
    assert "quiet" not in out
    assert "3 runs, 64 rows, " in out


def test_losses_are_told_of_the_chosen_runs_alone(store, capsys):
    for run_id in "ab":
        event = {"step": 1, "severity": "error", "kind": "spool_full", "message": run_id}
        plant(store, "events", [event], run_id=run_id)
    assert main(["du", "b", "--store", str(store.path)]) == 0
    out = capsys.readouterr().out
    assert "b: 1 x spool_full, last: b" in out
    assert "a: 1 x" not in out


def test_a_run_that_is_named_twice_counts_once(store, capsys):
    assert main(["du", "b", "b", "--store", str(store.path)]) == 0
    assert capsys.readouterr().out.count("│ b ") == 1


def test_a_file_that_no_manifest_lists_waits(store, capsys):
    directory = store.partition("steps", "a", 0)
    (directory / "part-0-7.parquet").write_bytes(b"x" * 100)
    (directory / ".part-0-8.parquet.1.tmp").write_bytes(b"x" * 1000)
    (directory.parent / "note").write_text("not a rank")
    found = du(store, capsys)
    assert (found["a", "steps"]["waiting"], found["b", "steps"]["waiting"]) == (100, 0)


def test_an_empty_store_takes_nothing(tmp_path, capsys):
    store = Store.open_for_writing(tmp_path / "empty")
    assert du(store, capsys) == {}
    assert main(["du", "--store", str(store.path)]) == 0
    assert "0 runs, 0 rows" in capsys.readouterr().out
