"""Which runs of a store are served, and what becomes of the page when the store, or a run, cannot be read."""

import shutil
import subprocess
import time

import pyarrow.parquet as pq
import pytest
import remote_stores
from planted import plant
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from lm_telemetry.exporters import stored
from lm_telemetry.exporters.holdings import Holdings
from lm_telemetry.exporters.stored import Choice, StoredRuns
from lm_telemetry.store import Store

DAY = 86400.0


@pytest.fixture
def store(tmp_path):
    return Store.open_for_writing(tmp_path / "store")


@pytest.fixture
def serve(store):
    """`serve(...)` makes the page's source; what it tells is in `.told`."""

    def make(*, is_live=lambda *_: False, name=str(store.path), is_remote=False, **choice):
        told = []
        runs = StoredRuns(Holdings(name, is_remote=is_remote), Choice(**choice), is_live=is_live, tell=told.append)
        runs.told = told
        return runs

    return make


def run(store, run_id, loss=1.0, *, days_ago=0.0, rank=0):
    """The next step of a run, written so long ago."""
    path = store.manifest_path(run_id, rank, 0)
    step = 1 + len(list(store.partition("steps", run_id, rank).glob("*.parquet")))
    plant(store, "steps", [{"step": step, "loss": loss, "seconds": 1.0}], run_id=run_id, rank=rank)
    then = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() - days_ago * DAY))
    text = path.read_text()
    updated = text.partition('"updated":"')[2].partition('"')[0]
    path.write_text(text.replace(updated, then))


def values(page, name):
    """Value by `run_id`, or by the only label there is."""
    samples = [s for f in parse(page.text.decode()) for s in f.samples if s.name == f"lm_telemetry_{name}"]
    return {s.labels.get("run_id") or s.labels.get("what", ""): s.value for s in samples}


def losses(page):
    return values(page, "steps_loss")


def test_the_newest_runs_are_served_and_the_others_counted(store, serve):
    for i in range(5):
        run(store, f"r{i}", float(i), days_ago=i / 10)
    run(store, "old", days_ago=3)
    runs = serve(max_runs=2)
    page = runs.poll()
    assert losses(page) == {"r0": 0, "r1": 1}
    assert runs.served == ["r0", "r1"]
    assert values(page, "export_left_out_runs") == {"": 3}
    run(store, "r4", 9.0)
    assert losses(runs.poll()) == {"r4": 9, "r0": 0}
    assert set(losses(serve(since_seconds=4 * DAY).poll())) == {"old", *(f"r{i}" for i in range(5))}


def test_runs_that_are_named_are_served_alone_and_of_any_age(store, serve):
    for name in ("a", "b", "old"):
        run(store, name, days_ago=300 if name == "old" else 0)
    runs = serve(runs=("old", "a", "later"), max_runs=1)
    assert set(losses(runs.poll())) == {"old", "a"}
    assert runs.told == [f"the store {store.path} has no run later yet"]
    run(store, "later")
    assert set(losses(runs.poll())) == {"old", "a", "later"}
    assert len(runs.told) == 1


def test_a_store_that_is_all_old_says_why_nothing_is_served(store, serve):
    run(store, "old", days_ago=3)
    runs = serve()
    page = runs.poll()
    assert losses(page) == {}
    assert runs.told == [f"nothing of the store {store.path} is served: none of its 1 runs was written lately"]
    assert values(page, "export_failures_total") == {"store": 0, "run": 0}


def test_nothing_is_read_if_nothing_has_changed(store, serve, monkeypatch):
    for name in ("a", "b"):
        run(store, name)
    runs = serve()
    first = runs.poll()
    read = []
    database = Holdings.database
    monkeypatch.setattr(Holdings, "database", lambda self: (read.append(1), database(self))[1])
    second = runs.poll()
    assert read == []
    assert losses(second) == losses(first)
    assert (
        values(second, "export_refresh_timestamp_seconds")[""] >= values(first, "export_refresh_timestamp_seconds")[""]
    )
    run(store, "b", 5.0)
    assert losses(runs.poll()) == {"a": 1, "b": 5}
    assert read == [1]


def test_whether_a_run_is_live_is_asked_while_it_is(store, serve):
    for name in ("a", "b"):
        run(store, name)
    live, asked = {"a"}, []
    runs = serve(is_live=lambda run_id, _: asked.append(run_id) or run_id in live)
    assert values(runs.poll(), "run_live") == {"a": 1, "b": 0}
    asked.clear()
    live.clear()
    assert values(runs.poll(), "run_live") == {"a": 0, "b": 0}
    assert asked == ["a"], "a run that was over and was not written since is over"
    runs.poll()
    assert asked == ["a"]
    live.add("b")
    run(store, "b")
    assert values(runs.poll(), "run_live") == {"a": 0, "b": 1}


def test_a_damaged_run_keeps_its_last_values_and_the_others_go_on(store, serve):
    for name in ("bad", "good"):
        run(store, name)
    runs = serve()
    runs.poll()
    for name in ("bad", "good"):
        run(store, name, 2.0)
    damaged = store.partition("steps", "bad", 0) / "part-0-1.parquet"
    whole = damaged.read_bytes()
    damaged.write_bytes(b"PAR1 and no more")
    for polls in (1, 2):
        page = runs.poll()
        assert losses(page) == {"bad": 1, "good": 2}
        assert values(page, "run_seconds_total") == {"bad": 1, "good": 2}
        assert values(page, "export_failures_total") == {"store": 0, "run": polls}
    (told,) = runs.told
    assert told.startswith("run bad cannot be read; what was read of it before is still served: ")
    assert str(damaged) in told
    assert "\n" not in told
    damaged.write_bytes(whole)
    assert losses(runs.poll()) == {"bad": 2, "good": 2}
    run(store, "bad", 3.0)
    damaged.with_name("part-0-2.parquet").write_bytes(b"again")
    runs.poll()
    assert len(runs.told) == 2, "new trouble is told"


def test_a_file_without_a_column_that_rows_need_is_trouble_of_its_run_alone(store, serve):
    run(store, "good")
    directory = store.partition("steps", "odd", 0)
    directory.mkdir(parents=True)
    pq.write_table(pq.read_table(store.partition("steps", "good", 0)).select(["loss"]), directory / "x.parquet")
    runs = serve()
    assert losses(runs.poll()) == {"good": 1}
    assert runs.failures == {"store": 0, "run": 1}


@pytest.mark.parametrize("what", ["deleted", "emptied", "damaged"])
def test_the_page_outlives_the_store(store, serve, what):
    run(store, "r", 4.0)
    runs = serve()
    before = runs.poll()
    manifest = store.manifest_path("r", 0, 0)
    if what == "damaged":
        run(store, "r", 5.0)
        manifest.write_text("{")
    else:
        shutil.rmtree(store.path)
        if what == "emptied":
            store.path.mkdir()
    for _ in range(2):
        page = runs.poll()
    assert losses(page) == {"r": 4}
    assert values(page, "export_failures_total") == {"store": 2, "run": 0}
    stamp = "export_refresh_timestamp_seconds"
    assert values(page, stamp) == values(before, stamp)
    assert len(runs.told) == 1
    assert runs.told[0].startswith(f"the store {store.path} cannot be read")
    shutil.rmtree(store.path, ignore_errors=True)
    Store.open_for_writing(store.path)
    for loss in (9.0, 6.0)[what != "damaged" :]:
        run(store, "r", loss)
    assert losses(runs.poll()) == {"r": 6}


def test_a_run_that_is_gone_alone_is_gone_from_the_page(store, serve):
    for name in ("a", "b"):
        run(store, name)
    runs = serve()
    runs.poll()
    shutil.rmtree(store.manifests("a"))
    shutil.rmtree(store.path / "steps" / "run_id=a")
    page = runs.poll()
    assert losses(page) == {"b": 1}
    assert values(page, "run_live") == {"b": 0}
    assert runs.told == []


def test_a_store_may_come_later(tmp_path, serve):
    runs = serve(name=str(tmp_path / "later"))
    page = runs.poll()
    assert losses(page) == {}
    assert values(page, "export_failures_total") == {"store": 0, "run": 0}
    assert runs.told == [f"nothing of the store {tmp_path / 'later'} is served: it has no run yet"]
    run(Store.open_for_writing(tmp_path / "later"), "r")
    assert losses(runs.poll()) == {"r": 1}


def test_ranks_are_bounded_and_those_left_out_counted(store, serve, monkeypatch):
    monkeypatch.setattr(stored, "MAX_RANKS", 3)
    for rank in range(2):
        run(store, "new", rank=rank)
        run(store, "older", rank=rank, days_ago=0.5)
    page = serve().poll()
    found = {
        (s.labels["run_id"], s.labels["rank"])
        for f in parse(page.text.decode())
        for s in f.samples
        if "rank" in s.labels
    }
    assert found == {("new", "0"), ("new", "1"), ("older", "0")}
    assert values(page, "export_left_out_ranks") == {"": 1}


SERVED = ["\x1b]0;owned\x07", 'q"uo\\te', "<b>", "ünï\u202e", "x" * 230]
REFUSED = ["new\nline", "per%41cent", "glob[*]?", "\udcff"]
"""by the store's readers, since other engines would take them for other names; the last one is no text"""


@pytest.mark.parametrize("name", SERVED + REFUSED, ids=ascii)
def test_hostile_names_are_harmless(store, serve, name):
    run(store, "good", 3.0)
    runs = serve()
    runs.poll()
    directory = store.path / "steps" / f"run_id={name}" / "rank=0"
    directory.mkdir(parents=True)
    shutil.copy(store.partition("steps", "good", 0) / "part-0-0.parquet", directory)
    page = runs.poll()
    if name in SERVED:
        assert losses(page) == {"good": 3, name[:200]: 3}
        assert runs.told == []
    else:
        assert losses(page) == {"good": 3}
        assert runs.failures.total() == len(runs.told) == 1
    list(parse_openmetrics(page.openmetrics.decode()))
    checked = subprocess.run(["promtool", "check", "metrics"], input=page.text, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, b"")


def test_of_names_that_are_the_same_as_labels_one_is_served(store, serve):
    run(store, "good")
    for end in "ab":
        directory = store.path / "steps" / f"run_id={'x' * 200}{end}" / "rank=0"
        directory.mkdir(parents=True)
        shutil.copy(store.partition("steps", "good", 0) / "part-0-0.parquet", directory)
    runs = serve()
    page = runs.poll()
    assert len(losses(page)) == 2
    assert values(page, "export_left_out_runs") == {"": 1}
    assert len(runs.told) == 1


def test_a_store_at_an_url_is_served_and_its_outages_are_told(store, serve):
    remote_stores.clear()
    remote = remote_stores.Remote(remote_stores.URL)
    runs = serve(name=remote_stores.URL, is_remote=True)
    assert losses(runs.poll()) == {}
    assert runs.failures["store"] == 1
    run(store, "r", 7.0)
    for path in sorted(store.path.rglob("*")):
        if path.is_file():
            remote.put(str(path.relative_to(store.path)), path)
    page = runs.poll()
    assert losses(page) == {"r": 7}
    assert values(page, "written_rows_total") == {"r": 1}
    remote_stores.clear()
    assert losses(runs.poll()) == {"r": 7}
    assert runs.failures["store"] == 2
