"""A writer's lock on its attempt: held while it lives, and had although somebody is just asking for it."""

from __future__ import annotations

import fcntl
import os
import threading

from lm_telemetry.liveness import hold


def test_a_writer_waits_out_whoever_is_just_asking(tmp_path):
    asking = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_EX)
    timer = threading.Timer(0.05, os.close, [asking])
    timer.start()
    held = hold(tmp_path)
    timer.join()
    assert held is not None
    other = os.open(tmp_path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        else:
            taken = False
        assert taken, "the lock is shared by the writer as long as it holds the descriptor"
    finally:
        os.close(other)
        os.close(held)


def test_a_directory_that_is_not_there_has_no_lock(tmp_path):
    assert hold(tmp_path / "gone") is None
