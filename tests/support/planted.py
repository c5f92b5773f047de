"""Rows planted in a store as a rank would have written them: parts, and the manifest that tells of them."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pyarrow as pa

from lm_telemetry.queries import connect
from lm_telemetry.schema import schema
from lm_telemetry.store import sequence

START = datetime(1970, 1, 1, tzinfo=UTC)


def plant(store, table, rows, *, run_id="r", rank=0, attempt=0):
    """Write `rows`, dictionaries with a `step`, as one part; columns that a row lacks are NULL there."""
    rows = [{"attempt": attempt, "time": START + timedelta(seconds=row["step"]), **row} for row in rows]
    assert set().union(*rows) <= set(schema(table).names)
    manifest = store.read_manifest(run_id, rank, attempt)
    seq = max(map(sequence, manifest.parts), default=-1) + 1
    part = store.write_part(
        pa.Table.from_pylist(rows, schema=schema(table)),
        table=table,
        run_id=run_id,
        rank=rank,
        attempt=attempt,
        seq=seq,
    )
    manifest.parts.append(part)
    store.write_manifest(manifest)


def ask(store, query):
    """The answer, as dictionaries."""
    with connect(store.path) as connection:
        relation = connection.sql(query)
        return [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]


def by(rows, *names):
    """`rows` by the value of a column, or by the values of some."""
    return {row[names[0]] if len(names) == 1 else tuple(row[name] for name in names): row for row in rows}


def is_nan(value):
    """Whether it is a number that is none."""
    return isinstance(value, float) and math.isnan(value)
