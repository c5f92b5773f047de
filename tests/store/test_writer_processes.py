"""The writer and the death of processes: killed, forked, and ended without a word."""

import signal
import subprocess
import sys
import textwrap
import time

import duckdb
import pyarrow.parquet as pq

PREAMBLE = """
    import os, sys, threading
    from lm_telemetry.store import Store
    from lm_telemetry.writer import Writer
    store = Store.open_for_writing(sys.argv[1])
    writer = Writer(store, run_id="r", rank=0, attempt=int(sys.argv[2]), flush_seconds=60)
    def loss(value):
        return lambda: {"steps": {"loss": [value]}, "layers": {"rms": [value] * 50}}
"""


def start(program, *arguments):
    source = textwrap.dedent(PREAMBLE) + textwrap.dedent(program)
    return subprocess.Popen([sys.executable, "-c", source, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_kill_9_loses_nothing_that_was_flushed_and_leaves_nothing_unreadable(tmp_path):
    # Five processes at once, each killed somewhere in a write a moment after a different number of flushes.
    program = """
        step = 0
        while True:
            step += 1
            writer.submit(step, loss(1.0))
            if writer.flush(30):
                print(step, flush=True)
    """
    victims = [start(program, tmp_path, attempt) for attempt in range(5)]
    for attempt, victim in enumerate(victims):
        acknowledged = 0
        try:
            while acknowledged < 3 + attempt:
                acknowledged = int(victim.stdout.readline())
            time.sleep(0.003 * attempt)
        finally:
            victim.kill()
        rest = victim.communicate(timeout=10)[0].split("\n")
        assert victim.returncode == -signal.SIGKILL
        # A line that was cut short by the kill acknowledges nothing.
        acknowledged = max([acknowledged, *map(int, rest[:-1])])
        for table, per_step in (("steps", 1), ("layers", 50)):
            counted = duckdb.execute(
                f"SELECT count(*), count(DISTINCT step) FROM '{tmp_path}/{table}/*/*/part-{attempt}-*.parquet'"
                f" WHERE step <= {acknowledged}"
            ).fetchone()
            assert counted == (acknowledged * per_step, acknowledged)
    files = list(tmp_path.rglob("*.parquet"))
    assert all(pq.ParquetFile(file).metadata.num_rows > 0 for file in files)


def test_rows_are_flushed_when_the_interpreter_ends_without_close(tmp_path, rows_of):
    process = start("for step in (1, 2, 3): writer.submit(step, loss(1.0))", tmp_path / "store", 0)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert [row["step"] for row in rows_of("steps")] == [1, 2, 3]


def test_rows_are_flushed_when_the_script_raises(tmp_path, rows_of):
    process = start("writer.submit(1, loss(1.0)); sys.stderr = open(os.devnull, 'w'); 1 / 0", tmp_path / "store", 0)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(rows_of("steps")) == 1


def test_a_forked_child_neither_writes_nor_hangs(tmp_path, rows_of):
    process = start(
        """
        gate, started = threading.Event(), threading.Event()
        writer.submit(1, loss(1.0))
        writer.submit(2, lambda: started.set() or gate.wait(30) and {})  # the thread is busy when we fork
        started.wait(30)
        child = os.fork()
        if child == 0:
            writer.event("info", "from_child", "", step=9)
            answers = writer.submit(9, loss(9.0)), writer.flush(30), writer.close(30)
            sys.exit(7 if answers == (False, False, False) else 8)  # sys.exit: at-exit functions run in the child too
        _, status = os.waitpid(child, 0)
        gate.set()
        writer.submit(3, loss(1.0))
        print(os.waitstatus_to_exitcode(status), writer.close(30))
        """,
        tmp_path / "store",
        0,
    )
    output, _ = process.communicate(timeout=60)
    assert output.split() == ["7", "True"]
    assert [row["step"] for row in rows_of("steps")] == [1, 3]
    assert rows_of("events") == []


def test_a_signal_handler_may_submit_while_the_main_thread_does(tmp_path, rows_of):
    process = start(
        """
        import signal
        heard = []
        signal.signal(signal.SIGALRM, lambda *_: heard.append(writer.submit(10**6 + len(heard), loss(1.0))))
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        sent = 0
        while len(heard) < 50:
            sent += writer.submit(sent + 1, lambda: {})
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(sum(heard), writer.close(60))
        """,
        tmp_path / "store",
        0,
    )
    output, _ = process.communicate(timeout=60)
    accepted, closed = output.split()
    assert closed == "True"
    assert len(rows_of("steps")) == int(accepted) > 0


def test_two_launches_never_share_a_file(tmp_path):
    # The first is still flushing when the second has claimed its attempt.
    program = """
        import time
        attempt = store.claim_attempt("shared")
        mine = Writer(store, run_id="shared", rank=0, attempt=attempt, flush_seconds=60)
        for step in range(20):
            mine.submit(step, loss(1.0))
            mine.flush(30)
        print(attempt, mine.stats.parts)
    """
    processes = [start(program, tmp_path, index) for index in range(2)]
    outputs = [process.communicate(timeout=60)[0].split() for process in processes]
    assert sorted(attempt for attempt, _ in outputs) == ["0", "1"]
    parts = sum(int(count) for _, count in outputs)
    assert len(list(tmp_path.glob("*/run_id=shared/rank=0/*.parquet"))) == parts
