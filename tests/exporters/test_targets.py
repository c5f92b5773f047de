"""The file by which Prometheus finds a rank: whole, there while it is true, and gone afterwards."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from lm_telemetry.exporters.targets import Target

PLACE = {"address": "127.0.0.1:9108", "scheme": "http"}


def files(directory):
    return sorted(path.name for path in directory.iterdir())


def test_it_says_where_to_scrape(tmp_path):
    target = Target(str(tmp_path / "new" / "er"), run_id="llama-1", rank=3, **PLACE)
    assert target.path.name == "llama-1-3.json"
    (group,) = json.loads(target.path.read_text())
    assert group["targets"] == ["127.0.0.1:9108"]
    assert (group["labels"]["__scheme__"], group["labels"]["__metrics_path__"]) == ("http", "/metrics")
    assert all(name.startswith("__") for name in group["labels"]), "others would become labels of every series"
    assert files(target.path.parent) == ["llama-1-3.json"]
    target.remove()
    target.remove()
    assert files(target.path.parent) == []


def test_a_name_cannot_leave_the_directory(tmp_path):
    target = Target(str(tmp_path / "in"), run_id="../../evil\n", rank=0, **PLACE)
    assert target.path.parent == tmp_path / "in"
    target.remove()


def test_each_rank_has_its_own_and_removes_no_other(tmp_path):
    ranks = [Target(str(tmp_path), run_id="r", rank=rank, **PLACE) for rank in range(3)]
    ranks[1].remove()
    assert files(tmp_path) == ["r-0.json", "r-2.json"]
    (tmp_path / "r-0.json").unlink()
    later = Target(str(tmp_path), run_id="r", rank=0, **PLACE)
    ranks[0].remove()
    assert files(tmp_path) == ["r-0.json", "r-2.json"], "the file of a later process of the same rank stays"
    later.remove()
    ranks[2].remove()


CHILD = """
import os, sys, time
from lm_telemetry.exporters.targets import Target
target = Target(sys.argv[1], run_id=sys.argv[2], rank=0, address="127.0.0.1:1", scheme="http")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child(tmp_path):
    started = []

    def start(run_id):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path), run_id],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_what_a_killed_process_left_goes_with_the_next(tmp_path, child):
    killed, _, ended = child("killed"), child("alive"), child("ended")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    ended.communicate()
    assert files(tmp_path) == ["alive-0.json", "killed-0.json"], "a process that ends takes its file along"
    foreign = json.loads((tmp_path / "killed-0.json").read_text())
    foreign[0]["labels"]["__lm_telemetry_host"] = "another-host"
    (tmp_path / "foreign.json").write_text(json.dumps(foreign))
    (tmp_path / "hand-written.json").write_text('[{"targets": ["127.0.0.1:1"]}]')
    (tmp_path / "broken.json").write_text("[")
    own = Target(str(tmp_path), run_id="own", rank=0, **PLACE)
    assert files(tmp_path) == ["alive-0.json", "broken.json", "foreign.json", "hand-written.json", "own-0.json"]
    own.remove()


def test_a_forked_child_leaves_it(tmp_path):
    target = Target(str(tmp_path), run_id="r", rank=0, **PLACE)
    child = os.fork()
    if child == 0:
        target.remove()
        os._exit(0)
    os.waitpid(child, 0)
    assert files(tmp_path) == ["r-0.json"]
    target.remove()


def test_a_directory_that_cannot_be_written_raises_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Target(str(tmp_path / "file"), run_id="r", rank=0, **PLACE)
    (tmp_path / "r-0.json").mkdir()
    with pytest.raises(OSError, match="r-0"):
        Target(str(tmp_path), run_id="r", rank=0, **PLACE)
    assert files(tmp_path) == ["file", "r-0.json"]
