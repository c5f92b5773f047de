"""Programs of child processes that write into a store at an URL; a server that has loaded everything forks them."""

from __future__ import annotations

import os
import time

import s3fs  # noqa: F401 loaded once, in the server

from lm_telemetry import spool as spools
from lm_telemetry import uploader as uploaders
from lm_telemetry.spool import Spool
from lm_telemetry.writer import Writer


def begin(place, run_id, *, rank=0, attempt=None):
    """A writer and its uploader, as a session has them."""
    url, directory, environment = place
    os.environ.update(environment)
    spools.REACH_SECONDS = 2.0
    uploaders.FIRST_WAIT_SECONDS = 0.1
    spool = Spool(url, directory, 2**30)
    number = spool.claim_attempt(run_id) if attempt is None else attempt
    uploader = spool.uploader(run_id, number, rank)
    writer = Writer(spool.store, run_id=run_id, rank=rank, attempt=number, flush_seconds=0.02, observers=[uploader])
    uploader.start(writer.event)
    return writer, uploader


def loss(step):
    return lambda: {"steps": {"loss": [float(step)]}}


def write(place, run_id, steps, rank=0, attempt=None):
    """Steps from 1 on, one by one, and all of it on the remote at the end."""
    writer, uploader = begin(place, run_id, rank=rank, attempt=attempt)
    for step in range(1, steps + 1):
        writer.submit(step, loss(step))
        time.sleep(0.01)
    assert writer.close(20)
    assert uploader.close(20)


def write_for_ever(place, run_id, pipe):
    """Steps from 1 on; those that were acknowledged are sent."""
    writer, _ = begin(place, run_id)
    step = 0
    while True:
        step += 1
        writer.submit(step, loss(step))
        if writer.flush(20):
            pipe.send(step)
