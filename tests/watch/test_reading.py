"""What is asked, how often, of which files; and what happens when that cannot be answered."""

import shutil

import pytest
from busy_store import busy_store
from planted import by, plant

from lm_telemetry.exporters.watch import recent
from lm_telemetry.exporters.watch.reading import BUCKETS
from lm_telemetry.exporters.watch.recent import Recent, judged
from lm_telemetry.meant import newest_run
from lm_telemetry.queries import connect
from lm_telemetry.queries.connect import Connection, rows_of


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    return busy_store(tmp_path_factory.mktemp("busy") / "store")


def steps(first, last):
    return [{"step": step, "loss": 1.0 + step, "seconds": 0.1} for step in range(first, last + 1)]


@pytest.mark.parametrize("view", ["spikes", "attention_health", "dead_layers", "update_ratios", "edge_of_stability"])
def test_a_view_over_all_rows_is_the_view(busy, view):
    tables = ("steps", "layers", "heads", "params", "curvature", "events")
    with connect(busy.path) as connection:
        whole = connection.execute(f"FROM {view}").fetchall()
        assert str(connection.execute(judged(view, dict.fromkeys(tables, "true"))).fetchall()) == str(whole)
        assert whole


def test_only_recent_files_are_read(store, monkeypatch):
    monkeypatch.setattr(recent, "RECENT", 100)
    for first in range(1, 1001, 50):
        plant(store, "steps", steps(first, first + 49))
    plant(store, "steps", steps(1, 10), rank=1)
    plant(store, "steps", steps(1, 10), run_id="other")
    with connect(store.path) as connection:
        some = Recent.of(connection, "r", 0)
        assert some.look()
        assert rows_of(some.execute("SELECT count(*) AS n, max(step) AS last FROM steps")) == [{"n": 150, "last": 1000}]
        assert connection.execute("SELECT count(*) FROM steps WHERE run_id = 'r' AND rank = 0").fetchone() == (1000,)
        plant(store, "steps", steps(1001, 1001))
        assert rows_of(some.execute("SELECT max(step) AS last FROM steps")) == [{"last": 1000}]  # until the next look
        assert some.look()
        assert rows_of(some.execute("SELECT max(step) AS last FROM steps")) == [{"last": 1001}]


def test_a_launch_that_went_back_is_read(store, monkeypatch):
    monkeypatch.setattr(recent, "RECENT", 100)
    plant(store, "steps", steps(1, 1000))
    plant(store, "steps", steps(201, 210), attempt=1)
    with connect(store.path) as connection:
        some = Recent.of(connection, "r", 0)
        some.look()
        assert rows_of(some.execute("SELECT max(step) AS last, count(*) AS n FROM steps")) == [{"last": 210, "n": 210}]


def test_nothing_is_asked_while_nothing_changes(store, watch, monkeypatch):
    plant(store, "steps", steps(1, 50))
    plant(store, "layers", [{"step": 1, "stack": "decoder", "layer": 0, "site": "resid", "rms": 1.0}])
    asked = []
    ask = Connection._ask
    monkeypatch.setattr(
        Connection, "_ask", lambda self, method, sql, *more: asked.append(sql) or ask(self, method, sql, *more)
    )
    look = watch()
    first = look()
    n = len(asked)
    assert look() == first
    assert len(asked) == n
    plant(store, "events", [{"step": 50, "severity": "info", "kind": "k", "message": "m"}])
    later = look()
    assert later.first("events")["kind"] == "k"
    assert all("events" in sql for sql in asked[n:])
    assert len(asked) < 2 * n


def test_a_course_is_folded_and_goes_on(store, watch):
    plant(store, "steps", steps(1, 10_000))
    look = watch()
    loss = look().loss
    assert len(loss) <= BUCKETS
    assert (loss[0].step, loss[-1].last) == (1, 10_000)
    assert (loss[0].low, loss[-1].high) == (2.0, 10_001.0)
    plant(store, "steps", steps(10_001, 10_010))
    more = look().loss
    assert more[: len(loss)] == loss
    assert [bucket.high for bucket in more[len(loss) :]] == [float(step) for step in range(10_002, 10_012)]
    plant(store, "steps", steps(10_011, 12_000))
    again = look().loss
    assert len(again) <= BUCKETS
    assert (again[0].low, again[-1].high) == (2.0, 12_001.0)


def test_what_is_damaged_is_told_and_the_rest_goes_on(store, watch):
    plant(store, "steps", steps(1, 50))
    plant(store, "layers", [{"step": 1, "stack": "decoder", "layer": 0, "site": "resid", "rms": 1.0}])
    look = watch()
    assert look().problems == ()
    plant(store, "layers", [{"step": 2, "stack": "decoder", "layer": 0, "site": "resid", "rms": 2.0}])
    plant(store, "steps", steps(51, 60))
    (*_, newest) = sorted(store.path.glob("layers/**/*.parquet"))
    newest.write_bytes(b"PAR1 nothing PAR1")
    found = look()
    assert found.first("pace")["last_step"] == 60
    assert found.first("rms")["rms"] == 1.0  # the last that could be read
    assert len(found.problems) == 1
    assert str(newest) in found.problems[0]
    assert "lmt verify" in found.problems[0]


def test_a_manifest_that_cannot_be_read_is_told(store, watch):
    plant(store, "steps", steps(1, 50))
    look = watch()
    look()
    manifest = store.manifest_path("r", 0, 0)
    good = manifest.read_bytes()
    manifest.write_bytes(b"{")
    found = look()
    assert found.first("pace")["last_step"] == 50
    assert str(manifest) in found.problems[0]
    manifest.write_bytes(good)
    assert look().problems == ()


def test_a_store_that_is_gone_is_told(store, watch, frame):
    plant(store, "steps", steps(1, 50))
    look = watch()
    look()
    shutil.rmtree(store.path)
    found = look()
    assert found.problems == ("run r is not in the store any more; what was seen last is shown",)
    assert found.first("pace")["last_step"] == 50
    assert any("not in the store any more" in text for text in frame(found))


def test_the_newest_run(store):
    with connect(store.path) as connection:
        assert newest_run(connection) is None
        plant(store, "steps", steps(5, 6), run_id="b")
        assert newest_run(connection) == "b"
        plant(store, "runs", [{"step": 1}], run_id="a")
        assert newest_run(connection) == "b"
        plant(store, "runs", [{"step": 9}], run_id="c")
        assert newest_run(connection) == "c"


def test_a_busy_store_is_read_as_the_views_have_it(busy):
    from lm_telemetry.exporters.watch.reading import Watcher

    with connect(busy.path) as connection:
        found = Watcher(connection, "a", rank=0, is_live=lambda _: False).look()
        ours = "run_id = 'a' AND rank = 0"
        flags = f"SELECT layer, count(*) FILTER (flag LIKE '%collapse%') FROM attention_health WHERE {ours} GROUP BY 1"
        assert {layer: row["collapsed"] for layer, row in by(found.answers["attention"], "layer").items()} == dict(
            connection.execute(flags).fetchall()
        )
        share = f"SELECT share, is_over FROM cost WHERE {ours} AND part = 'all'"
        assert [found.first("cost")[key] for key in ("share", "is_over")] == list(connection.execute(share).fetchone())
        losses = f"SELECT count(*) FROM steps WHERE {ours} AND loss IS NOT NULL"
        assert [len(found.loss)] == list(connection.execute(losses).fetchone())
    assert found.problems == ()
    assert found.edge_name == "hessian lanczos"
