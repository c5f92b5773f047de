"""A store that is filled by hand, so that the answers can be worked out by hand."""

import itertools

import pytest

from lm_telemetry.columns import to_table
from lm_telemetry.store import Store


@pytest.fixture
def store(tmp_path):
    return Store.open_for_writing(tmp_path / "store")


@pytest.fixture
def put(store):
    """`put(table, step, run_id=, rank=, attempt=, **columns)` writes one part of one step."""
    sequence = itertools.count()

    def write(table, step, *, run_id="r", rank=0, attempt=0, **columns):
        rows = to_table(table, columns, attempt=attempt, step=step, time_us=1_000_000 * step + attempt)
        store.write_part(rows, table=table, run_id=run_id, rank=rank, attempt=attempt, seq=next(sequence))

    return write
