"""Whether a run is being written at this moment, so that repair and retention leave it alone.

Each writer shares a lock on the directory of its attempt, which the system drops when the process ends, however it
ends. Where a lock says nothing (another host may not see it, some network filesystems have none), the time of the last
manifest decides.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_telemetry.store import Store

QUIET_SECONDS = 900.0
"""Without a lock to go by, a run is over when nothing was written for this long."""


def hold(directory: Path) -> int | None:
    """Share the lock on an attempt's directory: a descriptor to close at the end, None where it cannot be had."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    for pause in (0.01, 0.1, 1.0, None):  # who asks `is_live` has the lock to itself for an instant
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if pause is not None:
                time.sleep(pause)
        except OSError:
            break
        else:
            return descriptor
    os.close(descriptor)
    return None


def is_live(store: Store, run_id: str) -> bool:
    """Whether any process writes into the run."""
    return any(attempt_is_live(store, run_id, attempt) for attempt in store.attempts(run_id))


def life_of(store: str) -> Callable[[str, float], bool]:
    """A function that tells whether a run of the store is being written, from its name and when it last was (Unix).

    Of a store at an URL, where no lock can be seen, the time decides; of a local one it is not looked at.
    """
    from lm_telemetry.remote import is_url
    from lm_telemetry.store import Store

    if is_url(store):
        return lambda _, written: time.time() - written < QUIET_SECONDS
    local = Store(Path(store).absolute())
    return lambda run_id, _: is_live(local, run_id)


def attempt_is_live(store: Store, run_id: str, attempt: int) -> bool:
    """Whether any process writes into this attempt of the run."""
    directory = store.manifests(run_id) / f"attempt={attempt}"
    held = _is_held(directory)
    if held is not None and (held or _is_of_this_host(directory)):
        return held
    return time.time() - last_written(directory) < QUIET_SECONDS


def last_written(directory: Path) -> float:
    """Unix time of the last change to a directory or to the manifests in it; 0 if there is none."""
    latest = 0.0
    try:
        latest = directory.stat().st_mtime
        for entry in directory.iterdir():
            latest = max(latest, entry.stat().st_mtime)
    except FileNotFoundError:
        pass  # a manifest is replaced while we look: the directory has changed with it
    return latest


def _is_held(directory: Path) -> bool | None:
    """Whether the lock is taken; None where there are no locks."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    else:
        return False
    finally:
        os.close(descriptor)


def _is_of_this_host(directory: Path) -> bool:
    """Whether all manifests were written here; of an attempt without any, nothing is known."""
    hosts = set()
    for path in directory.glob("rank=*.json"):
        if ".sealed-" in path.name:
            continue
        try:
            hosts.add(json.loads(path.read_bytes())["host"])
        except (OSError, ValueError, KeyError, TypeError):
            hosts.add(None)
    return hosts == {socket.gethostname()}
