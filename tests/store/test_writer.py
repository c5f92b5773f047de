"""The writer in good weather: order, stamps, flushes, the queue's bound, observers, the end."""

import threading
import time

import pytest

from lm_telemetry.store import Store
from lm_telemetry.writer import Writer


def loss(value):
    return lambda: {"steps": {"loss": [value]}}


def test_what_was_submitted_before_a_flush_is_on_disk_after_it(make_writer, rows_of, store):
    writer = make_writer(attempt=2)
    before = time.time()
    assert all(writer.submit(step, loss(1 / step)) for step in range(1, 101))
    assert writer.flush(10)
    rows = rows_of("steps")
    assert [row["step"] for row in rows] == list(range(1, 101))
    assert [row["loss"] for row in rows] == [1 / step for step in range(1, 101)]
    assert {row["attempt"] for row in rows} == {2}
    assert all(before - 1 < row["time"].timestamp() < time.time() + 1 for row in rows)
    assert rows[0]["learning_rate"] is None
    stats = writer.stats
    assert (stats.rows, stats.parts, stats.pending_rows, stats.queued) == (100, 1, 0, 0)
    parts = store.read_manifest("r", 0, 2).parts
    assert [(part.rows, part.first_step, part.last_step) for part in parts] == [(100, 1, 100)]
    assert stats.bytes == parts[0].bytes == (store.path / parts[0].file).stat().st_size


def test_time_is_that_of_the_submission(make_writer, rows_of):
    writer, gate = make_writer(), threading.Event()
    writer.submit(1, lambda: gate.wait(10) and {})
    writer.submit(2, loss(1.0))
    submitted = time.time()
    time.sleep(0.2)
    gate.set()
    assert writer.flush(10)
    # Stamped at production it would be 0.2 s later.
    assert rows_of("steps")[0]["time"].timestamp() < submitted + 0.1


def test_produce_runs_on_the_thread_and_submit_does_not_wait_for_it(make_writer):
    writer, gate, names = make_writer(), threading.Event(), []
    writer.submit(1, lambda: names.append(threading.current_thread().name) or (gate.wait(10) and {}))
    assert not gate.is_set()
    assert not writer.flush(0.05)
    gate.set()
    assert writer.flush(10)
    assert names == ["lm-telemetry-writer-r-0"]


def test_rows_are_flushed_by_time(make_writer, rows_of):
    writer = make_writer(flush_seconds=0.05)
    writer.submit(1, loss(1.0))
    deadline = time.monotonic() + 10
    while not rows_of("steps") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(rows_of("steps")) == 1


def test_many_bytes_bring_a_flush_forward(make_writer, rows_of, monkeypatch):
    monkeypatch.setattr("lm_telemetry.writer.FLUSH_BYTES", 1)
    writer = make_writer()
    writer.submit(1, loss(1.0))
    deadline = time.monotonic() + 10
    while not rows_of("steps") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(rows_of("steps")) == 1


def test_one_capture_may_fill_several_tables_and_one_bad_table_spares_the_others(make_writer, rows_of):
    writer = make_writer()
    writer.submit(3, lambda: {"layers": {"rmss": [1.0]}, "steps": {"loss": [1.0]}, "params": {}})
    assert writer.flush(10)
    assert len(rows_of("steps")) == 1
    (event,) = rows_of("events")
    assert (event["kind"], event["severity"], event["step"]) == ("capture_failed", "error", 3)
    assert '"column": "rmss"' in event["fields"]
    assert writer.stats.capture_failures == 1


def test_a_capture_that_raises_becomes_an_event_and_the_writer_goes_on(make_writer, rows_of):
    writer = make_writer()
    writer.submit(1, lambda: 1 / 0)
    writer.submit(2, loss(1.0))
    assert writer.flush(10)
    assert [row["step"] for row in rows_of("steps")] == [2]
    (event,) = rows_of("events")
    assert "ZeroDivisionError" in event["message"]
    assert "test_writer.py" in event["fields"]


def test_a_bug_of_ours_loses_a_capture_and_not_the_thread(make_writer, rows_of, monkeypatch):
    writer = make_writer()

    def broken(*_, **__):
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr("lm_telemetry.writer.to_rows", broken)
        writer.submit(1, loss(1.0))
        assert writer.flush(10)
    with monkeypatch.context() as patch:
        patch.setattr("lm_telemetry.store.Store.write_part", broken)
        writer.submit(2, loss(1.0))
        assert not writer.flush(10)
    assert writer.flush(10)
    assert [row["step"] for row in rows_of("steps")] == [2]
    assert (writer.stats.capture_failures, writer.stats.flush_failures) == (1, 1)


def test_events_keep_their_fields(make_writer, rows_of):
    writer = make_writer()
    writer.event("warning", "odd", "something odd", step=4, value=float("nan"), where={"layer": 3})
    assert writer.flush(10)
    (event,) = rows_of("events")
    assert (event["severity"], event["kind"], event["message"], event["step"]) == ("warning", "odd", "something odd", 4)
    assert event["fields"] == '{"value": "NaN", "where": {"layer": 3}}'


def test_a_full_queue_drops_counts_and_tells(make_writer, rows_of):
    writer, gate, started = make_writer(capacity=4), threading.Event(), threading.Event()
    writer.submit(1, lambda: started.set() or (gate.wait(10) and {}))
    assert started.wait(10)
    assert [writer.submit(step, loss(1.0)) for step in range(2, 9)] == [True] * 4 + [False] * 3
    writer.event("info", "still_heard", "events have places of their own", step=8)
    assert writer.stats.dropped_captures == 3
    gate.set()
    assert writer.flush(10)
    assert [row["step"] for row in rows_of("steps")] == [2, 3, 4, 5]
    told = {event["kind"]: event for event in rows_of("events")}
    assert set(told) == {"rows_dropped", "still_heard"}
    assert told["rows_dropped"]["fields"] == '{"captures": 3}'


def test_a_flood_of_events_is_bounded_too(make_writer, monkeypatch):
    monkeypatch.setattr("lm_telemetry.writer.EVENT_RESERVE", 2)
    writer, gate, started = make_writer(capacity=1), threading.Event(), threading.Event()
    writer.submit(1, lambda: started.set() or (gate.wait(10) and {}))
    assert started.wait(10)
    for _ in range(10):
        writer.event("info", "flood", "", step=1)
    assert (writer.stats.queued, writer.stats.dropped_captures) == (3, 7)
    gate.set()


class Seen:
    def __init__(self):
        self.batches, self.flushes = [], []

    def observe(self, table, rows):
        self.batches.append((table, rows.to_pylist()))

    def flushed(self, stats):
        self.flushes.append(stats)


@pytest.mark.parametrize("produced", [[1], "text", 5, {"steps": 5}, {"steps": [("loss", 1)]}])
def test_a_capture_of_the_wrong_shape_becomes_an_event(make_writer, rows_of, produced):
    writer = make_writer()
    writer.submit(1, lambda: produced)
    assert writer.flush(10)
    assert [event["kind"] for event in rows_of("events")] == ["capture_failed"]
    assert writer.stats.capture_failures == 1


def test_an_observer_that_raises_at_the_last_flush_is_told_of(make_writer, rows_of):
    class Late(Seen):
        def flushed(self, stats):
            raise KeyError("late")

    assert make_writer(observers=[Late()]).close(10)
    assert [event["kind"] for event in rows_of("events")] == ["observer_failed"]


class Broken(Seen):
    def observe(self, table, rows):
        raise KeyError("observer")


def test_a_capture_that_does_not_fit_is_the_only_one_of_its_flush_that_is_lost(make_writer, rows_of):
    seen = Seen()
    writer = make_writer(observers=[seen])
    for step, layer in enumerate([0, 1.5, 2], 1):
        writer.submit(step, lambda layer=layer: {"layers": {"layer": [layer], "rms": [0.5]}, "steps": {"loss": [1.0]}})
    assert writer.flush(10)
    assert [row["layer"] for row in rows_of("layers")] == [0, 2]
    assert [row["step"] for row in rows_of("steps")] == [1, 2, 3]
    (event,) = rows_of("events")
    assert (event["kind"], event["step"]) == ("capture_failed", 2)
    assert '"column": "layer"' in event["fields"]
    assert [row["layer"] for table, rows in seen.batches if table == "layers" for row in rows] == [0, 2]


def test_observers_are_shown_the_captures_of_a_flush_together(make_writer):
    seen = Seen()
    writer = make_writer(observers=[seen])
    for step, rms in [(1, [1.0, 2.0]), (2, [3.0]), (2, [])]:
        writer.submit(step, lambda rms=rms: {"layers": {"rms": rms}})
    assert writer.flush(10)
    assert [[(row["step"], row["rms"]) for row in rows] for _, rows in seen.batches] == [[(1, 1.0), (1, 2.0), (2, 3.0)]]


def test_observers_see_whole_rows_and_every_flush(make_writer):
    seen = Seen()
    writer = make_writer(attempt=1, observers=[seen])
    writer.submit(5, loss(2.0))
    writer.event("info", "hello", "", step=6)
    assert writer.flush(10)
    (steps, (row,)), (events, _) = seen.batches
    assert (steps, events) == ("steps", "events")
    assert (row["attempt"], row["step"], row["loss"], row["grad_norm"]) == (1, 5, 2.0, None)
    assert [stats.rows for stats in seen.flushes] == [2]


def test_an_observer_that_raises_is_told_of_once_and_harms_nobody(make_writer, rows_of):
    seen = Seen()
    writer = make_writer(observers=[Broken(), seen])
    for step in (1, 2, 3):
        writer.submit(step, loss(1.0))
    assert writer.flush(10)
    assert len(rows_of("steps")) == 3
    assert [event["kind"] for event in rows_of("events")] == ["observer_failed"]
    assert [len(rows) for table, rows in seen.batches if table == "steps"] == [3]


def test_close_writes_what_is_left_and_is_the_end(make_writer, rows_of):
    writer = make_writer()
    writer.submit(1, loss(1.0))
    assert writer.close(10)
    assert writer.close(10)
    assert len(rows_of("steps")) == 1
    assert not writer.submit(2, loss(1.0))
    assert not writer.flush(1)
    writer.event("info", "late", "", step=2)
    assert not [t for t in threading.enumerate() if t.name.startswith("lm-telemetry-writer")]


def test_close_does_not_wait_longer_than_it_may(make_writer):
    writer, gate = make_writer(), threading.Event()
    writer.submit(1, lambda: gate.wait(10) and {})
    assert not writer.close(0.05)
    gate.set()


def test_a_second_writer_of_an_attempt_goes_on_after_the_first(make_writer, rows_of, store):
    for step in (1, 2):
        writer = make_writer()
        writer.submit(step, loss(1.0))
        assert writer.close(10)
    assert [row["step"] for row in rows_of("steps")] == [1, 2]
    assert [part.last_step for part in store.read_manifest("r", 0, 0).parts] == [1, 2]


def test_ranks_write_beside_each_other(make_writer, store):
    writers = [make_writer(rank=rank) for rank in range(3)]
    for writer in writers:
        writer.submit(1, loss(1.0))
    assert all(writer.flush(10) for writer in writers)
    assert sorted(p.name for p in (store.path / "steps" / "run_id=r").iterdir()) == ["rank=0", "rank=1", "rank=2"]
    assert sorted(p.name for p in (store.path / "_manifests/run_id=r/attempt=0").iterdir()) == [
        "rank=0.json",
        "rank=1.json",
        "rank=2.json",
    ]


def test_a_broken_manifest_is_found_before_the_run(tmp_path):
    store = Store.open_for_writing(tmp_path)
    path = tmp_path / "_manifests/run_id=r/attempt=0/rank=0.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(Exception, match="cannot read the manifest"):
        Writer(store, run_id="r", rank=0, attempt=0, flush_seconds=1)
