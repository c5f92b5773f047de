"""The writer in bad weather: a full disk, a deleted store, a rank directory in the way."""

import errno
import shutil

import pyarrow.parquet as pq
import pytest


def loss(value):
    return lambda: {"steps": {"loss": [value]}}


class Disk:
    """Stands before pyarrow's writer and refuses while it is full, halfway through a file."""

    def __init__(self, monkeypatch):
        self.full = False
        self._write = pq.write_table
        monkeypatch.setattr(pq, "write_table", self.write)

    def write(self, rows, file, **options):
        if self.full:
            file.write(b"PAR1 and then nothing")
            raise OSError(errno.ENOSPC, "No space left on device")
        self._write(rows, file, **options)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def test_rows_wait_in_memory_while_the_disk_is_full(make_writer, rows_of, disk):
    writer = make_writer()
    disk.full = True
    for step in (1, 2):
        writer.submit(step, loss(1.0))
        assert not writer.flush(10)
    assert rows_of("steps") == []
    # Two rows, and the event that writing failed.
    assert (writer.stats.pending_rows, writer.stats.flush_failures, writer.stats.dropped_rows) == (3, 2, 0)
    disk.full = False
    writer.submit(3, loss(1.0))
    assert writer.flush(10)
    assert [row["step"] for row in rows_of("steps")] == [1, 2, 3]
    failed, recovered = rows_of("events")
    assert (failed["kind"], recovered["kind"]) == ("flush_failed", "flush_recovered")
    assert "No space left" in failed["message"]
    assert '"failures": 2' in recovered["fields"]
    assert '"rows_lost": 0' in recovered["fields"]


def test_a_full_disk_leaves_no_half_written_files(make_writer, disk, store):
    writer = make_writer()
    disk.full = True
    writer.submit(1, loss(1.0))
    assert not writer.flush(10)
    assert [p for p in store.path.rglob("*") if p.is_file() and p.suffix != ".json"] == []


def test_past_a_bound_the_oldest_rows_go_and_are_counted(make_writer, rows_of, disk, monkeypatch):
    # The rows of a flush weigh a little over 4 KiB: room for two, with the event that tells of the failure.
    monkeypatch.setattr("lm_telemetry.pending.KEEP_BYTES", 3 * 4500)
    writer = make_writer()
    disk.full = True
    for step in range(1, 7):
        writer.submit(step, loss(1.0))
        assert not writer.flush(10)
    assert writer.stats.pending_rows == 3
    disk.full = False
    assert writer.flush(10)
    kept = [row["step"] for row in rows_of("steps")]
    # Rows and events kept, and those that had to go, are all that there were: 6 steps and 2 events.
    assert kept == list(range(7 - len(kept), 7))
    assert len(kept) + len(rows_of("events")) + writer.stats.dropped_rows == 8
    assert writer.stats.dropped_rows >= 3


def test_a_failing_disk_is_not_tried_at_every_capture(make_writer, disk, monkeypatch):
    monkeypatch.setattr("lm_telemetry.writer.FLUSH_BYTES", 1)
    disk.full = True
    writer = make_writer()
    for step in range(1, 20):
        writer.submit(step, loss(1.0))
    assert not writer.flush(10)
    assert writer.stats.flush_failures == 2  # the first early one, and the one that was asked for


def test_a_deleted_store_is_made_again(make_writer, rows_of, store):
    writer = make_writer()
    writer.submit(1, loss(1.0))
    assert writer.flush(10)
    shutil.rmtree(store.path)
    writer.submit(2, loss(1.0))
    assert writer.flush(10)
    assert [row["step"] for row in rows_of("steps")] == [2]
    assert [event["kind"] for event in rows_of("events")] == ["store_deleted"]
    named = {part.file for part in store.read_manifest("r", 0, 0).parts}
    assert named == {str(p.relative_to(store.path)) for p in store.path.rglob("*.parquet")}


def test_one_table_that_cannot_be_written_does_not_hold_up_the_others(make_writer, rows_of, store):
    (store.path / "layers").write_text("a file in the way")
    writer = make_writer()
    writer.submit(1, lambda: {"layers": {"rms": [1.0]}, "steps": {"loss": [1.0]}})
    assert not writer.flush(10)
    assert len(rows_of("steps")) == 1
    (store.path / "layers").unlink()
    assert writer.flush(10)
    assert len(rows_of("layers")) == 1
    assert len(rows_of("steps")) == 1


def test_a_manifest_that_cannot_be_written_is_written_later(make_writer, store, rows_of):
    writer = make_writer()
    path = store.path / "_manifests" / "run_id=r"
    path.write_text("a file in the way")
    writer.submit(1, loss(1.0))
    assert not writer.flush(10)
    path.unlink()
    assert writer.flush(10)
    assert len(rows_of("steps")) == 1
    assert {part.table for part in store.read_manifest("r", 0, 0).parts} == {"steps", "events"}


def test_close_says_when_rows_are_lost(make_writer, disk):
    writer = make_writer()
    disk.full = True
    writer.submit(1, loss(1.0))
    assert not writer.close(10)
    assert not writer.close(10)
