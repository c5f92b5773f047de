"""The layout on disk, as other readers see it, and the refusals of places that cannot be written."""

import json
import os
import stat
import zlib
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from lm_telemetry.catalogue import schema_id
from lm_telemetry.columns import to_table
from lm_telemetry.errors import StoreError
from lm_telemetry.schema import ALL_TABLES, schema
from lm_telemetry.store import SEAL_AFTER, Manifest, PartInfo, Store


def steps(first, count=3, attempt=0):
    tables = [
        to_table("steps", {"loss": [1 / s]}, attempt=attempt, step=s, time_us=s) for s in range(first, first + count)
    ]
    return pa.concat_tables(tables)


@pytest.fixture
def store(tmp_path):
    return Store.open_for_writing(tmp_path / "store")


@pytest.fixture
def filled(store):
    for run_id in ("123", "a.b-c"):
        for rank in (0, 1):
            for seq in (0, 1):
                store.write_part(steps(1 + 3 * seq), table="steps", run_id=run_id, rank=rank, attempt=0, seq=seq)
            store.write_manifest(Manifest(run_id=run_id, rank=rank, attempt=0))
    return store


def test_a_part_lies_where_it_is_said_to(store):
    part = store.write_part(steps(5), table="steps", run_id="r", rank=2, attempt=1, seq=7)
    path = store.path / "steps" / "run_id=r" / "rank=2" / "part-1-7.parquet"
    assert part == PartInfo(
        table="steps",
        file=str(path.relative_to(store.path)),
        rows=3,
        bytes=path.stat().st_size,
        first_step=5,
        last_step=7,
        schema=schema_id("steps"),
        crc32=zlib.crc32(path.read_bytes()),
    )
    assert list(path.parent.iterdir()) == [path]
    assert pq.read_schema(path).equals(schema("steps"), check_metadata=True)


@pytest.mark.parametrize("table", ALL_TABLES)
def test_floats_are_split_and_only_strings_have_dictionaries(store, table):
    row = {f.name: ["x"] for f in schema(table) if pa.types.is_string(f.type)}
    row |= {f.name: [1.0] for f in schema(table) if pa.types.is_floating(f.type)}
    row |= {f.name: [[1.0, 2.0]] for f in schema(table) if pa.types.is_list(f.type)}
    rows = to_table(table, row, attempt=0, step=1, time_us=0)
    part = store.write_part(rows, table=table, run_id="r", rank=0, attempt=0, seq=0)
    group = pq.ParquetFile(store.path / part.file).metadata.row_group(0)
    for i in range(group.num_columns):
        chunk = group.column(i)
        assert chunk.compression == "ZSTD"
        assert chunk.has_dictionary_page == (chunk.physical_type == "BYTE_ARRAY")
        if chunk.physical_type in {"FLOAT", "DOUBLE"}:
            assert "BYTE_STREAM_SPLIT" in chunk.encodings


def test_pyarrow_reads_it_as_a_hive_dataset(filled):
    # partitioning="hive" alone would take run `123` for a number; the types are the reader's to give.
    flavor = ds.partitioning(pa.schema([("run_id", pa.string()), ("rank", pa.int32())]), flavor="hive")
    table = ds.dataset(filled.path / "steps", partitioning=flavor).to_table()
    assert table.num_rows == 2 * 2 * 6
    assert sorted(set(table["run_id"].to_pylist())) == ["123", "a.b-c"]
    assert sorted(set(table["rank"].to_pylist())) == [0, 1]


def test_duckdb_reads_it_with_a_plain_glob(filled):
    found = duckdb.execute(
        f"SELECT run_id, rank, count(*), sum(loss) FROM '{filled.path}/steps/**/*.parquet' GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    total = pytest.approx(sum(1 / s for s in range(1, 7)))
    assert found == [("123", 0, 6, total), ("123", 1, 6, total), ("a.b-c", 0, 6, total), ("a.b-c", 1, 6, total)]


def test_a_temporary_file_is_hidden_from_readers(filled):
    directory = filled.path / "steps" / "run_id=123" / "rank=0"
    (directory / ".part-0-9.parquet.99.tmp").write_bytes(b"half a file")
    assert ds.dataset(filled.path / "steps", partitioning="hive").to_table().num_rows == 24
    assert duckdb.execute(f"SELECT count(*) FROM '{filled.path}/steps/**/*.parquet'").fetchone() == (24,)


def test_a_failed_write_leaves_nothing_behind(store, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left") as caught:
        store.write_part(steps(1), table="steps", run_id="r", rank=0, attempt=0, seq=0)
    directory = store.path / "steps" / "run_id=r" / "rank=0"
    assert caught.value.path == str(directory / "part-0-0.parquet")
    assert list(directory.iterdir()) == []


def test_attempts_are_claimed_once(store):
    assert [store.claim_attempt("r") for _ in range(3)] == [0, 1, 2]
    assert store.claim_attempt("other") == 0


def test_attempts_go_on_from_parts_whose_claims_are_gone(store):
    store.write_part(steps(1), table="steps", run_id="r", rank=3, attempt=4, seq=0)
    assert store.claim_attempt("r") == 5


def test_a_claim_that_cannot_be_written_is_refused(store):
    (store.path / "_manifests" / "run_id=r").write_text("in the way")
    with pytest.raises(StoreError, match="cannot claim"):
        store.claim_attempt("r")


def test_sequence_numbers_go_on_from_what_is_there(store):
    assert store.next_seq("r", 0, 0) == 0
    store.write_part(steps(1), table="steps", run_id="r", rank=0, attempt=0, seq=11)
    assert store.next_seq("r", 0, 0) == 12
    assert store.next_seq("r", 0, 1) == 0
    assert store.next_seq("r", 1, 0) == 0


def part(seq):
    return PartInfo(table="steps", file=f"steps/part-0-{seq}.parquet", rows=1, bytes=9, first_step=seq, last_step=seq)


def test_a_manifest_comes_back_as_it_was(store):
    parts = [part(0), part(1)]
    store.write_manifest(Manifest(run_id="r", rank=1, attempt=2, parts=list(parts)))
    assert store.read_manifest("r", 1, 2).parts == parts
    assert store.read_manifest("r", 0, 2).parts == []
    document = json.loads((store.path / "_manifests/run_id=r/attempt=2/rank=1.json").read_text())
    assert (document["format"], document["run_id"], document["rank"], document["attempt"]) == ("1", "r", 1, 2)
    assert document["parts"]["steps"][1] == {
        "file": "steps/part-0-1.parquet",
        "rows": 1,
        "bytes": 9,
        "first_step": 1,
        "last_step": 1,
        "schema": None,
        "crc32": None,
    }


def test_a_long_manifest_is_sealed_and_stays_short(store):
    parts = [part(i) for i in range(2 * SEAL_AFTER + 5)]
    manifest = Manifest(run_id="r", rank=0, attempt=0, parts=list(parts))
    store.write_manifest(manifest)
    assert len(manifest.parts) == 5
    assert store.read_manifest("r", 0, 0).parts == parts[-5:]
    assert store.read_manifest("r", 0, 0, whole=True).parts == parts
    path = store.path / "_manifests/run_id=r/attempt=0"
    (path / manifest.sealed[0]).unlink()
    with pytest.raises(StoreError, match="sealed"):
        store.read_manifest("r", 0, 0, whole=True)


def test_a_manifest_that_appears_while_it_is_looked_for_is_no_damage(store, monkeypatch):
    """A compactor beside a run that has claimed its attempt and acknowledges its first part at this very moment."""
    parts = [part(i) for i in range(SEAL_AFTER + 5)]
    read_text = Path.read_text

    def just_too_early(path, **options):
        try:
            return read_text(path, **options)
        except FileNotFoundError:
            store.write_manifest(Manifest(run_id="r", rank=0, attempt=0, parts=list(parts)))
            raise

    monkeypatch.setattr(Path, "read_text", just_too_early)
    assert store.read_manifest("r", 0, 0, whole=True).parts == []
    assert store.read_manifest("r", 0, 0, whole=True).parts == parts


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sealed": []}', '{"sealed": [], "parts": {"steps": [{}]}}'])
def test_a_broken_manifest_is_an_error_that_names_it(store, text):
    path = store.path / "_manifests/run_id=r/attempt=0/rank=0.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(StoreError) as caught:
        store.read_manifest("r", 0, 0)
    assert caught.value.path == str(path)


def test_opening_makes_parents_and_leaves_no_probe(tmp_path):
    store = Store.open_for_writing(tmp_path / "a" / "b")
    assert list(store.path.iterdir()) == [store.path / "_manifests"]


def a_file(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file"


def below_a_file(tmp_path):
    return a_file(tmp_path) / "store"


def a_dangling_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at all")
    return tmp_path / "link"


def in_proc(_):
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc here")
    return Path("/proc/telemetry-store")


@pytest.mark.parametrize("place", [a_file, below_a_file, a_dangling_link, in_proc])
def test_a_place_that_cannot_be_written_is_refused(place, tmp_path):
    path = place(tmp_path)
    with pytest.raises(StoreError, match="must be a directory that can be written") as caught:
        Store.open_for_writing(path)
    assert caught.value.path == str(path)


def test_a_directory_without_permission_is_refused(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    root = os.geteuid() == 0
    if root:  # root may write anywhere that can be written
        os.seteuid(65534)
    try:
        with pytest.raises(StoreError, match="Permission denied"):
            Store.open_for_writing(tmp_path / "store")
    finally:
        if root:
            os.seteuid(0)


def test_a_full_disk_is_noticed_when_the_store_is_opened(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match="No space left"):
        Store.open_for_writing(tmp_path / "store")
