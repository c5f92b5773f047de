"""One run from its files: the values its own endpoint showed, read from few of them, and never counted twice."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from busy_store import busy_store
from planted import ask, plant
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from tiny_models import VOCAB, build
from transformers import Trainer, TrainingArguments

from lm_telemetry import TelemetryCallback
from lm_telemetry.columns import to_table
from lm_telemetry.compaction import compact
from lm_telemetry.exporters import captures
from lm_telemetry.exporters.holdings import Holdings
from lm_telemetry.exporters.server import PageServer
from lm_telemetry.exporters.stored import Choice, StoredRuns
from lm_telemetry.store import Manifest, Store

NOT_STORED = {
    "lm_telemetry_queue_captures": "waits in the writer's memory",
    "lm_telemetry_dropped_captures_total": "of the writer; an event tells of them",
    "lm_telemetry_dropped_rows_total": "of the writer; an event tells of them",
    "lm_telemetry_capture_failures_total": "of the writer; an event tells of each",
    "lm_telemetry_flush_failures_total": "of the writer; an event tells of them",
}
OWN = ("lm_telemetry_export_", "lm_telemetry_run_live")


@pytest.fixture
def store(tmp_path):
    return Store.open_for_writing(tmp_path / "store")


@pytest.fixture
def runs(store):
    told = []
    made = StoredRuns(Holdings(str(store.path), is_remote=False), Choice(), is_live=lambda *_: False, tell=told.append)
    yield made
    assert told == []
    assert made.failures.total() == 0


def samples(page):
    """Value by sample and labels, of what is about runs."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in parse(page.text.decode())
        for sample in family.samples
        if not family.name.startswith(OWN)
    }


def value(page, name, **labels):
    """The value of the one series with these labels; None if there is none."""
    wanted = {*labels.items()}
    found = [v for (n, *own), v in samples(page).items() if n == f"lm_telemetry_{name}" and wanted <= {*own}]
    assert len(found) < 2, found
    return found[0] if found else None


def exemplars(page):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.exemplar
        for family in parse_openmetrics(page.openmetrics.decode())
        for sample in family.samples
        if sample.exemplar
    }


def train(tmp_path, store, max_steps, resume=None):
    torch.manual_seed(0)
    ids = torch.randint(3, VOCAB, (32, 12), generator=torch.Generator().manual_seed(0))
    arguments = {"output_dir": str(tmp_path / "out"), "save_steps": 4, "max_steps": max_steps, "report_to": []}
    instruments = {"activations": {}, "attention": {}, "parameters": {}, "critical_sharpness": {"every": 5}}
    trainer = Trainer(
        model=build("llama"),
        args=TrainingArguments(**arguments, per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[
            TelemetryCallback(
                store=str(store.path),
                run_id="twin",
                every=3,
                instruments=instruments,
                prometheus_port=0,
                max_overhead=1.0,
                flush_seconds=0.05,
            )
        ],
    )
    trainer.train(resume_from_checkpoint=resume)


def test_a_run_shows_what_its_own_endpoint_showed(tmp_path, store, runs, monkeypatch):
    pages = []
    monkeypatch.setattr(PageServer, "publish", lambda _, page: pages.append(page))
    train(tmp_path, store, 10)
    ours = runs.poll()
    described = [
        {f.name: (f.type, f.documentation, f.unit) for f in parse_openmetrics(page.openmetrics.decode())}
        for page in (pages[-1], ours)
    ]
    expected, found = samples(pages[-1]), samples(ours)
    for name in NOT_STORED:
        assert described[0].pop(name.removesuffix("_total"))
        expected = {key: v for key, v in expected.items() if key[0] != name}
    assert {n: d for n, d in described[1].items() if not n.startswith(OWN)} == described[0]
    assert found.keys() == expected.keys()
    assert {name for name, *_ in found} >= {"lm_telemetry_heads_entropy", "lm_telemetry_curvature_value"}
    for key, there in expected.items():
        # a sum of floats depends on their order; ours are sums of integers
        tolerance = 1e-9 if key[0].endswith("_seconds_total") else 0
        assert found[key] == pytest.approx(there, rel=tolerance, abs=tolerance, nan_ok=True), key
    assert exemplars(ours) == exemplars(pages[-1])
    assert exemplars(ours)


def test_of_a_resumed_run_the_counters_go_on_and_the_values_are_those_that_survived(tmp_path, store, runs, monkeypatch):
    pages = []
    monkeypatch.setattr(PageServer, "publish", lambda _, page: pages.append(page))
    train(tmp_path, store, 6)
    before, first = samples(runs.poll()), samples(pages[-1])
    train(tmp_path, store, 8, resume=str(tmp_path / "out" / "checkpoint-4"))
    after, second = samples(runs.poll()), samples(pages[-1])
    counters = [key for key in before if key[0].endswith("_total")]
    assert counters
    assert all(after[key] >= before[key] for key in counters)
    for key in second.keys() & after.keys():
        if key[0].endswith("_total"):
            assert after[key] == pytest.approx(second[key] + first.get(key, 0), rel=1e-9), key
        else:
            assert after[key] == pytest.approx(second[key], rel=0, nan_ok=True), key


LABELS = {
    "steps": [],
    "layers": ["stack", "layer", "site"],
    "curvature": ["operator", "scope", "estimator", "index"],
}


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """A store that has seen everything, and its page."""
    store = busy_store(tmp_path_factory.mktemp("busy") / "store")
    runs = StoredRuns(Holdings(str(store.path), is_remote=False), Choice(), is_live=lambda *_: False, tell=print)
    page = runs.poll()
    assert runs.failures.total() == 0
    return store, page


@pytest.mark.parametrize("table", LABELS)
def test_each_series_has_its_last_value_that_is_not_null(busy, table):
    store, page = busy
    latest = {}
    for row in ask(store, f"FROM {table} ORDER BY run_id, rank, step, attempt"):
        for name in captures.exported_columns(table):
            if row[name] is not None:
                own = {n: "other" if row[n] is None else str(row[n]) for n in ("run_id", "rank", *LABELS[table])}
                latest[name, *own.items()] = float(row[name])
    assert len(latest) > 10
    shown = {(name, frozenset(own)): v for (name, *own), v in samples(page).items()}
    for (name, *own), there in latest.items():
        found = shown[f"lm_telemetry_{table}_{name}", frozenset(own)]
        assert found == pytest.approx(there, nan_ok=True), (name, own)


def test_counters_are_sums_over_all_launches(busy):
    store, page = busy
    counted = ask(store, "SELECT run_id, rank, severity, count(*) AS n FROM raw.events GROUP BY ALL")
    finite = "sum(seconds) FILTER (isfinite(seconds))"
    spent = ask(store, f"SELECT run_id, rank, instrument, {finite} AS s FROM raw.overhead GROUP BY ALL")
    assert counted
    assert spent
    for row in counted:
        own = {name: str(row[name]) for name in ("run_id", "rank", "severity")}
        assert value(page, "events_total", **own) == row["n"]
    for row in spent:
        own = {name: str(row[name]) for name in ("run_id", "rank", "instrument")}
        assert value(page, "overhead_seconds_total", **own) == pytest.approx(row["s"])


def many_parts(store, n=40):
    for step in range(1, n + 1):
        plant(store, "steps", [{"step": step, "loss": float(step), "update_norm": 7.0 if step == 1 else None}])
        plant(store, "layers", [{"step": step, "stack": "decoder", "layer": 0, "site": "resid", "rms": float(step)}])


def test_only_the_last_files_are_read(store, runs, monkeypatch):
    monkeypatch.setattr(captures, "REACH", ((10, 3), (10, 3)))
    many_parts(store)
    for seq in range(37):
        (store.path / f"layers/run_id=r/rank=0/part-0-{seq}.parquet").write_bytes(b"damaged")
    page = runs.poll()
    assert value(page, "layers_rms") == 40
    assert value(page, "last_step", table="layers") == 40


def test_a_value_from_long_ago_is_looked_for_farther_back_and_not_for_ever(store, runs, monkeypatch):
    many_parts(store)
    monkeypatch.setattr(captures, "REACH", ((5, 5), (50, 50)))
    assert value(runs.poll(), "steps_update_norm") == 7
    other = StoredRuns(Holdings(str(store.path), is_remote=False), Choice(), is_live=lambda *_: False, tell=print)
    monkeypatch.setattr(captures, "REACH", ((5, 5), (20, 50)))
    page = other.poll()
    assert (value(page, "steps_update_norm"), value(page, "steps_loss")) == (None, 40)


def test_new_files_are_added_and_null_leaves_what_was_there(store, runs):
    plant(store, "steps", [{"step": 1, "loss": 3.0, "grad_norm": 0.5, "seconds": 0.25}])
    assert value(runs.poll(), "steps_loss") == 3
    plant(store, "steps", [{"step": 2, "loss": 2.0, "seconds": 0.5}])
    page = runs.poll()
    assert [value(page, f"steps_{n}") for n in ("loss", "grad_norm", "seconds")] == [2, 0.5, 0.5]
    assert value(page, "run_seconds_total") == 0.75
    assert value(page, "written_rows_total") == 2
    sizes = [path.stat().st_size for path in store.path.glob("steps/**/*.parquet")]
    assert value(page, "written_bytes_total") == sum(sizes)


def test_parts_in_sealed_lists_and_lost_ones_are_written_ones(store, runs, monkeypatch):
    monkeypatch.setattr("lm_telemetry.store.SEAL_AFTER", 2)
    manifest = Manifest(run_id="r", rank=0, attempt=0)
    for seq in range(5):
        rows = to_table("steps", {"loss": [1.0] * (seq + 1)}, attempt=0, step=seq + 1, time_us=seq)
        part = store.write_part(rows, table="steps", run_id="r", rank=0, attempt=0, seq=seq)
        (manifest.lost if seq == 3 else manifest.parts).append(part)
        store.write_manifest(manifest)
    assert len(manifest.sealed) == 2
    for _ in range(2):
        assert value(runs.poll(), "written_rows_total") == 1 + 2 + 3 + 4 + 5
        store.write_manifest(manifest)


def test_a_compaction_changes_nothing_to_the_last_bit(store, runs):
    draw = random.Random(0)
    for step in range(1, 60):
        plant(store, "steps", [{"step": step, "seconds": draw.random(), "telemetry_seconds": draw.random() / 100}])
        plant(store, "overhead", [{"step": step, "instrument": "agent", "seconds": draw.random() / 1000}])
        plant(store, "events", [{"step": step, "severity": draw.choice(["info", "bad"]), "kind": "k"}])
        if step == 30:
            before = runs.poll()
            assert compact(store, "r", 0, grace_seconds=0).files_after == 3
            assert samples(runs.poll()) == samples(before)
    before = runs.poll()
    compact(store, "r", 0, grace_seconds=0)
    fresh = StoredRuns(Holdings(str(store.path), is_remote=False), Choice(), is_live=lambda *_: False, tell=print)
    assert samples(runs.poll()) == samples(before) == samples(fresh.poll())
    assert exemplars(runs.poll()) == exemplars(before) == exemplars(fresh.poll())


def test_of_launches_without_manifests_the_rows_tell_what_survived(store, runs):
    for attempt, steps in ((0, range(1, 6)), (1, range(3, 5))):
        for s in steps:
            row = {"step": s, "loss": s + 10.0 * attempt, "seconds": 1.0, "grad_norm": None if attempt else float(s)}
            plant(store, "steps", [row], attempt=attempt)
    shutil.rmtree(store.path / "_manifests")
    page = runs.poll()
    assert [value(page, f"steps_{n}") for n in ("loss", "grad_norm")] == [14, 2]
    assert value(page, "run_seconds_total") == 7
    assert value(page, "written_rows_total") is None


def test_values_that_a_resume_overtakes_between_two_polls_go_back_to_those_that_survive(store, runs):
    for step in range(1, 6):
        plant(store, "steps", [{"step": step, "loss": float(step), "grad_norm": float(step), "seconds": 1.0}])
    assert value(runs.poll(), "steps_grad_norm") == 5
    plant(store, "steps", [{"step": 3, "loss": 30.0, "seconds": 1.0}], attempt=1)
    page = runs.poll()
    assert [value(page, f"steps_{n}") for n in ("loss", "grad_norm")] == [30, 2]
    assert value(page, "run_seconds_total") == 6


def test_a_file_with_older_captures_that_comes_late_changes_counters_alone(store, runs):
    for step in (1, 2, 3):
        plant(store, "steps", [{"step": step, "loss": float(step), "seconds": 1.0}])
    directory = store.partition("steps", "r", 0)
    shutil.rmtree(store.path / "_manifests")
    late = (directory / "part-0-1.parquet").rename(store.path / "late")
    assert value(runs.poll(), "steps_loss") == 3
    late.rename(directory / "part-0-1.parquet")
    page = runs.poll()
    assert [value(page, name) for name in ("steps_loss", "last_step", "run_seconds_total")] == [3, 3, 3]


def test_a_run_that_begins_anew_under_its_name_is_a_new_one(store, runs):
    for step in (100, 200):
        plant(store, "steps", [{"step": step, "loss": 1.0, "grad_norm": 1.0, "seconds": 1.0}])
    runs.poll()
    for directory in ("steps", "_manifests"):
        shutil.rmtree(Path(store.path) / directory / "run_id=r")
    plant(store, "steps", [{"step": 1, "loss": 9.0, "seconds": 0.5}])
    page = runs.poll()
    assert [value(page, name) for name in ("steps_loss", "steps_grad_norm", "run_seconds_total")] == [9, None, 0.5]


def test_heads_are_summarised_as_by_the_endpoint(store, runs):
    heads = [
        {"step": 5, "stack": "decoder", "layer": 0, "kind": "self", "head": h, "entropy": e, "sink_mass": None}
        for h, e in enumerate([0.5, 1.0, 3.0])
    ]
    plant(store, "heads", [{**row, "step": 4, "sink_mass": 0.25} for row in heads])
    plant(store, "heads", heads)
    page = runs.poll()
    stats = {stat: value(page, "heads_entropy", stat=stat) for stat in ("mean", "p90", "max", "min")}
    assert stats == {"mean": 1.5, "p90": pytest.approx(2.6), "max": 3.0, "min": 0.5}
    assert value(page, "heads_sink_mass", stat="mean") == 0.25
