"""The uploader's thread behind a real writer, at `memory://`: outages, hangs, a full spool, what others have left."""

import os
import threading
import time

import pytest
from remote_stores import URL, Gate, Parts, Weather, clear, listed

from lm_telemetry.lane import Lane
from lm_telemetry.queries import connect
from lm_telemetry.uploader import Uploader

MUCH = 2**30


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr("lm_telemetry.uploader.FIRST_WAIT_SECONDS", 0.01)
    clear()
    yield
    clear()


@pytest.fixture
def remote():
    return Weather()


@pytest.fixture
def make(store, remote, make_writer):
    """`make()` gives a writer and its uploader, both running."""
    uploaders = []

    def start(*, limit_bytes=MUCH, **identity):
        own = (identity.get("run_id", "r"), identity.get("attempt", 0), identity.get("rank", 0))
        uploader = Uploader(store, remote, limit_bytes=limit_bytes, own=own)
        uploaders.append(uploader)
        writer = make_writer(observers=[uploader], **identity)
        uploader.start(writer.event)
        return writer, uploader

    yield start
    remote.before = lambda operation, name: None
    for uploader in uploaders:
        uploader.close(5)


def write(writer, *steps):
    for step in steps:
        writer.submit(step, lambda step=step: {"steps": {"loss": [float(step)]}})
        assert writer.flush(10)


def there(query):
    with connect(URL) as con:
        return con.execute(query).fetchall()


def losses():
    return [loss for (loss,) in there("SELECT loss FROM steps ORDER BY step")]


def down(operation, name):
    raise ConnectionRefusedError("nobody listens")


def wait_until(holds):
    end = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_is_flushed_is_soon_there_and_no_longer_here(make, store):
    writer, uploader = make()
    write(writer, 1, 2, 3)
    assert uploader.drain(10)
    assert losses() == [1.0, 2.0, 3.0]
    assert list(store.path.rglob("*.parquet")) == []
    stats = uploader.stats
    assert (stats.parts, stats.waiting_parts, stats.waiting_bytes, stats.failures) == (3, 0, 0, 0)
    assert stats.bytes == writer.stats.bytes


def test_an_outage_loses_nothing_and_is_told(make, remote):
    writer, uploader = make()
    write(writer, 1)
    assert uploader.drain(10)
    remote.before = down
    write(writer, 2, 3)
    assert not uploader.drain(0.1)
    write(writer, 4)
    assert losses() == [1.0]
    remote.before = lambda operation, name: None
    assert uploader.drain(10)
    assert losses() == [1.0, 2.0, 3.0, 4.0]
    assert writer.flush(10)
    assert uploader.drain(10)
    events = there("SELECT kind, message, fields->>'dropped_rows' FROM events ORDER BY time")
    assert [kind for kind, _, _ in events] == ["upload_failed", "upload_recovered"]
    assert "nobody listens" in events[0][1]
    assert events[1][2] == "0"


def test_a_remote_that_comes_back_is_found_without_being_asked(make, remote):
    writer, uploader = make()
    remote.before = down
    write(writer, 1)
    wait_until(lambda: uploader.stats.failures > 2)
    remote.before = lambda operation, name: None
    wait_until(lambda: uploader.stats.parts >= 1)


def test_a_remote_that_hangs_holds_up_nobody(make, remote, store):
    gate = remote.before = Gate()
    writer, uploader = make()
    write(writer, 1, 2)
    assert gate.reached.wait(10)
    began = time.monotonic()
    write(writer, 3)
    assert not uploader.drain(0.2)
    assert not uploader.close(0.2)
    assert writer.close(10)
    assert time.monotonic() - began < 30  # the gate is shut for 60
    assert len(list(store.path.rglob("*.parquet"))) == 3
    gate.opened.set()


@pytest.mark.parametrize("weather", [down, Gate()])
def test_past_the_bound_the_oldest_go_and_an_event_counts_them(make, remote, store, weather):
    writer, uploader = make(limit_bytes=50_000)
    write(writer, 1)
    assert uploader.drain(10)
    remote.before = weather
    steps = range(2, 20)
    write(writer, *steps)
    size = max(path.stat().st_size for path in store.path.rglob("*.parquet"))
    assert 50_000 - 2 * size < uploader.stats.waiting_bytes <= 50_000
    dropped = uploader.stats.dropped_parts
    assert uploader.stats.dropped_rows >= dropped > 0
    remote.before = lambda operation, name: None
    if isinstance(weather, Gate):
        weather.opened.set()
    assert uploader.drain(10)
    kept = losses()
    # What hangs is on its way, and is not dropped: it is the one old row that may be there.
    assert kept[-1] == 19.0
    assert kept[2:] == [float(step) for step in range(20 - len(kept[2:]), 20)]
    assert len(kept) + dropped >= 19
    assert len(listed(remote, key="lost")) == dropped
    assert writer.flush(10)
    assert uploader.drain(10)
    events = there("SELECT kind FROM events WHERE kind = 'spool_full'")
    assert len(events) == 1


def test_two_threads_that_make_room_at_once_give_up_no_more_than_one(store, remote, monkeypatch):
    parts = Parts(store)
    parts.write(10)
    uploader = Uploader(store, remote, limit_bytes=5 * parts.manifest.parts[0].bytes, own=("r", 0, 0))
    uploader._own.refresh()
    drop = Lane.drop_oldest

    def slowly(self):
        time.sleep(0.02)
        return drop(self)

    monkeypatch.setattr(Lane, "drop_oldest", slowly)
    threads = [threading.Thread(target=uploader._keep_bound) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert uploader.stats.waiting_parts == 5
    assert uploader.stats.dropped_parts == 5
    uploader._own.let_go()


def test_what_a_dead_process_left_is_taken_along(make, store):
    Parts(store, run_id="old", attempt=2).write(3)
    writer, uploader = make()
    write(writer, 1)
    assert uploader.drain(10)
    assert there("SELECT run_id, attempt, count(*) FROM steps GROUP BY ALL ORDER BY 1") == [("old", 2, 3), ("r", 0, 1)]


def test_what_a_living_process_writes_is_left_to_it(make, remote, store):
    gate = remote.before = Gate()
    first, uploader = make()
    write(first, 1)
    assert gate.reached.wait(10)
    remote.before = lambda operation, name: None
    second, other = make(run_id="s")
    write(second, 1)
    assert other.drain(10)
    assert there("SELECT DISTINCT run_id FROM steps") == [("s",)]
    gate.opened.set()
    assert uploader.drain(10)
    assert there("SELECT DISTINCT run_id FROM steps ORDER BY 1") == [("r",), ("s",)]


def test_a_damaged_leftover_holds_up_nothing(make, store):
    for run_id in ("damaged", "older", "sound"):
        Parts(store, run_id=run_id).write(1)
    store.manifest_path("damaged", 0, 0).write_text("{")
    notes = store.path / "_uploads" / "run_id=no-note" / "attempt=0"
    notes.mkdir(parents=True)
    (notes / "rank=0.json").write_text("{")
    Parts(store, run_id="no-note").write(1)
    part = Parts(store, run_id="no-file").write(1)
    (store.path / part.file).unlink()
    (store.path / part.file).mkdir()
    (store.manifests("sound") / "attempt=x").mkdir()
    (store.manifests("sound") / "attempt=x" / "rank=0.json").write_text("{}")
    writer, uploader = make()
    write(writer, 1)
    assert uploader.drain(10)
    assert there("SELECT DISTINCT run_id FROM steps ORDER BY 1") == [("older",), ("r",), ("sound",)]
    write(writer, 2)
    assert uploader.drain(10)
    assert there("SELECT kind, count(*) FROM events GROUP BY ALL") == [("spool_damaged", 3)]
    stats = uploader.stats
    assert (stats.damaged, stats.failures) == (3, 0)


def test_a_leftover_that_is_mended_is_taken_along(make, store, monkeypatch):
    monkeypatch.setattr("lm_telemetry.uploader.RESCAN_SECONDS", 0.0)
    Parts(store, run_id="damaged").write(1)
    path = store.manifest_path("damaged", 0, 0)
    content = path.read_bytes()
    path.write_text("{")
    _, uploader = make()
    wait_until(lambda: uploader.stats.damaged)
    path.write_bytes(content)
    wait_until(lambda: uploader.stats.parts == 1)
    assert uploader.drain(10)
    assert uploader.stats.damaged == 0


def test_the_end_of_a_run_tries_again_while_there_is_time(make, remote):
    writer, uploader = make()
    refused = []

    def flicker(operation, name):
        if len(refused) < 3:
            refused.append(operation)
            raise ConnectionResetError

    remote.before = flicker
    write(writer, 1)
    assert uploader.drain(20)
    assert len(refused) == 3


def test_what_waits_is_known_while_nothing_can_be_brought(make, remote, store):
    for run_id in ("a", "b", "c"):
        Parts(store, run_id=run_id).write(2)
    remote.before = down
    _, uploader = make()
    wait_until(lambda: uploader.stats.failures)
    assert uploader.stats.waiting_parts == 6


def test_closing_in_a_forked_child_waits_for_no_lock_of_the_parents(make):
    _, uploader = make()
    held = uploader._changed  # by a thread that the child does not have
    with held:
        child = os.fork()
        if child == 0:
            threading.Thread(target=lambda: (uploader.close(5), os._exit(7)), daemon=True).start()
            time.sleep(5)
            os._exit(8)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_finished_runs_are_not_asked_for_again(make, remote, store):
    writer, uploader = make()
    write(writer, 1)
    assert writer.close(10)
    assert uploader.close(10)
    uploader._thread.join(10)
    remote.done.clear()
    _, other = make(run_id="s")
    assert other.drain(10)
    assert [name for _, name in remote.done if "run_id=r" in name] == []
