"""What the shell offers to complete."""

import pytest

from lm_telemetry.catalogue import TABLES
from lm_telemetry.cli.complete import COMMANDS, Completer, candidates
from lm_telemetry.cli.hints import relations


@pytest.mark.parametrize(
    ("above", "line", "word", "some"),
    [
        ("", "", ".d", [".describe"]),
        ("", ".describe ", "overv", ["overview"]),
        ("", "SELECT * FROM ", "trai", ["training"]),
        ("SELECT *\nFROM", "", "trai", ["training"]),
        ("", "from steps join ", "lay", ["layers", "layer_health"]),
        ("", "SELECT loss FROM raw", "raw.ste", []),
        ("", "FROM ", "raw.ste", ["raw.steps"]),
        ("", "SELECT * FROM steps WHERE ", "grad", ["grad_norm", "gradient_square"]),
        ("FROM heads", "SELECT ", "sink", ["sink_mass"]),
        ("", "SELECT steps.", "steps.loss", ["steps.loss"]),
        ("FROM heads AS h", "SELECT ", "h.ent", ["h.entropy"]),
        ("", "", "SEL", ["SELECT"]),
        ("", "", "sel", ["select"]),
    ],
)
def test_candidates(above, line, word, some):
    found = candidates(above, line, word)
    assert set(some) <= set(found)
    assert all(name.lower().startswith(word.lower()) for name in found)


def test_columns_are_those_of_the_tables_that_are_named():
    assert "entropy" not in candidates("FROM steps", "SELECT ", "")
    assert "entropy" in candidates("", "SELECT ", "ent")


def test_after_from_come_tables_and_views_alone():
    assert set(candidates("", "SELECT loss FROM ", "")) == set(relations())
    assert set(candidates("", "FROM ", "raw.")) == {f"raw.{table}" for table in TABLES}


def test_commands_are_offered_at_the_beginning_alone():
    assert candidates("", "", ".") == [name.split()[0] for name in COMMANDS]
    assert not [name for name in candidates("SELECT", "", ".") if name in COMMANDS]


def test_readline_asks_one_by_one():
    completer = Completer(lambda: ("", "FROM "))
    assert [completer("step", state) for state in (0, 1)] == ["steps", None]
