"""A file that tells Prometheus where to scrape this rank (`file_sd_configs`), for as long as there is something to.

    scrape_configs: [{job_name: lm, file_sd_configs: [{files: ["/shared/targets/*.json"]}]}]

One file a rank, `<run_id>-<rank>.json`, so that no two processes write the same one; it appears whole, and goes when
the run is over or the process ends. A process that is killed leaves its file: the next that starts there on the same
host removes it. Whether a process lives is told by a lock on its file, which the system drops with it: numbers of
processes are reused, and mean nothing across containers. The host is kept as a label that begins with `__`, which
Prometheus drops.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import re
import socket
from pathlib import Path

from lm_telemetry.exporters.request import PATH

_HOST = "__lm_telemetry_host"


class Target:
    """One rank's file in `directory`, from construction until `remove`.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, directory: str, *, run_id: str, rank: int, address: str, scheme: str) -> None:
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        name = re.sub(r"[^A-Za-z0-9._-]", "_", run_id)[:128]
        self.path = folder / f"{name}-{rank}.json"
        labels = {"__scheme__": scheme, "__metrics_path__": PATH, _HOST: socket.gethostname()}
        text = json.dumps([{"targets": [address], "labels": labels}], indent=1) + "\n"
        draft = folder / f".{self.path.name}.{os.getpid()}.tmp"
        self._pid = os.getpid()
        self._lock = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            with contextlib.suppress(OSError):  # a filesystem without locks: then nobody removes it for us
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(self._lock, text.encode())
            draft.replace(self.path)
        except OSError:
            os.close(self._lock)
            draft.unlink(missing_ok=True)
            raise
        atexit.register(self.remove)

    def remove(self) -> None:
        """Take the file away, if it is still ours. A second call, and one in a forked child, does nothing."""
        atexit.unregister(self.remove)
        if self._pid != os.getpid() or self._lock < 0:
            return
        with contextlib.suppress(OSError):
            if os.fstat(self._lock).st_ino == self.path.stat().st_ino:
                self.path.unlink()
        os.close(self._lock)
        self._lock = -1


def _sweep(folder: Path) -> None:
    """Remove what processes of this host have left that are no more."""
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError):
            if json.loads(path.read_bytes())[0]["labels"][_HOST] == socket.gethostname() and not _is_held(path):
                path.unlink()


def _is_held(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
