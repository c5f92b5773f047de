"""A store with one short run in it, and `lmt` called in this process."""

import pytest

from lm_telemetry.cli import main
from lm_telemetry.columns import to_table
from lm_telemetry.store import Store


@pytest.fixture
def store(tmp_path):
    store = Store.open_for_writing(tmp_path / "store")
    for step, loss in ((1, 2.0), (2, None), (3, float("nan"))):
        rows = to_table("steps", {"loss": [loss], "tokens": [10]}, attempt=0, step=step, time_us=step * 1_000_000)
        store.write_part(rows, table="steps", run_id="first", rank=0, attempt=0, seq=step)
    return store


@pytest.fixture
def lmt(store, capsys):
    """`lmt(*words)` gives exit code, standard output and standard error."""

    def run(*words, store=store.path):
        at = ("--store", str(store)) if words[0] != "views" else ()
        code = main([*words, *at])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
