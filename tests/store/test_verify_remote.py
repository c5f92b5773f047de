"""`verify_remote`: each kind of damage at an URL is found, live and mended stores are whole, hostile names stay out."""

import json

import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from remote_stores import URL, Parts, Weather, clear, held, listed

from lm_telemetry.compaction import compact
from lm_telemetry.errors import StoreError
from lm_telemetry.lane import Lane
from lm_telemetry.queries.mirror import Mirror
from lm_telemetry.store import Store
from lm_telemetry.verify_remote import verify_remote

MANIFEST = "_manifests/run_id=r/attempt=0/rank=0.json"


@pytest.fixture(autouse=True)
def empty():
    clear()
    yield
    clear()


@pytest.fixture
def remote():
    return Weather()


@pytest.fixture
def parts(store, remote, monkeypatch):
    """Nine parts of a rank on the remote, partly in sealed lists, one of them lost."""
    monkeypatch.setattr("lm_telemetry.lane.SEAL_AFTER", 4)
    parts = Parts(store)
    lane = Lane.take(store, "r", 0, 0)
    parts.write(3)
    lane.refresh()
    lane.drop_oldest()
    for _ in range(3):
        lane.refresh()
        lane.greet(remote)
        while lane.ship(remote):
            pass
        lane.publish(remote)
        parts.write(2)
    lane.let_go()
    return parts


def found(*, deep=False):
    return [(f.severity, f.kind, f.file) for f in verify_remote(URL, deep=deep) if f.kind != "lost"]


def age(remote):
    """Have the manifests be of yesterday."""
    document = remote.read_json(MANIFEST)
    document["updated"] = "2020-01-01T00:00:00.000+00:00"
    remote.put_json(MANIFEST, document)


def test_a_whole_store_is_whole_and_tells_what_was_lost(parts, remote):
    assert len(listed(remote)) == 6
    for deep in (False, True):
        findings = verify_remote(URL, deep=deep)
        assert [(f.severity, f.kind, f.file) for f in findings] == [("info", "lost", listed(remote, key="lost")[0])]


def test_missing_damaged_and_flipped_files(parts, remote):
    first, second, third, *_ = listed(remote)
    whole = remote.read(second)
    remote.filesystem.rm_file(f"/bucket/store/{first}")
    remote.filesystem.pipe_file(f"/bucket/store/{second}", whole[:-1])
    content = bytearray(remote.read(third))
    content[len(content) // 2] ^= 1
    remote.filesystem.pipe_file(f"/bucket/store/{third}", bytes(content))
    shallow = [("error", "missing", first), ("error", "damaged", second)]
    assert sorted(found()) == sorted(shallow)
    assert sorted(found(deep=True)) == sorted([*shallow, ("error", "damaged", third)])


def test_damaged_manifests_and_lists(parts, remote):
    sealed = "_manifests/run_id=r/attempt=0/rank=0.sealed-0.json"
    content = remote.read(sealed)
    remote.filesystem.rm_file(f"/bucket/store/{sealed}")
    with pytest.raises(StoreError, match="cannot read memory"):
        verify_remote(URL)
    remote.filesystem.pipe_file(f"/bucket/store/{sealed}", b"{")
    assert found() == [("error", "manifest", MANIFEST)]
    remote.filesystem.pipe_file(f"/bucket/store/{sealed}", content)
    document = remote.read_json(MANIFEST)
    document["parts"]["steps"] = [*document["parts"]["steps"], document["parts"]["steps"][0]]
    remote.put_json(MANIFEST, document)
    assert [kind for _, kind, _ in found()] == ["manifest"]
    (message,) = [f.message for f in verify_remote(URL) if f.kind == "manifest"]
    assert "/tmp" not in message


def test_what_is_not_listed_yet_is_no_fault_of_a_live_run(parts, remote):
    part = listed(remote)[0]
    stray = part.replace("part-0-", "part-0-9")
    remote.filesystem.pipe_file(f"/bucket/store/{stray}", b"x")
    remote.filesystem.pipe_file("/bucket/store/notes.txt", b"x")
    assert found() == [("info", "foreign", "notes.txt")]
    age(remote)
    assert found() == [("warning", "unlisted", stray), ("info", "foreign", "notes.txt")]


def test_a_compacted_store_that_was_copied_is_whole(tmp_path, remote):
    store = Store.open_for_writing(tmp_path / "local")
    Parts(store).write(4)
    compact(store, "r", 0, grace_seconds=0)
    for path in sorted(store.path.rglob("*")):
        if path.is_file() and path.suffix in {".json", ".parquet"}:
            remote.put(str(path.relative_to(store.path)), path)
    assert found(deep=True) == []
    (compacted,) = [name for name in held(remote) if "compact-" in name]
    assert pq.read_metadata(store.path / compacted).num_rows == 4
    remote.filesystem.rm_file(f"/bucket/store/{compacted}")
    assert found() == [("error", "missing", compacted)]


def test_no_store_is_told():
    with pytest.raises(StoreError, match="no store at memory://bucket/store"):
        verify_remote(URL)


@pytest.mark.parametrize(
    "name",
    [
        "_manifests/../../escaped.json",
        "_manifests/run_id=../../escaped.json",
        "_manifests/run_id=r/../../../escaped.json",
        "_manifests/run_id=r/attempt=0/../../../../escaped.json",
        "_manifests/run_id=r/attempt=0/deeper/escaped.json",
    ],
)
def test_a_name_that_leads_out_of_the_copy_is_not_fetched(parts, tmp_path, monkeypatch, name):
    # Keys of an object store are any text; whoever may write there must not write here.
    find, cat_file = MemoryFileSystem.find, MemoryFileSystem.cat_file

    def with_another(self, path, **options):
        return find(self, path, **options) | {f"/bucket/store/{name}": {"size": 2}}

    def content(self, path, **options):
        return b"{}" if path.endswith("escaped.json") else cat_file(self, path, **options)

    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a" / "b"))
    monkeypatch.setattr(MemoryFileSystem, "find", with_another)
    monkeypatch.setattr(MemoryFileSystem, "cat_file", content)
    mirror = Mirror(URL)
    assert not list(tmp_path.rglob("escaped.json"))
    assert json.loads((mirror.path / MANIFEST).read_bytes())["run_id"] == "r"
