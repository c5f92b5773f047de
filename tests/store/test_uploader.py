"""The uploader's thread behind a real writer, at `memory://`: outages, hangs, a full spool, what others have left."""

import time

import pytest
from remote_stores import URL, Gate, Parts, Weather, clear, listed

from lm_telemetry.errors import StoreError
from lm_telemetry.queries import connect
from lm_telemetry.spool import Spool
from lm_telemetry.store import Store
from lm_telemetry.uploader import Uploader, upload_spool

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
    assert not uploader.drain(10)
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
    writer, uploader = make()
    write(writer, 1)
    assert not uploader.drain(10)
    assert there("SELECT DISTINCT run_id FROM steps ORDER BY 1") == [("older",), ("r",), ("sound",)]
    assert writer.flush(10)
    uploader.drain(10)
    assert there("SELECT kind FROM events") == [("upload_failed",)]


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


def test_a_spool_can_be_brought_up_by_hand(store, remote, tmp_path):
    Parts(store).write(2)
    Parts(store, rank=1).write(2)
    stats = upload_spool(store.path, URL, seconds=10)
    assert (stats.parts, stats.waiting_parts) == (4, 0)
    assert there("SELECT rank, count(*) FROM steps GROUP BY ALL ORDER BY 1") == [(0, 2), (1, 2)]
    with pytest.raises(StoreError, match="no spool"):
        upload_spool(tmp_path / "nothing", URL, seconds=10)


def test_launches_from_two_places_take_two_numbers(tmp_path):
    here, there_ = (Spool(URL, str(tmp_path / name), MUCH) for name in ("here", "there"))
    assert [here.claim_attempt("r"), there_.claim_attempt("r"), here.claim_attempt("r")] == [0, 1, 2]
    assert there_.claim_attempt("other") == 0


def test_a_launch_that_cannot_ask_is_told_apart_later(tmp_path, monkeypatch, caplog):
    first = Spool(URL, str(tmp_path / "here"), MUCH)
    second = Spool(URL, str(tmp_path / "there"), MUCH)
    monkeypatch.setattr(second._remote.filesystem, "find", lambda *_, **__: down("find", ""))
    numbers = [first.claim_attempt("r"), second.claim_attempt("r")]
    assert numbers == [0, 0]
    assert "claimed here alone" in caplog.text
    told = []
    for spool in (first, second):
        Parts(spool.store).write(2)
        uploader = spool.uploader("r", 0, 0)
        uploader.start(lambda *words, **fields: told.append((words, fields)))
        assert uploader.close(10)
    ((severity, kind, _), fields) = told[0]
    assert (len(told), severity, kind) == (1, "warning", "run_apart")
    assert there("SELECT run_id, count(*) FROM steps GROUP BY ALL ORDER BY 1") == [
        ("r", 2),
        (fields["remote_run_id"], 2),
    ]
    # Who cannot ask leaves no claim, but what it wrote is one.
    first._remote.filesystem.rm_file("/bucket/store/_manifests/run_id=r/attempt=0/claim.json")
    assert Spool(URL, str(tmp_path / "third"), MUCH).claim_attempt("r") == 1


def test_a_store_that_refuses_fails_at_once_and_one_that_is_silent_does_not(tmp_path, monkeypatch, caplog):
    def refuse(self, name, document):
        raise PermissionError("Access Denied")

    monkeypatch.setattr("lm_telemetry.remote.Remote.put_json", refuse)
    with pytest.raises(StoreError, match="Access Denied"):
        Spool(URL, str(tmp_path), MUCH)
    gate = Gate()
    monkeypatch.setattr("lm_telemetry.remote.Remote.put_json", lambda *_: gate("put_json", ""))
    monkeypatch.setattr("lm_telemetry.spool.REACH_SECONDS", 0.1)
    assert isinstance(Spool(URL, str(tmp_path), MUCH).store, Store)
    assert "rows will wait" in caplog.text
    gate.opened.set()
