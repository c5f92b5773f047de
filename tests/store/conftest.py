"""A store, writers that are closed whatever happens, and a way to read what they wrote."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm_telemetry.store import Store
from lm_telemetry.writer import Writer


@pytest.fixture
def store(tmp_path):
    return Store.open_for_writing(tmp_path / "store")


@pytest.fixture
def make_writer(store):
    writers = []

    def make(**overrides):
        # A minute: nothing is flushed unless the test asks for it.
        settings = {"run_id": "r", "rank": 0, "attempt": 0, "flush_seconds": 60.0} | overrides
        writers.append(Writer(store, **settings))
        return writers[-1]

    yield make
    for writer in writers:
        writer.close(10)


@pytest.fixture
def rows_of(store):
    def read(table):
        files = sorted((store.path / table).glob("run_id=*/rank=*/*.parquet"))
        tables = [pq.read_table(file, partitioning=None) for file in files]
        rows = pa.concat_tables(tables).to_pylist() if tables else []
        return sorted(rows, key=lambda row: (row["step"], row["time"]))

    return read
