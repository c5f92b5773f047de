"""Reading a store by plain pyarrow, so that tests do not rest on the project's own queries."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pyarrow.dataset as ds


def rows(store, table, **where):
    """Rows of a table as dictionaries, in order of step."""
    files = [str(file) for file in sorted(Path(store).glob(f"{table}/**/*.parquet")) if not _is_replaced(file, store)]
    if not files:
        return []
    hive = ds.partitioning(flavor="hive")
    dataset = ds.dataset(files, format="parquet", partitioning=hive, partition_base_dir=f"{store}/{table}")
    found = dataset.to_table().to_pylist()
    found = [r for r in found if all(r[k] == v for k, v in where.items())]
    return sorted(found, key=lambda r: r["step"])


def _is_replaced(file, store):
    """Whether a compaction has replaced a part; it is kept for a while, for readers that began before."""
    part = re.fullmatch(r"part-(\d+)-(\d+)\.parquet", file.name)
    table, run, rank = file.parts[-4:-1]
    manifest = Path(store) / "_manifests" / run / "compaction" / f"{rank}.json"
    if part is None or not manifest.exists():
        return False
    return int(part[2]) < json.loads(manifest.read_text())["replaces"].get(table, {}).get(part[1], 0)


def events(store, kind=None):
    return [e for e in rows(store, "events") if kind is None or e["kind"] == kind]


def is_nan(value):
    return isinstance(value, float) and math.isnan(value)
