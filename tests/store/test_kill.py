"""Forty launches of one run, each ended by `kill -9` at a random moment: every answer afterwards is right."""

import multiprocessing as mp
import random
import time

import pytest
from store_children import write_for_ever

from lm_telemetry.queries import connect
from lm_telemetry.repair import repair
from lm_telemetry.store import Store
from lm_telemetry.verify import verify

KILLS = 40
LEFTOVERS = {("warning", "temporary"), ("warning", "unlisted"), ("info", "unmanaged")}

BY_ATTEMPT = """
    SELECT attempt, count(*), count(DISTINCT step), max(step), sum(loss), (
        SELECT count(*) FROM raw.layers AS l WHERE l.attempt = s.attempt AND l.step <= acknowledged[s.attempt + 1]
    ) FROM raw.steps AS s, (SELECT ? AS acknowledged) GROUP BY ALL ORDER BY attempt
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A store, the last step that each attempt acknowledged, and what was wrong after each kill."""
    path = tmp_path_factory.mktemp("killed") / "store"
    Store.open_for_writing(path)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["store_children"])
    rng = random.Random(1)
    acknowledged, wrong = [], []
    con = connect(path)
    for _ in range(KILLS):
        pipe, theirs = context.Pipe(duplex=False)
        child = context.Process(target=write_for_ever, args=(path, theirs, None, 0.01))
        child.start()
        theirs.close()
        pipe.poll(30)  # it has begun
        time.sleep(0.1 * rng.random())
        child.kill()
        child.join()
        last = 0
        try:
            while pipe.poll():
                last = pipe.recv()
        except EOFError:
            pass
        acknowledged.append(last)
        findings = {(f.severity, f.kind) for f in verify(path)}
        if not findings <= LEFTOVERS:
            wrong.append(findings - LEFTOVERS)
        found = con.execute("SELECT max(step) FROM raw.steps WHERE attempt = ?", [len(acknowledged) - 1]).fetchone()[0]
        if found < last:
            wrong.append((found, last))
    return path, acknowledged, wrong


def by_attempt(killed):
    path, acknowledged, _ = killed
    return connect(path).execute(BY_ATTEMPT, [acknowledged]).fetchall()


def test_no_kill_leaves_worse_than_leftovers(killed):
    assert killed[2] == []


def test_each_launch_is_the_next_attempt(killed):
    assert Store(killed[0]).attempts("r") == list(range(KILLS))


def test_no_acknowledged_row_is_lost_and_none_is_there_twice(killed):
    found = by_attempt(killed)
    assert [attempt for attempt, *_ in found] == list(range(KILLS))
    for (_, count, distinct, last, total, layers), acknowledged in zip(found, killed[1], strict=True):
        assert count == distinct == last >= acknowledged > 0
        assert total == last * (last + 1) / 2
        assert layers == 5 * acknowledged


def test_the_surviving_history_is_the_last_attempt(killed):
    # Each launch begins at step 1, as if it had no checkpoint.
    found = connect(killed[0]).execute("SELECT DISTINCT attempt FROM steps").fetchall()
    assert found == [(KILLS - 1,)]


def test_repair_brings_in_what_was_not_acknowledged_and_loses_nothing(killed):
    before = by_attempt(killed)
    done = {action.kind for action in repair(killed[0])}
    assert done <= {"removed", "adopted", "manifest"}
    assert verify(killed[0], deep=True) == []
    after = by_attempt(killed)
    assert all(new[1] >= old[1] and new[5] == old[5] for new, old in zip(after, before, strict=True))
