"""The command line from outside: a process, its pipes, and what it loads."""

import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

LMT = [sys.executable, "-c", "import sys; from lm_telemetry.cli import main; sys.exit(main())"]


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
        done = subprocess.run([*LMT, *words], stdout=write, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        (["--help"], {"torch", "transformers", "duckdb", "pyarrow", "numpy"}),
        (["views"], {"torch", "transformers", "numpy", "pandas"}),
        (["sql", "SELECT 1"], {"torch", "transformers"}),
        (["runs"], {"torch", "transformers"}),
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
