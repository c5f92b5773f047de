"""Runs into S3 over real HTTP: read back by `connect` and `lmt sql`, through outages, silence, deaths and forks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import upload_children
from s3_endpoint import Endpoint, Silence
from tiny_models import batch, build

from lm_telemetry import observe
from lm_telemetry.cli import main
from lm_telemetry.errors import QueryError, SettingsError, StoreError
from lm_telemetry.queries import connect
from lm_telemetry.remote import Remote
from lm_telemetry.settings import Settings
from lm_telemetry.spool import Spool, spool_path
from lm_telemetry.verify_remote import verify_remote

URL = "s3://telemetry/runs/store"
QUICK = {"every": 1, "flush_seconds": 0.05, "instruments": {"activations": {}}, "strict": True}


@pytest.fixture
def endpoint(monkeypatch):
    endpoint = Endpoint()
    for name, value in endpoint.environment.items():
        monkeypatch.setenv(name, value)
    filesystem = Remote(URL).filesystem
    if filesystem.exists("telemetry"):
        filesystem.rm("telemetry", recursive=True)
    filesystem.mkdir("telemetry")
    yield endpoint
    endpoint.stop()


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def spawn(endpoint, tmp_path):
    """`spawn(program, *arguments)` starts one of `upload_children` on this test's endpoint and spool."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["upload_children"])
    processes = []

    def start(program, *arguments):
        place = (URL, str(tmp_path / "telemetry-spool"), endpoint.environment)
        processes.append(context.Process(target=program, args=(place, *arguments)))
        processes[-1].start()
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join(10)
        process.close()


def train(session, model, optimizer, steps):
    for seed in range(steps):
        loss = model(**batch(seed)).loss
        loss.backward()
        optimizer.step()
        session.step(loss=loss)
        optimizer.zero_grad()


def ask(query):
    with connect(URL) as con:
        return con.execute(query).fetchall()


def spooled():
    return list(spool_path(URL, "telemetry-spool").rglob("*.parquet"))


WRITER = """
    import os, sys, threading, time
    from lm_telemetry import session as sessions, spool as spools, uploader as uploaders
    from lm_telemetry.session import Session
    from lm_telemetry.settings import Settings
    class Model: pass
    uploaders.FIRST_WAIT_SECONDS = 0.1
    def begin(store, **settings):
        session = Session(Settings(store=store, **({"flush_seconds": 0.05, "run_id": "r"} | settings)))
        session.start(Model())
        return session
    def loss(value):
        return lambda: {"steps": {"loss": [float(value)]}}
"""


def start(program, *arguments, environment=None):
    source = textwrap.dedent(WRITER) + textwrap.dedent(program)
    return subprocess.Popen(
        [sys.executable, "-c", source, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (environment or {}),
    )


def run_to_the_end(program, *arguments, environment=None):
    """Standard output and standard error of a program that ends well."""
    process = start(program, *arguments, environment=environment)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output, errors


def test_a_run_and_its_answers(endpoint, capsys):
    model = build("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observe(model, optimizer=optimizer, store=URL, run_id="first", **QUICK) as session:
        train(session, model, optimizer, 3)
        assert session.flush()
    assert spooled() == []
    con = connect(URL)
    assert con.sql("SELECT run_id, rank, attempt, step FROM steps ORDER BY step").fetchall() == [
        ("first", 0, 0, step) for step in (1, 2, 3)
    ]
    assert con.execute(
        "SELECT count(DISTINCT (layer, site, step)) = count(*), count(*) > 9 FROM layers"
    ).fetchone() == (
        True,
        True,
    )
    assert con.execute("SELECT run_id, last_step, attempts FROM overview").fetchall() == [("first", 3, 1)]
    # The same connection sees what comes, and a run that resumes overtakes.
    with observe(model, optimizer=optimizer, store=URL, run_id="first", steps_done=1, **QUICK) as session:
        train(session, model, optimizer, 1)
    assert con.execute("SELECT step, attempt FROM steps ORDER BY step").fetchall() == [(1, 0), (2, 1)]
    assert con.execute("SELECT count(*) FROM raw.steps").fetchone() == (4,)
    with con.cursor() as other:
        assert other.execute("SELECT count(*) FROM raw.steps").fetchone() == (4,)
    assert main(["sql", "SELECT max(step) AS s FROM steps", "--store", URL, "--format", "csv"]) == 0
    assert capsys.readouterr().out.split() == ["s", "2"]


def test_the_command_line_reaches_nothing_else(endpoint, capsys):
    Remote(URL).put_json("_manifests/store.json", {})
    Remote(URL).filesystem.pipe_file("telemetry/secret.csv", b"a\n1\n")
    Path("local.csv").write_text("a\n1\n")
    reading = [
        "s3://telemetry/secret.csv",
        "s3a://telemetry/secret.csv",
        f"{URL}/../../secret.csv",
        f"{URL}x/y.csv",
        str(Path("local.csv").absolute()),
    ]
    for path in reading:
        assert main(["sql", f"FROM read_csv('{path}')", "--store", URL]) != 0
        assert "Permission" in capsys.readouterr().err
    con = connect(URL)  # not confined: the filesystem itself does not write, nor leave the store
    for query in (f"COPY (SELECT 1) TO '{URL}/x.csv'", "FROM read_csv('s3://telemetry/secret.csv')"):
        with pytest.raises(Exception, match=r"only read|outside the store"):
            con.execute(query).fetchall()


def test_what_is_no_store_or_cannot_be_read_is_said(endpoint, spawn):
    with pytest.raises(StoreError, match="no store at s3://telemetry/elsewhere"):
        connect("s3://telemetry/elsewhere")
    with pytest.raises(StoreError, match="bucket"):
        Spool("s3://no-such-bucket/store", "telemetry-spool", 2**30)
    assert not Remote(URL).filesystem.exists("no-such-bucket")
    with pytest.raises(StoreError, match=r"lm-telemetry\[remote\]"):
        connect("nosuchthing://telemetry/store")
    spawn(upload_children.write, "r", 1).join(60)
    (part,) = Remote(URL).find("steps")
    Remote(URL).filesystem.rm_file(f"telemetry/runs/store/{part}")
    with pytest.raises(QueryError, match=part):
        ask("SELECT * FROM steps")
    Remote(URL).put_json("_manifests/run_id=r/attempt=0/rank=0.json", {})
    with pytest.raises(StoreError, match=r"rank=0\.json"):
        ask("SELECT * FROM steps")


def test_an_outage_in_the_middle_loses_nothing(endpoint, monkeypatch):
    monkeypatch.setattr("lm_telemetry.uploader.FIRST_WAIT_SECONDS", 0.2)
    model = build("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observe(model, optimizer=optimizer, store=URL, **QUICK) as session:
        train(session, model, optimizer, 3)
        uploader = session._agent.session._uploader
        assert uploader.drain(20)
        endpoint.stop()
        train(session, model, optimizer, 3)
        assert session.flush()
        while not uploader.stats.failures:
            time.sleep(0.05)
        train(session, model, optimizer, 2)
        endpoint.start()
        train(session, model, optimizer, 2)
    assert ask("SELECT count(*), count(DISTINCT step), max(step) FROM steps") == [(10, 10, 10)]
    assert ask("SELECT count(*) FROM layers") == ask("SELECT 10 * count(*) FROM layers WHERE step = 1")
    assert [kind for (kind,) in ask("SELECT kind FROM events ORDER BY time")] == ["upload_failed", "upload_recovered"]
    assert spooled() == []


def test_a_silent_endpoint_stops_neither_training_nor_the_end(endpoint, spawn):
    # Its own time limits are minutes. The next run brings up what it left.
    program = """
        spools.REACH_SECONDS, sessions.UPLOAD_SECONDS = 0.3, 0.3
        session = begin(sys.argv[1])
        for step in range(1, 11):
            session.submit(step, loss(step))
            assert session.flush()
        session.finish()
    """
    silence = Silence()
    _, errors = run_to_the_end(program, URL, environment=silence.environment)
    assert silence.accepted > 0
    silence.close()
    assert "are left in" in errors
    assert len(spooled()) >= 10
    following = spawn(upload_children.write, "next", 1)
    following.join(60)
    assert following.exitcode == 0
    assert ask("SELECT run_id, attempt, count(*) FROM steps GROUP BY ALL ORDER BY 1") == [("next", 0, 1), ("r", 0, 10)]
    assert ask("SELECT kind FROM raw.events WHERE kind = 'spool_left'") == [("spool_left",)]
    assert spooled() == []


@pytest.mark.parametrize("is_down", [True, False])
def test_kill_9_with_rows_in_the_spool_and_a_restart(endpoint, spawn, is_down):
    if is_down:
        endpoint.stop()
    ours, theirs = multiprocessing.Pipe(duplex=False)
    run = spawn(upload_children.write_for_ever, "killed", theirs)
    acknowledged = 0
    while acknowledged < 20:
        assert ours.poll(60)
        acknowledged = ours.recv()
    run.kill()
    run.join(20)
    while ours.poll(0):
        acknowledged = ours.recv()
    assert run.exitcode == -signal.SIGKILL
    if is_down:
        endpoint.start()
    # At any moment the remote is a whole, maybe older, store: a file may be there that nothing lists yet.
    early = verify_remote(URL, deep=True) if not is_down else []
    assert [finding.kind for finding in early if finding.severity == "error"] == []
    again = spawn(upload_children.write, "next", 1)
    again.join(60)
    assert again.exitcode == 0
    query = "SELECT count(*), count(DISTINCT step), max(step) FROM steps WHERE run_id = 'killed'"
    ((count, distinct, last),) = ask(query)
    assert count == distinct == last
    assert acknowledged <= last <= acknowledged + 1
    assert ask("SELECT count(*) FROM steps WHERE run_id = 'next'") == [(1,)]
    assert verify_remote(URL, deep=True) == []


def test_a_process_that_closes_nothing_still_uploads(endpoint):
    program = """
        session = begin(sys.argv[1])
        for step in range(5):
            session.submit(step, loss(step))
        del session
        1 / 0
    """
    process = start(program, URL)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")
    assert ask("SELECT count(*) FROM steps") == [(5,)]


def test_a_forked_child_neither_uploads_nor_hangs(endpoint):
    output, errors = run_to_the_end(
        """
        session = begin(sys.argv[1])
        session.submit(1, loss(1))
        assert session._uploader.drain(20)
        child = os.fork()
        if child == 0:
            session.submit(9, loss(9))
            answers = session._uploader.drain(20), session._uploader.close(20)
            sys.exit(7 if answers == (False, False) else 8)  # at-exit functions run in the child, too
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        session.submit(2, loss(2))
        session.finish()
        """,
        URL,
    )
    assert (output.split(), errors) == (["7"], "")
    assert ask("SELECT step FROM steps ORDER BY step") == [(1,), (2,)]


def test_two_ranks_at_once(endpoint, spawn):
    ranks = [spawn(upload_children.write, "r", 30, rank, 0) for rank in range(2)]
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    assert ask("SELECT rank, count(*), count(DISTINCT step) FROM steps GROUP BY ALL ORDER BY 1") == [
        (0, 30, 30),
        (1, 30, 30),
    ]


def test_of_many_who_claim_at_once_each_has_a_number_of_its_own(endpoint, tmp_path):
    spools = [Spool(URL, str(tmp_path / str(index)), 2**30) for index in range(6)]
    gate = threading.Barrier(len(spools))

    def claim(spool):
        gate.wait(20)
        return spool.claim_attempt("r")

    with ThreadPoolExecutor(len(spools)) as pool:
        numbers = list(pool.map(claim, spools))
    assert sorted(numbers) == sorted(set(numbers))


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ("s3://user:secret@bucket/store", "without a password"),
        ("s3://", "bucket or directory"),
        ("s3://bucket/*", "without patterns"),
        ("simplecache::s3://bucket/store", "without patterns"),
        (Path("s3://bucket/store"), "as text"),
    ],
)
def test_urls_that_name_no_store(store, message):
    with pytest.raises(SettingsError, match=message) as caught:
        Settings(store=store)
    assert "secret" not in str(caught.value)


def test_settings_of_the_spool():
    assert Settings(store="file:///tmp/store").store == "/tmp/store"
    assert Settings(store=URL).store == URL
    for wrong in ({"spool": ""}, {"spool": "s3://bucket"}, {"spool_bytes": 0}, {"spool_bytes": True}):
        with pytest.raises(SettingsError):
            Settings(**wrong)
