"""The spool of an URL, at `memory://`: launches that claim a number, stores that refuse, what is brought by hand."""

import time

import pytest
from remote_stores import URL, Gate, Parts, clear

from lm_telemetry.errors import StoreError
from lm_telemetry.lane import Lane
from lm_telemetry.queries import connect
from lm_telemetry.spool import Spool, find_spool, spool_path, upload_spool
from lm_telemetry.store import Store

MUCH = 2**30


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    monkeypatch.setattr("lm_telemetry.uploader.FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr("lm_telemetry.spool.PROGRESS_SECONDS", 0.05)
    clear()
    yield
    clear()


@pytest.fixture
def left(tmp_path):
    """A spool with rows of two ranks."""
    store = Store.open_for_writing(spool_path(URL, str(tmp_path)))
    for rank in (0, 1):
        Parts(store, rank=rank).write(2)
        lane = Lane.take(store, "r", rank, 0)
        lane.let_go()
    return store


def there(query):
    with connect(URL) as con:
        return con.execute(query).fetchall()


def down(*_, **__):
    raise ConnectionRefusedError("nobody listens")


@pytest.mark.parametrize("is_named", [True, False])
def test_a_spool_can_be_brought_up_by_hand(left, tmp_path, is_named):
    told = []
    stats = upload_spool(left.path if is_named else tmp_path, URL, seconds=10, progress=told.append)
    assert (stats.parts, stats.waiting_parts, stats.damaged, stats.busy) == (4, 0, 0, 0)
    assert told[-1].parts == 4
    assert there("SELECT rank, count(*) FROM steps GROUP BY ALL ORDER BY 1") == [(0, 2), (1, 2)]
    assert list(left.path.rglob("*.parquet")) == []
    assert upload_spool(tmp_path, URL, seconds=10).parts == 0


def test_rows_of_a_living_process_are_left_to_it(left, tmp_path):
    lane = Lane.take(left, "r", 1, 0)
    stats = upload_spool(tmp_path, URL, seconds=10)
    assert (stats.parts, stats.busy) == (2, 1)
    lane.let_go()


def test_what_does_not_arrive_is_an_error_and_stays(left, tmp_path, monkeypatch):
    put = "lm_telemetry.remote.Remote.put"
    with monkeypatch.context() as broken:
        broken.setattr(put, down)
        with pytest.raises(StoreError, match=r"4 files or more are left in .*nobody listens"):
            upload_spool(tmp_path, URL, seconds=0.3)
    assert len(list(left.path.rglob("*.parquet"))) == 4
    gate = Gate()
    with monkeypatch.context() as silent:
        silent.setattr(put, gate)
        began = time.monotonic()
        with pytest.raises(StoreError, match="nothing arrived for 0 s"):
            upload_spool(tmp_path, URL, seconds=0.3)
        assert time.monotonic() - began < 30  # the gate is shut for 60
    gate.opened.set()


def test_a_slow_remote_is_waited_for_while_something_arrives(left, tmp_path, monkeypatch):
    from lm_telemetry.remote import Remote

    put = Remote.put

    def slowly(self, name, file):
        time.sleep(0.3)
        put(self, name, file)

    monkeypatch.setattr(Remote, "put", slowly)
    assert upload_spool(tmp_path, URL, seconds=0.8).parts == 4


def test_damage_in_a_spool_is_an_error_when_the_rest_is_there(left, tmp_path):
    left.manifest_path("r", 1, 0).write_text("{")
    with pytest.raises(StoreError, match="rows of 1 ranks cannot be read"):
        upload_spool(tmp_path, URL, seconds=10)
    assert there("SELECT rank, count(*) FROM steps GROUP BY ALL") == [(0, 2)]


def test_a_place_that_refuses_or_is_silent_is_told_at_once(left, tmp_path, monkeypatch):
    def refuse(self, name, document):
        raise PermissionError("Access Denied")

    monkeypatch.setattr("lm_telemetry.remote.Remote.put_json", refuse)
    with pytest.raises(StoreError, match="Access Denied"):
        upload_spool(tmp_path, URL, seconds=60)
    monkeypatch.setattr("lm_telemetry.remote.Remote.put_json", down)
    with pytest.raises(StoreError, match=r"does not answer: .*nobody listens"):
        upload_spool(tmp_path, URL, seconds=60)
    assert len(list(left.path.rglob("*.parquet"))) == 4


def test_the_spool_of_an_url_and_no_other(left, tmp_path):
    other = "memory://bucket/elsewhere"
    assert find_spool(tmp_path, f"{URL}/") == find_spool(left.path, URL) == left.path
    with pytest.raises(StoreError, match=f"there are {left.path.name}"):
        find_spool(tmp_path, other)
    with pytest.raises(StoreError, match="is of another URL; rename it to memory-bucket-elsewhere-"):
        find_spool(left.path, other)
    local = Store.open_for_writing(tmp_path / "local")
    Parts(local).write(1)
    for path in (local.path, tmp_path / "nothing"):
        with pytest.raises(StoreError, match="no spool of memory://bucket/store"):
            find_spool(path, URL)


def test_launches_from_two_places_take_two_numbers(tmp_path):
    here, there_ = (Spool(URL, str(tmp_path / name), MUCH) for name in ("here", "there"))
    assert [here.claim_attempt("r"), there_.claim_attempt("r"), here.claim_attempt("r")] == [0, 1, 2]
    assert there_.claim_attempt("other") == 0


def test_a_launch_that_cannot_ask_is_told_apart_later(tmp_path, monkeypatch, caplog):
    first = Spool(URL, str(tmp_path / "here"), MUCH)
    second = Spool(URL, str(tmp_path / "there"), MUCH)
    monkeypatch.setattr(second._remote.filesystem, "find", down)
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
