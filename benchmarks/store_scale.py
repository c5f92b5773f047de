"""The scale part of `store.py`: a store of a thousand million values beside one of ten million, and a thousand runs.

Both hold runs of 500 series (100 layers, 5 sites) of 8 metrics, `layers` of the catalogue, in the layout and with the
manifests that compaction leaves: files of `FILE_ROWS` rows in the order of steps, each sorted by subject. The small one
is a run of 2,500 steps, the large one ten runs of 25,000. Rows of the large one are one run's, copied: a file does not
hold the name of its run, and compression sees no further than a page.

`same steps` asks both for the first 2,500 steps of a series, `whole series` for all there are: ten times as many points
from the large one. Peak memory is of a process that connects and asks.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from store_peers import LAYERS_METRICS

from lm_telemetry.compaction import FILE_ROWS, GROUP_ROWS, write_compaction
from lm_telemetry.coverage import KEY, encode
from lm_telemetry.queries import connect
from lm_telemetry.queries.snapshot import SETTLED
from lm_telemetry.schema import schema
from lm_telemetry.store import Manifest, PartInfo, Store, put_rows

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LAYERS = 100
SITES = ("attn_out", "embed", "final", "mlp_out", "resid")
STEPS = 2500
SERIES = "SELECT step, rms FROM layers WHERE run_id = 'run-0' AND layer = 50 AND site = 'resid'"


def rows_of(steps: range, walk: np.ndarray) -> pa.Table:
    """Rows of these steps, sorted by layer, site and step; `walk` is (series, steps, metrics)."""
    series, length = LAYERS * len(SITES), len(steps)
    n = series * length
    step = np.tile(np.arange(steps.start, steps.stop), series)
    columns: dict[str, Any] = {
        "attempt": np.zeros(n, np.int32),
        "step": step,
        "time": pa.array(1_700_000_000_000_000 + step * 100_137).cast(schema("layers").field("time").type),
        "stack": pa.repeat("decoder", n),
        "layer": np.repeat(np.arange(LAYERS, dtype=np.int32), len(SITES) * length),
        "site": pa.array(SITES).take(np.tile(np.repeat(np.arange(len(SITES)), length), LAYERS)),
        "n_tokens": np.full(n, 512),
        "nonfinite": np.zeros(n, np.int64),
    }
    offset = np.float32(1 + steps.start * 1e-4)
    for i, metric in enumerate(LAYERS_METRICS):
        columns[metric] = walk[:, :length, i].ravel() + offset
    wanted = schema("layers")
    wanted = wanted.with_metadata({**(wanted.metadata or {}), KEY: encode({0: [(steps.start, steps.stop)]})})
    return pa.table([columns[name] for name in wanted.names], schema=wanted)


def build(path: Path, runs: int, steps: int) -> Store:
    """A compacted store of `runs` runs of `steps` steps."""
    store = Store.open_for_writing(path)
    length = FILE_ROWS // (LAYERS * len(SITES)) + 1
    noise = np.random.default_rng(0).standard_normal((LAYERS * len(SITES), length, len(LAYERS_METRICS)), np.float32)
    walk = (noise * np.float32(0.01)).cumsum(1)
    first = store.partition("layers", "run-0", 0)
    first.mkdir(parents=True)
    files = []
    for i, start in enumerate(range(1, steps + 1, length)):
        rows = rows_of(range(start, min(start + length, steps + 1)), walk)
        target = first / f"compact-1-{i}.parquet"
        files.append(put_rows(store.path, target, rows, table="layers", row_group_size=GROUP_ROWS))
    list_files(store, "run-0", files)
    for run in range(1, runs):
        shutil.copytree(first, store.partition("layers", f"run-{run}", 0))
        list_files(store, f"run-{run}", files)
    return store


def list_files(store: Store, run_id: str, files: list[PartInfo]) -> None:
    """The manifests of a run whose parts were all replaced by `files` (of run-0, or copies of them)."""
    store.write_manifest(Manifest(run_id=run_id, rank=0, attempt=0))
    own = [
        PartInfo(
            table=f.table,
            file=f.file.replace("run_id=run-0/", f"run_id={run_id}/"),
            rows=f.rows,
            bytes=f.bytes,
            first_step=f.first_step,
            last_step=f.last_step,
            schema=f.schema,
            crc32=f.crc32,
        )
        for f in files
    ]
    path = store.manifests(run_id) / "compaction" / "rank=0.json"
    path.parent.mkdir()
    replaces = {"layers": {"0": 1 + max(f.last_step or 0 for f in files)}}
    write_compaction(path, generation=1, replaces=replaces, files={"layers": own}, retired=[])


def ask(store: Path, query: str) -> dict[str, float]:
    """Peak memory of a process that connects and asks, in GB, and how many rows came."""
    command = [sys.executable, __file__, str(store), query]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(answer.stdout)


def measure(rows: Any, work: Path, pairs: Callable[..., list[tuple[float, float]]], quick: bool) -> None:
    """Add the rows of both stores, and of a thousand runs, to `rows`."""
    runs, steps = (3, STEPS * 2) if quick else (10, STEPS * 10)
    small, large = build(work / "small", 1, STEPS), build(work / "large", runs, steps)
    n = runs * steps * LAYERS * len(SITES) * len(LAYERS_METRICS)
    base = f"{STEPS * LAYERS * len(SITES) * len(LAYERS_METRICS):.0e} values"
    asked = {"same steps": f"{SERIES} AND step <= {STEPS} ORDER BY step", "whole series": f"{SERIES} ORDER BY step"}
    with connect(large.path) as ours, connect(small.path) as theirs:
        for name, query in asked.items():
            assert len(ours.execute(query).fetchall()) == (STEPS if name == "same steps" else steps)
            found = pairs(
                lambda q=query: ours.execute(q).fetchall(),
                lambda q=query: theirs.execute(q).fetchall(),
                3 if quick else 25,
            )
            rows.ratio(f"query: one series of {n:.0e} values, {name}", base, found, "<= 3", unit="s")
    memory = ask(large.path, asked["whole series"])
    rows.add(f"peak memory, one series of {n:.0e} values", "", memory["gigabytes"], "<= 2", unit="GB")
    connecting = lambda store: lambda: connect(store.path).execute("SELECT 1").fetchall()
    many = Store.open_for_writing(work / "many")
    names = [f"run-{i}" for i in range(100 if quick else 1000)]
    source = small.partition("layers", "run-0", 0)
    tiny = put_rows(
        small.path, source / "tiny.parquet", rows_of(range(1, 2), np.zeros((500, 1, 8), np.float32)), table="layers"
    )
    for name in names:
        target = many.partition("layers", name, 0)
        target.mkdir(parents=True)
        shutil.copy(source / "tiny.parquet", target)
        list_files(many, name, [tiny])
    time.sleep(SETTLED)
    found = pairs(connecting(many), connecting(small), 3 if quick else 15)
    rows.ratio(f"connect, {len(names)} runs", "connect, 1 run", found, unit="s")


if __name__ == "__main__":
    with connect(sys.argv[1]) as connection:
        found = connection.execute(sys.argv[2]).fetchall()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"gigabytes": peak / 1e9, "rows": len(found)}))
