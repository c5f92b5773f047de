"""Each kind of damage is found under its name, mended, and costs no row that is still in a whole file."""

import json
import os
import shutil

import pyarrow.parquet as pq
import pytest
from store_trees import STEPS_A_PART, fill, rows, written

from lm_telemetry.compaction import compact, delete_retired
from lm_telemetry.errors import QueryError, StoreError
from lm_telemetry.liveness import attempt_is_live, is_live
from lm_telemetry.quarantine import QUARANTINE
from lm_telemetry.queries import connect
from lm_telemetry.repair import repair
from lm_telemetry.store import SEAL_AFTER
from lm_telemetry.verify import verify

PARTITION = "steps/run_id=r/rank=0"
HIDDEN = "_merged/steps/run_id=r/rank=0"


def answer(store):
    question = "SELECT run_id, rank, attempt, step, loss FROM raw.steps ORDER BY ALL"
    return connect(store.path).execute(question).fetchall()


def steps_of(*numbers):
    """What is left of `written(3)` in these of its parts."""
    return [row for i in numbers for row in written(3)[i * STEPS_A_PART : (i + 1) * STEPS_A_PART]]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def long_ago(*paths):
    for path in paths:
        os.utime(path, (1e9, 1e9))


def empty(path):
    path.write_bytes(b"")


def flip_a_bit_of_a_value(path):
    content = bytearray(path.read_bytes())
    content[12] ^= 1
    path.write_bytes(content)


def replace_by_fewer_rows(path):
    pq.write_table(pq.read_table(path, partitioning=None).slice(1), path)


def put_another_table_there(path):
    shutil.copy(str(path).replace("/steps/", "/layers/"), path)


def put_a_directory_there(path):
    path.unlink()
    path.mkdir()


@pytest.fixture
def three(store):
    fill(store, parts=3)
    return store


def kinds(store, **options):
    return sorted({(f.severity, f.kind) for f in verify(store.path, **options)})


def mend(store, **options):
    """Repair; afterwards all is well, and a second repair has nothing to do."""
    done = repair(store.path, **options)
    assert [f for f in verify(store.path, **options) if f.severity != "info"] == []
    assert repair(store.path, **options) == []
    return sorted({action.kind for action in done})


def test_a_whole_store_has_nothing_to_say(three):
    assert verify(three.path, deep=True) == []
    assert repair(three.path, deep=True) == []
    assert answer(three) == written(3)


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (truncate, "damaged"),
        (empty, "damaged"),
        (replace_by_fewer_rows, "damaged"),
        (put_another_table_there, "damaged"),
        (os.remove, "missing"),
        (put_a_directory_there, "missing"),
    ],
)
def test_a_damaged_part_is_found_set_aside_and_noted_as_lost(three, damage, kind):
    path = three.path / PARTITION / "part-0-1.parquet"
    damage(path)
    (finding,) = (f for f in verify(three.path) if f.severity == "error")
    assert (finding.kind, finding.file) == (kind, f"{PARTITION}/part-0-1.parquet")
    assert "rows" in finding.message
    assert "lost" in mend(three)
    assert answer(three) == steps_of(0, 2)
    assert ("info", "lost") in kinds(three)
    if kind == "damaged":
        assert (three.path / QUARANTINE / finding.file).exists()


def test_a_flipped_bit_is_found_by_reading_deep(three):
    path = three.path / PARTITION / "part-0-1.parquet"
    flip_a_bit_of_a_value(path)
    assert verify(three.path) == []
    (finding,) = verify(three.path, deep=True)
    assert finding.kind == "damaged"
    assert mend(three, deep=True) == ["lost", "manifest", "quarantined"]
    assert answer(three) == steps_of(0, 2)


def test_a_part_rewritten_with_the_same_rows_is_kept(three):
    path = three.path / PARTITION / "part-0-1.parquet"
    pq.write_table(pq.read_table(path, partitioning=None), path, compression="none")
    assert kinds(three) == [("error", "damaged")]
    assert mend(three) == ["manifest", "relisted"]
    assert answer(three) == written(3)


def test_a_part_that_a_crash_kept_from_the_manifest_is_brought_in(three):
    three.write_part(rows("steps", 13), table="steps", run_id="r", rank=0, attempt=0, seq=3)
    assert kinds(three) == [("warning", "unlisted")]
    assert answer(three) == written(3)
    assert mend(three) == ["adopted", "manifest"]
    assert answer(three) == written(4)


def test_half_a_part_that_no_manifest_lists_is_set_aside(three):
    (three.path / PARTITION / "part-0-3.parquet").write_bytes(b"PAR1 half")
    assert kinds(three) == [("warning", "unlisted")]
    assert mend(three) == ["quarantined"]
    assert answer(three) == written(3)


def test_a_copy_of_a_part_is_not_counted_twice(three):
    directory = three.path / PARTITION
    shutil.copy(directory / "part-0-1.parquet", directory / "part-0-7.parquet")
    assert mend(three) == ["quarantined"]
    assert answer(three) == written(3)


def test_a_copy_of_a_compacted_file_is_not_a_part(compacted):
    directory = compacted.path / PARTITION
    shutil.copy(directory / "compact-1-0.parquet", directory / "part-0-7.parquet")
    assert mend(compacted) == ["quarantined"]
    assert answer(compacted) == written(4)


@pytest.mark.parametrize("name", ["part-0-9.parquet", "backup.parquet"])
def test_a_renamed_part_gets_its_name_back(three, name):
    directory = three.path / PARTITION
    (directory / "part-0-1.parquet").rename(directory / name)
    assert ("error", "missing") in kinds(three)
    assert mend(three) == ["restored"]
    assert answer(three) == written(3)
    assert verify(three.path) == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"sealed": ["gone.json"], "parts": {}}', '{"sealed": [], "parts": 3}']
)
def test_a_broken_manifest_is_written_anew_from_the_parts(three, text):
    path = three.manifest_path("r", 0, 0)
    path.write_text(text)
    assert ("error", "manifest") in kinds(three)
    # It does not say which host writes it, so that time has to tell that none does.
    assert [action.kind for action in repair(three.path)] == ["skipped"]
    long_ago(path, path.parent)
    with pytest.raises(StoreError, match="verify --repair"):
        connect(three.path)
    assert mend(three) == ["manifest", "quarantined"]
    assert answer(three) == written(3)


def test_a_manifest_that_lists_a_part_twice_is_mended(three):
    path = three.manifest_path("r", 0, 0)
    document = json.loads(path.read_text())
    document["parts"]["steps"].append(document["parts"]["steps"][0])
    path.write_text(json.dumps(document))
    assert kinds(three) == [("error", "manifest")]
    with pytest.raises(StoreError, match="twice"):
        connect(three.path)
    assert mend(three) == ["manifest"]
    assert answer(three) == written(3)


def test_a_part_that_no_manifest_lists_any_more_is_a_gap(three):
    manifest = three.read_manifest("r", 0, 0)
    manifest.parts = [part for part in manifest.parts if "part-0-1." not in part.file]
    three.write_manifest(manifest)
    assert kinds(three) == [("warning", "unlisted")]
    for table in ("steps", "layers"):
        (three.path / table / "run_id=r/rank=0/part-0-1.parquet").unlink()
    assert kinds(three) == [("warning", "gap")]
    assert mend(three) == ["lost", "manifest"]
    assert kinds(three) == [("info", "lost")]


def test_without_manifests_parts_are_read_as_they_lie_and_can_be_listed_again(three):
    shutil.rmtree(three.path / "_manifests")
    assert kinds(three) == [("info", "unmanaged")]
    assert answer(three) == written(3)
    assert mend(three) == ["manifest"]
    assert verify(three.path) == []
    assert answer(three) == written(3)


@pytest.mark.parametrize("gone", ["attempt=0", "attempt=1", "."])
def test_the_surviving_history_is_read_from_the_rows_where_manifests_are_gone(three, gone):
    fill(three, attempt=1, parts=2, first=9)
    fill(three, attempt=2, parts=1, first=15)
    question = "SELECT attempt, step FROM layers GROUP BY ALL ORDER BY ALL"
    before = connect(three.path).execute(question).fetchall()
    assert [attempt for attempt, _ in before] == [0] * 8 + [1] * 6 + [2] * 4
    shutil.rmtree(three.manifests("r") / gone)
    assert connect(three.path).execute(question).fetchall() == before


def test_an_attempt_without_its_manifest_is_not_passed_over(three):
    fill(three, attempt=1, parts=2, first=9)
    shutil.rmtree(three.manifests("r") / "attempt=0")
    assert sorted(answer(three)) == sorted(written(3) + written(2, first=9, attempt=1))
    assert kinds(three) == [("warning", "unlisted")]
    mend(three)
    surviving = connect(three.path).execute("SELECT attempt, step FROM steps ORDER BY step").fetchall()
    assert surviving == [(0, s) for s in range(1, 9)] + [(1, s) for s in range(9, 17)]


def test_sealed_lists_are_checked_and_mended(store):
    manifest = fill(store, parts=2)
    first = manifest.parts[0]
    for seq in range(2, SEAL_AFTER):
        path = store.partition("steps", "r", 0) / f"part-0-{seq}.parquet"
        shutil.copy(store.path / first.file, path)
    # Copies stand for parts of their own: what matters is the lists.
    manifest.parts += [
        type(first)(**{k: getattr(first, k) for k in first.__slots__} | {"file": f"{PARTITION}/part-0-{seq}.parquet"})
        for seq in range(2, SEAL_AFTER)
    ]
    store.write_manifest(manifest)
    assert manifest.sealed
    assert verify(store.path) == []
    (store.manifest_path("r", 0, 0).parent / manifest.sealed[0]).unlink()
    assert ("error", "manifest") in kinds(store)


def test_leftovers_of_killed_processes_are_removed(three):
    leftovers = [
        three.path / PARTITION / ".part-0-3.parquet.77.tmp",
        three.manifests("r") / "attempt=0" / ".rank=0.json.77.tmp",
        three.path / ".probe-77-ab",
    ]
    for path in leftovers:
        path.write_bytes(b"half")
    assert kinds(three) == [("warning", "temporary")]
    assert mend(three) == ["removed"]
    assert not any(path.exists() for path in leftovers)


def test_foreign_files_are_mentioned_and_not_touched(three):
    foreign = [three.path / "notes.txt", three.path / PARTITION / "x.parquet", three.path / "steps" / "README"]
    for path in foreign:
        path.write_text("mine")
    assert kinds(three) == [("info", "foreign")]
    assert repair(three.path) == []
    assert all(path.read_text() == "mine" for path in foreign)
    assert answer(three) == written(3)


@pytest.mark.parametrize("name", ["part-0-1.parquet", "y.parquet"])
def test_where_directories_are_read_any_file_that_is_no_parquet_is_an_error(three, name):
    shutil.rmtree(three.path / "_manifests")
    before = answer(three)
    (three.path / PARTITION / name).write_bytes(b"not Parquet at all")
    with pytest.raises(QueryError, match=name):
        answer(three)
    assert ("error", "damaged") in kinds(three)
    mend(three)
    assert set(answer(three)) == set(before if name == "y.parquet" else steps_of(0, 2))


@pytest.fixture
def compacted(store):
    """Three parts in one compacted file, and one part more."""
    fill(store, parts=3)
    compact(store, "r", 0, grace_seconds=0)
    delete_retired(store, "r", 0, grace_seconds=0)
    fill(store, parts=1, first=13, seq=3)
    return store


@pytest.mark.parametrize("state", ["broken", "gone", "all manifests gone", "half broken"])
def test_a_compaction_s_manifest_is_derived_from_its_files(compacted, state):
    path = compacted.manifests("r") / "compaction" / "rank=0.json"
    if state == "broken":
        path.write_text("{")
    elif state == "half broken":
        path.write_text('{"generation": 1, "replaces": {}, "files": {"steps": [{}]}, "retired": []}')
    elif state == "gone":
        path.unlink()
    else:
        shutil.rmtree(compacted.path / "_manifests")
        with pytest.raises(StoreError, match="verify --repair"):
            connect(compacted.path)
    if state != "all manifests gone":
        assert "error" in dict(kinds(compacted))
    mend(compacted)
    assert answer(compacted) == written(4)
    fill(compacted, attempt=1, parts=1, first=11)
    surviving = connect(compacted.path).execute("SELECT attempt, step FROM steps ORDER BY step").fetchall()
    assert surviving == [(0, s) for s in range(1, 11)] + [(1, s) for s in range(11, 15)]
    compact(compacted, "r", 0, grace_seconds=0)
    assert verify(compacted.path) == []


def test_where_attempts_began_outlives_their_manifests(store):
    fill(store, parts=3)
    fill(store, attempt=1, parts=2, first=6)
    compact(store, "r", 0, grace_seconds=0)
    delete_retired(store, "r", 0, grace_seconds=0)
    question = "SELECT attempt, step FROM steps ORDER BY ALL"
    before = connect(store.path).execute(question).fetchall()
    shutil.rmtree(store.path / "_manifests")
    mend(store)
    assert connect(store.path).execute(question).fetchall() == before


def test_a_lost_compacted_file_is_replaced_by_parts_that_are_still_there(store):
    fill(store, parts=3)
    compact(store, "r", 0, grace_seconds=60)
    fill(store, parts=1, first=13, seq=3)
    truncate(store.path / HIDDEN / "compact-1-0.merged")
    assert ("error", "damaged") in kinds(store)
    assert mend(store) == ["compaction", "quarantined"]
    assert answer(store) == written(4)
    compact(store, "r", 0, grace_seconds=0)
    assert answer(store) == written(4)
    assert verify(store.path) == []


def test_rows_of_a_lost_compacted_file_are_noted_part_by_part(compacted):
    truncate(compacted.path / PARTITION / "compact-1-0.parquet")
    mend(compacted)
    assert answer(compacted) == written(4)[12:]
    lost = [f for f in verify(compacted.path) if f.kind == "lost"]
    assert len(lost) == 3


def test_parts_between_compacted_files_stay_where_a_file_was_lost(store):
    fill(store, parts=6)
    compact(store, "r", 0, grace_seconds=60, file_rows=2 * STEPS_A_PART)
    for seq in (0, 1, 4, 5):  # of the middle file alone the parts are still there
        (store.path / PARTITION / f"part-0-{seq}.parquet").unlink()
    (store.path / HIDDEN / "compact-1-1.merged").unlink()
    mend(store)
    assert answer(store) == written(6)
    compact(store, "r", 0, grace_seconds=0)
    delete_retired(store, "r", 0, grace_seconds=0)
    assert answer(store) == written(6)
    assert verify(store.path, deep=True) == []


def test_what_a_live_writer_does_is_not_reported_and_not_touched(store, make_writer):
    writer = make_writer()
    writer.submit(1, lambda: {"steps": {"loss": [1.0]}})
    assert writer.flush(10)
    part = store.write_part(rows("steps", 2), table="steps", run_id="r", rank=0, attempt=0, seq=1)
    temporary = store.path / PARTITION / ".part-0-2.parquet.1.tmp"
    temporary.write_bytes(b"half")
    assert verify(store.path) == []
    assert [action.kind for action in repair(store.path)] == ["skipped"]
    assert temporary.exists()
    assert writer.close(10)
    assert kinds(store) == [("warning", "temporary"), ("warning", "unlisted")]
    assert mend(store) == ["adopted", "manifest", "removed"]
    assert part.file in {p.file for p in store.read_manifest("r", 0, 0).parts}


def test_a_run_is_live_while_its_writer_lives(store, make_writer):
    store.claim_attempt("r")
    writer = make_writer()
    assert is_live(store, "r")
    writer.submit(1, lambda: {"steps": {"loss": [1.0]}})
    assert writer.close(10)
    assert not is_live(store, "r")


def test_a_run_of_another_host_is_live_as_long_as_it_writes(store, monkeypatch):
    fill(store, parts=1)
    assert not attempt_is_live(store, "r", 0)
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    assert attempt_is_live(store, "r", 0)
    long_ago(store.manifest_path("r", 0, 0), store.manifests("r") / "attempt=0")
    assert not attempt_is_live(store, "r", 0)


@pytest.mark.parametrize("look", [verify, repair])
def test_what_is_no_store_is_refused(tmp_path, look):
    with pytest.raises(StoreError, match="no store"):
        look(tmp_path / "nowhere")
