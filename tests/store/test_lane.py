"""From the spool to the remote, piece by piece, at `memory://`: what a reader may find there at any moment."""

import random

import pytest
from remote_stores import Parts, Weather, clear, held, listed

from lm_telemetry.errors import StoreError
from lm_telemetry.lane import Lane
from lm_telemetry.queries import connect
from lm_telemetry.store import Store


@pytest.fixture(autouse=True)
def empty():
    clear()
    yield
    clear()


@pytest.fixture
def remote():
    return Weather()


def bring(lane, remote):
    lane.refresh()
    apart = lane.greet(remote)
    while lane.ship(remote):
        pass
    lane.publish(remote)
    return apart


def local(store):
    return {str(path.relative_to(store.path)) for path in store.path.rglob("*.parquet")}


def test_a_part_is_there_before_it_is_listed_and_gone_here_only_after(store, remote):
    parts = Parts(store)
    parts.write(2)
    parts.write(1, "layers")
    seen = []

    def look(operation, name):
        lists = set(listed(remote))
        assert lists <= held(remote)
        assert local(store) | lists == {part.file for part in parts.manifest.parts}
        seen.append(operation)

    remote.before = look
    lane = Lane.take(store, "r", 0, 0)
    bring(lane, remote)
    assert seen == ["create_json", "put", "put", "put", "put_json"]
    assert local(store) == set()
    assert len(listed(remote)) == 3
    assert [name for operation, name in remote.done if operation == "put"] == [p.file for p in parts.manifest.parts]
    lane.let_go()


@pytest.mark.parametrize("seed", range(12))
def test_whatever_fails_and_whoever_dies_each_row_arrives_once(store, remote, monkeypatch, seed):
    monkeypatch.setattr("lm_telemetry.lane.SEAL_AFTER", 4)
    monkeypatch.setattr("lm_telemetry.store.SEAL_AFTER", 5)
    dice = random.Random(seed)
    trouble = True

    def fail(operation, name):
        assert set(listed(remote)) <= held(remote)
        if trouble and dice.random() < 0.2:
            raise ConnectionError(operation)

    remote.before = remote.after = fail  # a request that fails, and one whose answer is lost
    parts = Parts(store)
    lane = Lane.take(store, "r", 0, 0)
    for _ in range(40):
        parts.write(dice.randrange(3), dice.choice(["steps", "layers"]))
        try:
            bring(lane, remote)
        except ConnectionError:
            if dice.random() < 0.3:
                lane._held.close()  # the process dies, and with it the lock
                lane = Lane.take(store, "r", 0, 0)
    trouble = False
    bring(lane, remote)
    assert lane.is_done
    assert len(listed(remote)) == len(held(remote)) == parts.written
    assert listed(remote, key="lost") == []
    assert local(store) == set()
    with connect("memory://bucket/store") as con:
        found = con.execute("SELECT loss FROM steps UNION ALL SELECT rms FROM layers ORDER BY 1").fetchall()
    assert found == [(step + 1,) for step in range(parts.written)]
    lane.let_go()


def test_a_manifest_that_could_not_be_put_is_put_though_nothing_comes(store, remote):
    Parts(store).write(1)
    lane = Lane.take(store, "r", 0, 0)

    def refuse(operation, name):
        if operation == "put_json":
            raise ConnectionError(operation)

    remote.before = refuse
    with pytest.raises(ConnectionError):
        bring(lane, remote)
    assert not lane.is_done
    assert len(local(store)) == 1
    remote.before = lambda operation, name: None
    bring(lane, remote)
    assert lane.is_done
    assert len(listed(remote)) == 1
    lane.let_go()


def test_an_unanswered_manifest_lists_no_part_twice(store, remote, monkeypatch):
    # The request arrived, its answer did not; meanwhile the lists are sealed.
    monkeypatch.setattr("lm_telemetry.lane.SEAL_AFTER", 3)
    parts = Parts(store)
    lane = Lane.take(store, "r", 0, 0)
    put_json = Weather.put_json

    def lose_the_answer(self, name, document):
        put_json(self, name, document)
        if name.endswith("/rank=0.json"):
            raise TimeoutError

    parts.write(4)
    monkeypatch.setattr(Weather, "put_json", lose_the_answer)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            bring(lane, remote)
        assert len(listed(remote)) == parts.written
        parts.write(1)
    monkeypatch.setattr(Weather, "put_json", put_json)
    bring(lane, remote)
    assert len(listed(remote)) == parts.written == 7
    lane.let_go()


def test_what_has_to_go_is_the_oldest_and_is_listed_as_lost(store, remote):
    parts = Parts(store)
    parts.write(5)
    lane = Lane.take(store, "r", 0, 0)
    lane.refresh()
    before = lane.waiting_bytes
    gone = [lane.drop_oldest() for _ in range(2)]
    assert [part.first_step for part in gone] == [1, 2]
    assert lane.waiting_bytes == before - sum(part.bytes for part in gone)
    bring(lane, remote)
    assert listed(remote, key="lost") == [part.file for part in gone]
    assert len(listed(remote)) == 3
    assert lane.drop_oldest() is None
    lane.let_go()


@pytest.mark.parametrize("was_greeted", [True, False])
def test_what_went_before_a_death_is_known_to_the_next(store, remote, was_greeted):
    parts = Parts(store)
    parts.write(2)
    lane = Lane.take(store, "r", 0, 0)
    lane.refresh()
    if was_greeted:
        lane.greet(remote)
        lane.ship(remote)
        lane.publish(remote)
        lost = lane.drop_oldest()
    else:
        lost = lane.drop_oldest()
    lane._held.close()
    lane = Lane.take(store, "r", 0, 0)
    bring(lane, remote)
    assert listed(remote, key="lost") == [lost.file]
    assert len(listed(remote)) == 1
    lane.let_go()


def test_what_arrived_before_a_death_is_not_lost_by_going_here(store, remote):
    # The remote lists it, the process died before it removed the file, and the next one has no room for it.
    Parts(store).write(1)
    lane = Lane.take(store, "r", 0, 0)

    def lose_the_answer(operation, name):
        if operation == "put_json":
            raise TimeoutError

    remote.after = lose_the_answer
    with pytest.raises(TimeoutError):
        bring(lane, remote)
    lane._held.close()
    remote.after = lambda operation, name: None
    lane = Lane.take(store, "r", 0, 0)
    lane.refresh()
    assert lane.drop_oldest() is not None
    bring(lane, remote)
    assert len(listed(remote)) == 1
    assert listed(remote, key="lost") == []
    lane.let_go()


def test_a_part_goes_or_arrives_whenever_another_thread_makes_room(store, remote):
    # Whoever waits for the lock gets it at each of its releases: there, everything that may go goes.
    parts = Parts(store)
    parts.write(6)
    lane = Lane.take(store, "r", 0, 0)
    lane.refresh()
    lock, left = lane._mutex, 3

    class Contended:
        def __enter__(self):
            lock.acquire()

        def __exit__(self, *_):
            nonlocal left
            lock.release()
            if lane._mutex is self and left and lane._listed.parts:
                left -= 1
                lane._mutex = lock
                lane.drop_oldest()
                lane._mutex = self

    lane._mutex = Contended()
    bring(lane, remote)
    arrived, lost = listed(remote), listed(remote, key="lost")
    assert len(lost) == 3
    assert sorted(arrived + lost) == sorted(part.file for part in parts.manifest.parts)
    lane.let_go()


def test_a_part_that_goes_while_a_place_is_resumed_is_listed_once(store, remote):
    parts = Parts(store)
    parts.write(2)
    lane = Lane.take(store, "r", 0, 0)
    remote.after = lambda operation, name: lost_answer() if operation == "put_json" else None

    def lost_answer():
        raise TimeoutError

    with pytest.raises(TimeoutError):
        bring(lane, remote)
    lane._held.close()
    lane = Lane.take(store, "r", 0, 0)
    remote.after = lambda operation, name: None
    read = remote.read_json

    def read_json(name):
        document = read(name)
        lane.drop_oldest()
        return document

    remote.read_json = read_json
    bring(lane, remote)
    assert len(listed(remote)) == 2
    assert listed(remote, key="lost") == []
    lane.let_go()


def test_a_file_that_goes_before_it_was_looked_at_is_lost(store, remote):
    parts = Parts(store)
    parts.write(1)
    lane = Lane.take(store, "r", 0, 0)
    bring(lane, remote)
    gone = parts.write(1)
    (store.path / gone.file).unlink()
    bring(lane, remote)
    assert listed(remote, key="lost") == [gone.file]
    lane.let_go()


def test_a_manifest_that_cannot_be_read_is_not_a_finished_one(store, remote):
    Parts(store).write(1)
    lane = Lane.take(store, "r", 0, 0)
    bring(lane, remote)
    store.manifest_path("r", 0, 0).write_text("{")
    with pytest.raises(StoreError):
        lane.refresh()
    lane.let_go()
    lane = Lane.take(store, "r", 0, 0)
    assert lane is not None
    lane.let_go()


def test_a_part_that_is_being_shipped_does_not_go(store, remote):
    Parts(store).write(1)
    lane = Lane.take(store, "r", 0, 0)
    lane.refresh()
    asked = []
    remote.before = lambda operation, name: asked.append(lane.drop_oldest()) if operation == "put" else None
    bring(lane, remote)
    assert asked == [None]
    assert len(listed(remote)) == 1
    lane.let_go()


def test_a_file_that_somebody_removed_is_lost_and_holds_up_nothing(store, remote):
    parts = Parts(store)
    parts.write(3)
    lane = Lane.take(store, "r", 0, 0)
    lane.refresh()
    (store.path / parts.manifest.parts[0].file).unlink()
    bring(lane, remote)
    assert listed(remote, key="lost") == [parts.manifest.parts[0].file]
    assert len(listed(remote)) == 2
    lane.let_go()


def test_a_place_that_is_anothers_is_left_alone(tmp_path, remote):
    lanes = []
    for name in ("here", "there"):
        store = Store.open_for_writing(tmp_path / name)
        parts = Parts(store)
        parts.write(2)
        lane = Lane.take(store, "r", 0, 0)
        lane.refresh()
        if name == "there":
            lane.drop_oldest()
        lanes.append((lane, bring(lane, remote)))
    assert lanes[0][1] is None
    apart = lanes[1][1]
    assert apart.startswith("r.")
    assert listed(remote, key="lost") == [f"steps/run_id={apart}/rank=0/part-0-0.parquet"]
    with connect("memory://bucket/store") as con:
        assert con.execute("SELECT run_id, count(*) FROM steps GROUP BY ALL ORDER BY 1").fetchall() == [
            ("r", 2),
            (apart, 1),
        ]
    for lane, _ in lanes:
        lane.let_go()


def test_one_process_a_lane_and_none_when_all_is_there(store, remote):
    parts = Parts(store)
    parts.write(1)
    lane = Lane.take(store, "r", 0, 0)
    assert Lane.take(store, "r", 0, 0) is None
    bring(lane, remote)
    lane.let_go()
    assert Lane.take(store, "r", 0, 0) is None  # nothing is left to do
    parts.write(1)
    again = Lane.take(store, "r", 0, 0)
    bring(again, remote)
    assert len(listed(remote)) == 2
    again.let_go()


def test_a_spool_that_is_deleted_takes_nothing_from_the_remote(store, remote):
    parts = Parts(store)
    lane = Lane.take(store, "r", 0, 0)
    parts.write(3)
    bring(lane, remote)
    parts.manifest.parts.clear()  # as the writer does when it makes the store again
    parts.write(1)
    bring(lane, remote)
    assert len(listed(remote)) == 4
    lane.let_go()
