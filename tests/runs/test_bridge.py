"""The bridge to other trackers: what they get is what SQL says of the store, and what they do cannot hurt the run."""

from __future__ import annotations

import json
import math
import sqlite3
import struct
import subprocess
import sys
import threading
from contextlib import closing

import pyarrow as pa
import pytest
import torch
from accelerate.tracking import GeneralTracker, WandBTracker
from stored import events, rows
from tiny_models import batch, build, dataset
from transformers import Trainer, TrainingArguments

from lm_telemetry import Settings, TelemetryCallback, bridge, observe, session
from lm_telemetry.bridge import Bridge, scalars
from lm_telemetry.errors import SettingsError
from lm_telemetry.queries import connect
from lm_telemetry.schema import schema
from lm_telemetry.writer import WriterStats

ALL = {name: {"every": 2} for name in ("activations", "attention", "parameters", "sharpness", "critical_sharpness")}


class Recorder(GeneralTracker):
    """The host's own tracker, which is live already."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.logged = {}
        self.calls = []

    @property
    def tracker(self):
        return self.logged

    def start(self):
        self.calls.append("start")

    def log(self, values, step=None, **kwargs):
        assert all(type(value) is float for value in values.values())
        self.logged.setdefault(step, {}).update(values)

    def finish(self):
        self.calls.append("finish")


class Raising(Recorder):
    name = "raising"

    def log(self, values, step=None, **kwargs):
        raise ConnectionError("no way out")


class Blocking(Recorder):
    name = "blocking"
    released = threading.Event()

    def log(self, values, step=None, **kwargs):
        self.released.wait(60)


def train(store, steps=5, **settings):
    """A short loop; the run's name."""
    model = build("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"instruments": ALL, "strict": True} | settings
    with observe(model, optimizer=optimizer, store=store, **settings) as running:
        for seed in range(steps):
            loss = model(**batch(seed)).loss
            loss.backward()
            optimizer.step()
            running.step(loss=loss)
            optimizer.zero_grad()
        return running.run_id


QUERIES = [
    """UNPIVOT (SELECT step, loss, learning_rate, grad_norm, update_norm, param_norm, tokens::DOUBLE AS tokens,
        seconds, telemetry_seconds FROM steps) ON COLUMNS(* EXCLUDE step)""",
    """UNPIVOT (SELECT step, concat_ws('/', 'decoder', layer, site) AS place, mean, std, rms, absmax, kurtosis,
        zero_fraction, outlier_fraction, nonfinite::FLOAT AS nonfinite FROM layers)
    ON COLUMNS(* EXCLUDE (step, place))""",
    """SELECT step, name, concat_ws('/', 'decoder', layer, 'self') AS place, unnest(['mean', 'p90', 'max']) AS stat,
        unnest([avg(value), quantile_cont(value, 0.9), max(value)]) AS value
    FROM (UNPIVOT (SELECT step, layer, entropy, normalized_entropy, lse, max_logit, sink_mass, prev_token_mass,
        local_mass, induction_score, output_norm FROM heads) ON COLUMNS(* EXCLUDE (step, layer)))
    GROUP BY step, name, layer""",
    """SELECT step, name, concat_ws('/', 'decoder', layer, 'self') AS place, 'min' AS stat, min(value) AS value
    FROM (UNPIVOT (SELECT step, layer, entropy, normalized_entropy FROM heads) ON COLUMNS(* EXCLUDE (step, layer)))
    GROUP BY step, name, layer""",
    """SELECT step, name, coalesce(stack || '/' || layer, 'outside') AS place,
        sqrt(sum(value::DOUBLE ** 2)) AS value
    FROM (UNPIVOT (SELECT step, stack, layer, norm, grad_norm, update_norm FROM params)
        ON COLUMNS(* EXCLUDE (step, stack, layer)))
    GROUP BY ALL""",
    """SELECT step, 'update_ratio' AS name, coalesce(stack || '/' || layer, 'outside') AS place,
        unnest(['max', 'mean']) AS stat, unnest([max(update_ratio), avg(update_ratio)]) AS value
    FROM params GROUP BY step, stack, layer""",
    """UNPIVOT (SELECT step, concat_ws('/', operator, estimator, index) AS place, value AS estimate, residual,
        converged::INT::DOUBLE AS converged, threshold FROM curvature WHERE scope = 'all')
    ON COLUMNS(* EXCLUDE (step, place))""",
    """UNPIVOT (SELECT step, instrument AS place, seconds, captures::DOUBLE AS captures FROM overhead)
    ON COLUMNS(* EXCLUDE (step, place))""",
]
TABLES = ("steps", "layers", "heads", "heads", "params", "params", "curvature", "overhead")


def expected(store):
    """Value by step and name, as SQL has it."""
    found = {}
    with connect(store) as connection:
        for table, query in zip(TABLES, QUERIES, strict=True):
            asked = connection.execute(query)
            names = [name for name, *_ in asked.description]
            for values in asked.fetchall():
                row = dict(zip(names, values, strict=True))
                column = "value" if row["name"] == "estimate" else row["name"]
                parts = (table, row.get("place"), column, row.get("stat"))
                if row["value"] is not None:
                    found.setdefault(row["step"], {})["/".join(filter(None, parts))] = row["value"]
    return found


def assert_same(got, wanted, *, rel=1e-6):
    assert got.keys() == wanted.keys()
    for step, values in wanted.items():
        assert got[step].keys() == values.keys()
        assert got[step] == pytest.approx(values, rel=rel, nan_ok=True)


def tensorboard(directory):
    """Value by step and name, as TensorBoard reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    accumulator.Reload()
    found = {}
    for tag in accumulator.Tags()["scalars"]:
        for event in accumulator.Scalars(tag):
            found.setdefault(event.step, {})[tag] = event.value
    return found


def test_trackers_get_what_the_store_has(store):
    recorder = Recorder()
    run_id = train(store, forward_to=["tensorboard", recorder])
    wanted = expected(store)
    assert {1, 2, 3, 4, 5} <= wanted.keys()
    assert {name.partition("/")[0] for values in wanted.values() for name in values} == set(TABLES)
    assert_same(recorder.logged, wanted)
    assert_same(tensorboard(f"{store}-tensorboard/{run_id}"), wanted)  # which keeps 32 bits
    assert recorder.calls == []  # it is the host's to begin and to end
    assert not [event for event in events(store) if event["severity"] != "info"]


def test_no_accelerate_state_is_made(store):
    program = f"""
import sys; sys.path.insert(0, "tests/support")
import torch
from accelerate.state import PartialState
from tiny_models import batch, build
from lm_telemetry import observe
model = build("llama")
with observe(model, store={store!r}, forward_to="tensorboard", instruments=["activations"]) as running:
    model(**batch()).loss.backward()
    running.step()
assert PartialState._shared_state == {{}}
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    (run,) = {row["run_id"] for row in rows(store, "steps")}
    assert "steps/loss" in tensorboard(f"{store}-tensorboard/{run}")[1]
    assert not events(store, "observer_failed")


def test_a_trainer_forwards_by_name(tmp_path, store):
    telemetry = TelemetryCallback(store=store, forward_to=["tensorboard"], strict=True)
    arguments = TrainingArguments(str(tmp_path / "out"), max_steps=3, report_to=[], use_cpu=True, save_strategy="no")
    Trainer(build("llama"), arguments, train_dataset=dataset(), callbacks=[telemetry]).train()
    (run,) = rows(store, "runs")
    got = tensorboard(f"{store}-tensorboard/{run['run_id']}")
    assert [got[step]["steps/loss"] for step in (1, 2, 3)] == pytest.approx([r["loss"] for r in rows(store, "steps")])
    assert json.loads(run["settings"])["forward_to"] == ["tensorboard"]


def test_a_tracker_that_raises_is_told_of_once_and_hurts_no_other(store):
    recorder = Recorder()
    train(store, forward_to=[Raising(), recorder])
    (event,) = events(store, "observer_failed")
    assert "raising, which scalars are forwarded to, raised ConnectionError: no way out" in event["message"]
    assert_same(recorder.logged, expected(store))


def test_a_tracker_that_cannot_be_opened_is_told_of(store, tmp_path):
    (tmp_path / "store-tensorboard").write_text("a file where a directory is to be")
    train(store, forward_to="tensorboard")
    (event,) = events(store, "observer_failed")
    assert event["message"].startswith("tensorboard, which scalars are forwarded to, raised")
    assert len(rows(store, "steps")) == 5


def test_a_tracker_that_blocks_holds_nobody_up(store, monkeypatch):
    monkeypatch.setattr(bridge, "MAX_WAITING", 20)
    monkeypatch.setattr(session, "FORWARD_SECONDS", 0.5)
    blocking, recorder = Blocking(), Recorder()
    try:
        train(store, forward_to=[blocking, recorder], flush_seconds=0.01, steps=8)
        told = [(e["kind"], json.loads(e["fields"])) for e in events(store) if e["kind"].startswith("forward_")]
        assert [kind for kind, fields in told if fields["tracker"] == "blocking"] == ["forward_dropped", "forward_left"]
        assert next(fields for kind, fields in told if kind == "forward_left")["dropped"] > 0
        assert recorder.logged
        assert len(rows(store, "steps")) == 8
    finally:
        blocking.released.set()


def test_other_ranks_do_not_forward(store, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    recorder = Recorder()
    train(store, forward_to=[recorder])
    assert recorder.logged == {}
    assert rows(store, "steps", rank=1)


def test_names_are_bounded(monkeypatch):
    monkeypatch.setattr(bridge, "MAX_NAMES", 2)
    told, recorder = [], Recorder()
    forwarding = Bridge([recorder], run_id="r", base="b", tell=lambda *words, **fields: told.append((words, fields)))
    for step in (1, 2):
        forwarding.observe("steps", table("steps", [{"step": step, "loss": 1.0, "grad_norm": 2.0, "seconds": 0.5}]))
    forwarding.flushed(WriterStats())
    assert forwarding.close(5)
    assert recorder.logged == {step: {"steps/loss": 1.0, "steps/grad_norm": 2.0} for step in (1, 2)}
    assert [words[:2] for words, _ in told] == [("info", "forward_limited")]


def table(name, found):
    return pa.Table.from_pylist(found, schema=schema(name))


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"operator": "hessian", "scope": "all", "estimator": "lanczos", "index": 1}, "hessian/lanczos/1"),
        ({"operator": "hessian", "scope": "decoder.3", "estimator": "block_lanczos", "index": 0},
         "hessian/decoder.3/block_lanczos/0"),
        ({"operator": "hessian", "scope": "all", "estimator": "hutch++", "index": None}, "hessian/hutchpp"),
        ({"operator": "a b", "scope": "c:d/é", "estimator": "", "index": None}, "a_b/c_d__/"),
    ],
)  # fmt: skip
def test_names(row, name):
    found = dict(scalars("curvature", table("curvature", [row | {"value": math.nan, "residual": None}])))
    assert list(found) == [f"curvature/{name}/value"]
    assert math.isnan(found[f"curvature/{name}/value"])


@pytest.mark.parametrize("given", ["tensorbored", ["tensorboard", 3], object()])
def test_trackers_that_do_not_exist_are_refused(given):
    with pytest.raises(SettingsError, match=r"forward_to: expected names of trackers \(aim, .*wandb\)") as caught:
        Settings(forward_to=given)
    assert caught.value.setting == "forward_to"


def test_a_tracker_that_is_not_installed_is_refused_with_its_package(monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(SettingsError, match=r"comet_ml is not installed.*; pip install comet-ml"):
        Settings(forward_to="comet_ml")


@pytest.mark.parametrize(
    ("given", "meant"),
    [(None, ()), ((), ()), ("tensorboard", ("tensorboard",)), (["tensorboard"] * 2, ("tensorboard",))],
)
def test_one_or_several_or_none(given, meant):
    assert Settings(forward_to=given).forward_to == meant


def test_the_environment_names_trackers(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LM_TELEMETRY_FORWARD_TO", "tensorboard")
    assert Settings.resolve().forward_to == ("tensorboard",)


@pytest.mark.trackers
def test_mlflow_gets_the_same(store, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    run_id = train(store, forward_to="mlflow")
    (run,) = mlflow.search_runs(experiment_names=["lm-telemetry"], output_format="list")
    assert (run.info.run_name, run.info.status) == (run_id, "FINISHED")
    got = {}
    for name in run.data.metrics:
        for point in mlflow.MlflowClient().get_metric_history(run.info.run_id, name):
            got.setdefault(point.step, {})[name] = point.value
    assert_same(got, expected(store))


@pytest.mark.trackers
def test_trackio_gets_the_same(store, tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="trackio is not installed")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path)
    run_id = train(store, forward_to="trackio")
    with closing(sqlite3.connect(tmp_path / "lm-telemetry.db")) as database:
        logged = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert {name for name, *_ in logged} == {run_id}
    got = {}
    for _, step, metrics in logged:
        got.setdefault(step, {}).update(json.loads(metrics))
    assert_same(got, expected(store))


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    found = pytest.importorskip("wandb", reason="wandb is not installed")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    return found


@pytest.mark.trackers
def test_wandb_gets_the_same(store, tmp_path, wandb):
    train(store, forward_to="wandb")
    assert wandb.run is None  # ours is finished
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert_same(wandb_history(file, "_step"), expected(store))


@pytest.mark.trackers
def test_a_live_wandb_run_is_used_on_an_axis_of_its_own(store, tmp_path, wandb):
    with wandb.init(project="host", dir=str(tmp_path)) as host:
        host.log({"train/loss": 1.0})
        train(store, forward_to="wandb")
        assert wandb.run is host
        assert not events(store, "observer_failed")
        host.log({"train/loss": 2.0})
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert_same(wandb_history(file, "lm_telemetry/step"), expected(store))
    assert {row["train/loss"] for row in wandb_history(file, "_step", "").values() if "train/loss" in row} == {1.0, 2.0}


@pytest.mark.trackers
def test_a_wandb_tracker_of_a_host_that_counts_steps_loses_none_of_its_rows(store, tmp_path, wandb):
    host = WandBTracker("host")
    host.main_process_only = False
    host.run = wandb.init(project="host", dir=str(tmp_path))
    host.run.log({"train/loss": 1.0}, step=1)
    train(store, forward_to=[host])
    host.run.log({"train/loss": 2.0}, step=2)
    host.run.finish()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = wandb_history(file, "_step", "")
    assert [found[step]["train/loss"] for step in (1, 2)] == [1.0, 2.0]
    assert found[1]["lm_telemetry/step"] == 5
    assert found[1]["steps/loss"] == pytest.approx(expected(store)[5]["steps/loss"])


def wandb_history(path, step, *foreign):
    """Value by the metric `step` and name in an offline run's file: protobufs in LevelDB's log format after 7 bytes."""
    from wandb import teardown
    from wandb.proto import wandb_internal_pb2 as protobuf

    teardown()  # the process that writes the file ends
    data, at, record, found = path.read_bytes(), 7, b"", {}
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in {1, 4}:  # whole, or the last piece
            parsed, record = protobuf.Record.FromString(record), b""
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in parsed.history.item}
            if step in items:
                kept = {n: v for n, v in items.items() if foreign or not n.startswith(("_", "lm_telemetry/", "train/"))}
                found.setdefault(items[step], {}).update(kept)
    return found
