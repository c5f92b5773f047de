"""Stores for the tests of verify, repair, compaction and retention: what each part holds is known beforehand."""

import pyarrow as pa

from lm_telemetry.columns import to_table
from lm_telemetry.store import Manifest, Store

TABLES = ("steps", "layers")
LAYERS = 3
STEPS_A_PART = 4


def rows(table, first, count=STEPS_A_PART, attempt=0):
    """Rows of consecutive steps; the value is the step."""
    pieces = []
    for step in range(first, first + count):
        columns = (
            {"loss": [float(step)]}
            if table == "steps"
            else {"layer": list(range(LAYERS)), "site": ["resid"] * LAYERS, "rms": [float(step)] * LAYERS}
        )
        pieces.append(to_table(table, columns, attempt=attempt, step=step, time_us=step * 1000 + attempt))
    return pa.concat_tables(pieces)


def fill(store, *, run_id="r", rank=0, attempt=0, first=1, parts=5, seq=0):
    """`parts` more parts of each table, acknowledged one by one as a writer does."""
    manifest = store.read_manifest(run_id, rank, attempt)
    for i in range(parts):
        for table in TABLES:
            manifest.parts.append(
                store.write_part(
                    rows(table, first + i * STEPS_A_PART, attempt=attempt),
                    table=table,
                    run_id=run_id,
                    rank=rank,
                    attempt=attempt,
                    seq=seq + i,
                )
            )
        store.write_manifest(manifest)
    return manifest


def written(parts=5, *, first=1, run_id="r", rank=0, attempt=0):
    """The (run, rank, attempt, step, value) that `fill` has put into `steps`."""
    steps = range(first, first + parts * STEPS_A_PART)
    return [(run_id, rank, attempt, step, float(step)) for step in steps]


def new_store(path, **kwargs):
    """A store with one run in it."""
    store = Store.open_for_writing(path)
    fill(store, **kwargs)
    return store


__all__ = ["LAYERS", "STEPS_A_PART", "TABLES", "Manifest", "fill", "new_store", "rows", "written"]
