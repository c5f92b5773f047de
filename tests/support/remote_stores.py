"""Stores at `memory://` for tests: a remote that fails or hangs when told to, rows for it, and what a reader sees."""

from __future__ import annotations

import json
import threading

from fsspec.implementations.memory import MemoryFileSystem

from lm_telemetry.columns import to_table
from lm_telemetry.remote import Remote
from lm_telemetry.store import Manifest

URL = "memory://bucket/store"


def clear():
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


class Weather(Remote):
    """A remote with hooks: `before(operation, name)` and `after` may raise or wait; `done` lists what came through."""

    def __init__(self, url=URL):
        super().__init__(url)
        self.done = []
        self.before = self.after = lambda operation, name: None

    def put(self, name, file):
        self.before("put", name)
        super().put(name, file)
        self.done.append(("put", name))
        self.after("put", name)

    def put_json(self, name, document):
        self.before("put_json", name)
        super().put_json(name, document)
        self.done.append(("put_json", name))
        self.after("put_json", name)

    def create_json(self, name, document):
        self.before("create_json", name)
        created = super().create_json(name, document)
        self.done.append(("create_json", name))
        self.after("create_json", name)
        return created

    def read_json(self, name):
        self.before("read_json", name)
        return super().read_json(name)


class Gate:
    """A `before` that waits until it is opened: a remote that accepts and does not answer."""

    def __init__(self):
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, operation, name):
        self.reached.set()
        self.opened.wait(60)


def listed(remote, *, key="parts"):
    """Names of files that the remote's manifests list, each once."""
    names = []
    for name in remote.find("_manifests"):
        if not name.rpartition("/")[2].startswith("rank=") or ".sealed-" in name:
            continue
        document = json.loads(remote.read(name))
        directory = name.rpartition("/")[0]
        sealed = [json.loads(remote.read(f"{directory}/{other}")) for other in document["sealed"]]
        for tables in [found.get(key, {}) for found in (*sealed, document)]:
            names += [entry["file"] for entries in tables.values() for entry in entries]
    assert len(names) == len(set(names))
    return names


def held(remote):
    """Names of the tables' files that are on the remote."""
    return {name for name in remote.find("") if name.endswith(".parquet")}


class Parts:
    """Writes parts of one row into a spool, as the writer does: the part, then the manifest that lists it."""

    def __init__(self, spool, *, run_id="r", rank=0, attempt=0):
        self._spool = spool
        self._where = {"run_id": run_id, "rank": rank, "attempt": attempt}
        self.manifest = Manifest(**self._where)
        self.written = 0

    def write(self, count=1, table="steps"):
        for _ in range(count):
            step = self.written + 1
            columns = {"steps": {"loss": [float(step)]}, "layers": {"rms": [float(step)]}}[table]
            rows = to_table(table, columns, attempt=self._where["attempt"], step=step, time_us=step)
            part = self._spool.write_part(rows, table=table, seq=self.written, **self._where)
            self.manifest.parts.append(part)
            self.written += 1
            self._spool.write_manifest(self.manifest)
        return self.manifest.parts[-1] if self.manifest.parts else None
