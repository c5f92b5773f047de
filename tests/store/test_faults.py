"""A training run whose store goes bad under it: the losses are those of a run without telemetry, and the rows wait.

The disk is really full here, and the directory really gone.
"""

import json
import os
import resource
import shutil
import subprocess
from contextlib import contextmanager

import pytest
import torch
from tiny_models import batch, build

from lm_telemetry import observe
from lm_telemetry.errors import QueryError
from lm_telemetry.queries import connect
from lm_telemetry.repair import repair
from lm_telemetry.verify import verify

STEPS = 4
"""Steps before, during and after."""


@contextmanager
def no_room(path):
    """No file may grow, as under a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def no_permission(path):
    """The store turns read-only; for root that takes being somebody else."""
    root = os.geteuid() == 0
    directories = [d for d in path.rglob("*") if d.is_dir()] + [path]
    for directory in directories:
        directory.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for directory in directories:
            directory.chmod(0o755)


@contextmanager
def unmounted(path):
    """The store is somewhere else for a while, and a file is in its place."""
    path.rename(path.with_name("elsewhere"))
    path.write_text("")
    try:
        yield
    finally:
        path.unlink()
        path.with_name("elsewhere").rename(path)


class Loop:
    """The same few steps of the same model, wherever they are taken."""

    def __init__(self):
        self.model = build("llama")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.losses = []

    def train(self, session=None, steps=STEPS):
        for _ in range(steps):
            loss = self.model(**batch(len(self.losses))).loss
            loss.backward()
            self.optimizer.step()
            if session is not None:
                session.step(loss=loss, optimizer=self.optimizer)
            self.optimizer.zero_grad()
            self.losses.append(loss.item())


@pytest.fixture(scope="module")
def undisturbed():
    """The losses without telemetry."""
    loop = Loop()
    loop.train(steps=3 * STEPS)
    return loop.losses


def observed(loop, path):
    return observe(loop.model, store=str(path), run_id="r", every=1, flush_seconds=60.0, max_overhead=1.0)


def steps_of(path):
    return [step for (step,) in connect(path).execute("SELECT step FROM steps ORDER BY step").fetchall()]


def events_of(path):
    kinds = "SELECT kind, fields FROM events WHERE kind LIKE 'flush_%' OR kind LIKE 'store_%' ORDER BY time"
    return connect(path).execute(kinds).fetchall()


@pytest.mark.parametrize("fault", [no_room, no_permission, unmounted])
def test_training_goes_on_and_no_row_is_lost(tmp_path, undisturbed, fault):
    path = tmp_path / "store"
    loop = Loop()
    with observed(loop, path) as session:
        loop.train(session)
        assert session.flush()
        with fault(path):
            loop.train(session)
            assert not session.flush()
        loop.train(session)
        assert session.flush()
    assert loop.losses == undisturbed
    assert steps_of(path) == list(range(1, 3 * STEPS + 1))
    (failed, _), (recovered, fields) = events_of(path)
    assert (failed, recovered) == ("flush_failed", "flush_recovered")
    assert '"rows_lost": 0' in fields
    assert verify(path, deep=True) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


def fill_up(disk):
    """A file that takes all the room there is."""
    path = disk / "ballast"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        with pytest.raises(OSError, match="No space left"):
            while True:
                os.write(descriptor, bytes(4096))
    finally:
        os.close(descriptor)
    return path


def test_rows_past_the_bound_of_a_full_disk_are_counted(small_disk, undisturbed, monkeypatch):
    path = small_disk / "store"
    loop = Loop()
    with observed(loop, path) as session:
        loop.train(session)
        assert session.flush()
        ballast = fill_up(small_disk)
        # Every table is over the bound: what was captured while the disk is full goes, but the last of it.
        monkeypatch.setattr("lm_telemetry.pending.KEEP_BYTES", 50_000)
        loop.train(session)
        assert not session.flush()
        ballast.unlink()
        loop.train(session)
        assert session.flush()
    assert loop.losses == undisturbed
    kind, fields = events_of(path)[-1]
    assert kind == "flush_recovered"
    assert json.loads(fields)["rows_lost"] > 0
    assert set(steps_of(path)) >= set(range(1, STEPS + 1))
    assert [f for f in verify(path, deep=True) if f.severity == "error"] == []


def test_a_disk_that_stays_full_ends_the_run_as_usual(small_disk, undisturbed):
    path = small_disk / "store"
    loop = Loop()
    with observed(loop, path) as session:
        loop.train(session)
        assert session.flush()
        fill_up(small_disk)
        loop.train(session, steps=2 * STEPS)
    assert loop.losses == undisturbed
    assert steps_of(path) == list(range(1, STEPS + 1))
    assert {f.severity for f in verify(path, deep=True)} <= {"warning"}


def test_a_table_that_is_deleted_under_a_run_is_reported_and_the_rest_goes_on(tmp_path, undisturbed):
    path = tmp_path / "store"
    loop = Loop()
    with observed(loop, path) as session:
        loop.train(session)
        assert session.flush()
        shutil.rmtree(path / "steps")
        loop.train(session, steps=2 * STEPS)
        assert session.flush()
        with pytest.raises(QueryError, match=r"steps/run_id=r/rank=0/part-0-0.parquet.*lmt verify"):
            steps_of(path)
    assert loop.losses == undisturbed
    assert [(f.severity, f.kind) for f in verify(path)] == [("error", "missing")]
    repair(path)
    assert steps_of(path) == list(range(STEPS + 1, 3 * STEPS + 1))
    assert [(f.severity, f.kind) for f in verify(path)] == [("info", "lost")]


def test_a_run_that_is_flushed_often_ends_in_a_few_files(tmp_path, undisturbed):
    path = tmp_path / "store"
    loop = Loop()
    with observed(loop, path) as session:
        for _ in range(3 * STEPS):
            loop.train(session, steps=1)
            assert session.flush()
        assert len(list(path.glob("steps/*/*/*.parquet"))) == 3 * STEPS
    assert loop.losses == undisturbed
    assert len(list(path.glob("_merged/steps/*/*/compact-*.merged"))) == 1
    assert steps_of(path) == list(range(1, 3 * STEPS + 1))
    assert verify(path, deep=True) == []
