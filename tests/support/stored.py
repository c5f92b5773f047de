"""Reading a store by plain pyarrow, so that tests do not rest on the project's own queries."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow.dataset as ds


def rows(store, table, **where):
    """Rows of a table as dictionaries, in order of step."""
    files = [str(file) for file in sorted(Path(store).glob(f"{table}/**/*.parquet"))]
    if not files:
        return []
    hive = ds.partitioning(flavor="hive")
    dataset = ds.dataset(files, format="parquet", partitioning=hive, partition_base_dir=f"{store}/{table}")
    found = dataset.to_table().to_pylist()
    found = [r for r in found if all(r[k] == v for k, v in where.items())]
    return sorted(found, key=lambda r: r["step"])


def events(store, kind=None):
    return [e for e in rows(store, "events") if kind is None or e["kind"] == kind]


def is_nan(value):
    return isinstance(value, float) and math.isnan(value)
