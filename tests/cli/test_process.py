"""The command line from outside: a process, its pipes, and what it loads."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

LMT = [sys.executable, "-c", "import sys; from lm_telemetry.cli import main; sys.exit(main())"]
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""An environment in which what is written may wait until the interpreter ends."""


def test_parquet_goes_through_a_pipe(store, tmp_path):
    words = ["sql", "FROM steps", "--format", "parquet", "--store", str(store.path)]
    done = subprocess.run([*LMT, *words], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    (tmp_path / "piped.parquet").write_bytes(done.stdout)
    assert pq.read_table(tmp_path / "piped.parquet").num_rows == 3


@pytest.mark.parametrize("rows", [1, 20000])
@pytest.mark.parametrize("format_", ["csv", "json", "parquet", "table"])
def test_a_reader_that_has_gone_is_not_an_error_to_shout_about(store, format_, rows):
    query = f"SELECT md5(i::VARCHAR) AS text FROM range({rows}) AS r(i)"
    words = ["sql", query, "--format", format_, "--store", str(store.path)]
    # The reading end is closed before the writer starts: no matter how much a pipe holds, the first byte meets it.
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([*LMT, *words], stdout=write, stderr=subprocess.PIPE, env=BUFFERED)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        (["--help"], {"torch", "transformers", "duckdb", "pyarrow", "numpy"}),
        (["views"], {"torch", "transformers", "numpy", "pandas"}),
        (
            ["sql", "SELECT 1"],
            {"torch", "transformers", "pyarrow", "numpy", "pandas", "readline", "lm_telemetry.store"},
        ),
        (["sql", "FROM training"], {"torch", "transformers", "pyarrow", "numpy", "pandas"}),
        (["describe", "steps"], {"torch", "transformers", "pyarrow", "numpy", "pandas"}),
        (["du"], {"torch", "transformers", "pyarrow", "numpy", "pandas"}),
        (["runs"], {"torch", "transformers", "pandas"}),
    ],
)
def test_commands_load_no_more_than_they_need(store, words, unwanted):
    program = (
        "import sys\n"
        "from lm_telemetry.cli import main\n"
        "try:\n    code = main()\nexcept SystemExit as stop:\n    code = stop.code\n"
        f"print(sorted({unwanted!r} & set(sys.modules)), code, file=sys.stderr)\n"
    )
    environment = {"PATH": "", "LM_TELEMETRY_STORE": str(store.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == "[] 0\n"


def test_a_query_is_piped_in(store):
    words = ["sql", "--format", "csv", "--store", str(store.path)]
    done = subprocess.run([*LMT, *words], input=b"SELECT count(*) AS n FROM steps", capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"n\n3\n", b"")


def test_bytes_that_are_no_text_are_refused(store):
    done = subprocess.run([*LMT, "sql", b"SELECT '\xff'", "--store", str(store.path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "lmt: a query is text in UTF-8, and this is not\n"


def test_a_box_is_drawn_where_there_is_only_ascii(store):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*LMT, "runs", "--store", str(store.path)], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"first" in done.stdout


@pytest.mark.parametrize("words", [["sql", "SELECT 1"], ["sql", "SELECT 1", "--format", "csv"], ["runs"], ["views"]])
def test_a_disk_that_is_full_is_told_in_a_line(store, words):
    environment = BUFFERED | {"LM_TELEMETRY_STORE": str(store.path)}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([*LMT, *words], stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert (done.returncode, done.stderr) == (1, "lmt: [Errno 28] No space left on device\n")


def test_output_that_is_closed_is_told_in_a_line(store):
    words = ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *LMT, "runs", "--store", str(store.path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "lmt: standard output is closed\n")


def test_ctrl_c_ends_a_query_that_would_take_days(store):
    query = "SELECT sum(a.range * b.range) FROM range(100000000) AS a, range(100000000) AS b"
    running = subprocess.Popen([*LMT, "sql", query, "--store", str(store.path)], stderr=subprocess.PIPE)
    # It is at work when it has taken more time than it takes to begin.
    while os.sysconf("SC_CLK_TCK") * 1 > cpu_ticks(running.pid):
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=30)
    assert (running.returncode, error) == (130, b"")


def cpu_ticks(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
