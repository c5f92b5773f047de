"""A store that somebody has been at: a query gives the right rows or says which file is wrong, and repair mends it.

Each case does a few random things to a store of two runs (one resumed, one compacted): files cut short, emptied,
overwritten, removed, renamed, copied, swapped for other tables' files; manifests the same; foreign files strewn about.
"""

import random
import shutil
from collections import Counter

import pytest
from store_trees import fill

from lm_telemetry.compaction import compact, delete_retired
from lm_telemetry.errors import QueryError, StoreError
from lm_telemetry.queries import connect
from lm_telemetry.repair import repair
from lm_telemetry.store import Store
from lm_telemetry.verify import verify

CASES = 30
ROWS = "SELECT run_id, rank, attempt, step, loss FROM raw.steps ORDER BY ALL"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    store = Store.open_for_writing(tmp_path_factory.mktemp("fuzz") / "store")
    fill(store, run_id="resumed", parts=3)
    fill(store, run_id="resumed", attempt=1, parts=2, first=9)
    fill(store, run_id="merged", parts=4)
    fill(store, run_id="merged", rank=1, parts=2)
    compact(store, "merged", 0, file_rows=8)
    delete_retired(store, "merged", 0, grace_seconds=0)
    fill(store, run_id="merged", parts=2, first=17, seq=4)
    compact(store, "merged", 0, file_rows=100)  # what it replaces is still there
    return store


def cut(rng, path):
    content = path.read_bytes()
    path.write_bytes(content[: rng.randint(0, len(content) - 1)] if content else b"")


def blank(rng, path):
    path.write_bytes(b"")


def overwrite_the_end(rng, path):
    content = bytearray(path.read_bytes())
    content[-8:] = rng.randbytes(8)
    path.write_bytes(content)


def remove(rng, path):
    path.unlink()


def rename(rng, path):
    path.rename(path.with_name(rng.choice(["part-0-77.parquet", "part-9-0.parquet", "x.parquet", "x.bak"])))


def put_a_directory(rng, path):
    path.unlink()
    path.mkdir()


def copy(rng, path):
    shutil.copy(path, path.with_name(rng.choice(["part-0-77.parquet", "part-1-40.parquet", "._copy", "copy.parquet"])))


def strew(rng, path):
    (path.parent / rng.choice(["notes.txt", ".DS_Store", "y.parquet", "part-0-x.parquet"])).write_bytes(
        rng.randbytes(9)
    )


HARMFUL = [cut, blank, overwrite_the_end, remove, rename, put_a_directory]
HARMLESS = [copy, strew]


def harm(store, seed):
    """Do a few random things; files that were harmed."""
    rng = random.Random(seed)
    harmed = []
    for _ in range(rng.randint(1, 3)):
        files = sorted(p for p in store.path.rglob("*") if p.is_file() and p.suffix in {".parquet", ".merged", ".json"})
        if seed % 2:
            files = [p for p in files if p.suffix != ".json"]
        path = rng.choice(files)
        action = rng.choice(HARMFUL + HARMLESS)
        if action in HARMFUL:
            harmed.append((action, path))
        elif path.suffix == ".json":
            continue
        action(rng, path)
    return harmed


def copied(whole, tmp_path):
    # Times are kept: runs without a manifest that can be read are over when nothing was written for long.
    shutil.copytree(whole.path, tmp_path / "store")
    return Store(tmp_path / "store")


def ask(store):
    """The error of a query, or its rows."""
    try:
        return None, Counter(connect(store.path).execute(ROWS).fetchall())
    except (StoreError, QueryError) as error:
        return error, None


@pytest.mark.parametrize("seed", range(CASES))
def test_a_query_is_right_or_names_what_is_wrong(whole, tmp_path, seed):
    expected = Counter(connect(whole.path).execute(ROWS).fetchall())
    store = copied(whole, tmp_path)
    harmed = harm(store, seed)
    manifests_are_gone = any(path.suffix == ".json" for _, path in harmed)
    error, found = ask(store)
    if error is None:
        # Fewer or more, only where nothing is left to say that a part is missing, or that it is a copy.
        assert found == expected or manifests_are_gone
    else:
        assert str(store.path) in str(error)
        assert "lmt verify" in str(error)
        assert any(finding.severity == "error" for finding in verify(store.path, deep=True))

    repair(store.path, deep=True, even_live=True)
    assert [f for f in verify(store.path, deep=True) if f.severity != "info"] == []
    assert repair(store.path, deep=True, even_live=True) == []
    found = Counter(connect(store.path).execute(ROWS).fetchall())
    assert found - expected == Counter()  # nothing twice, nothing that was not written
    lost = sum(expected.values()) - sum(found.values())
    spoilt = {path for action, path in harmed if path.suffix != ".json" and action is not rename}
    assert lost <= 24 * len(spoilt)
    if not spoilt:
        assert lost == 0
