"""Where a query is wrong, and what may have been meant."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_telemetry.cli.hints import relations
from lm_telemetry.meant import missing, nearest


@pytest.mark.parametrize(
    ("query", "line", "marked"),
    [
        ("SELECT step,\n       los\nFROM steps", "LINE 2:        los", "los"),
        ("FROM steps\nJOIN trainign USING (step)", "LINE 2: JOIN trainign USING (step)", "trainign"),
        ("SELECT step FRM steps", "LINE 1: SELECT step FRM steps", "steps"),
        ("SELECT frobnicate(step) FROM steps", "LINE 1: SELECT frobnicate(step) FROM steps", "frobnicate(step)"),
        ("SELECT 'ä', x.loss FROM steps", "LINE 1: SELECT 'ä', x.loss FROM steps", "x.loss"),
        ("SELECT step FROM steps WHERE step = 'ten'", "LINE 1: SELECT step FROM steps WHERE", "'ten'"),
    ],
)
def test_a_caret_is_under_what_is_wrong(lmt, query, line, marked):
    code, out, err = lmt("sql", query)
    assert (code, out) == (2, "")
    lines = err.splitlines()
    (place,) = (i for i, text in enumerate(lines) if text.startswith(line))
    carets = lines[place + 1]
    begin = len(carets) - len(carets.lstrip())
    assert set(carets.strip()) == {"^"}
    assert lines[place][begin:].startswith(marked[: len(carets.strip())])


@pytest.mark.parametrize(
    ("query", "hint"),
    [
        ("FROM trainign", 'Did you mean "training"'),  # DuckDB's own, which knows views that no query has named yet
        ("FROM trainign", "Near it: training."),
        ("FROM zzzzz", "`lmt views` lists the views"),
        ("SELECT los FROM steps", 'Candidate bindings: "loss"'),
        ("SELECT los FROM steps", "Near it: loss (in steps, "),
        ("SELECT entropy FROM steps", "Near it: entropy (in heads, tokens, "),
        ("SELECT s.entropi FROM steps AS s", "Near it: entropy (in heads, tokens, "),
        ("SELECT stepz.loss FROM steps", "Near it: steps"),
        ("FROM read_csv('/etc/passwd')", "--allow-external"),
    ],
)
def test_near_names_are_told(lmt, query, hint):
    code, _, err = lmt("sql", query)
    assert code == 2
    assert hint in err


def test_every_table_and_view_is_known_with_its_columns(lmt):
    for name, columns in relations().items():
        code, out, _ = lmt("sql", f"SELECT column_name FROM (DESCRIBE {name})", "--format", "csv")
        assert (code, tuple(out.split()[1:])) == (0, columns), name


@given(st.text())
def test_a_name_is_near_to_itself(name):
    assert nearest(name, ["another", name, "one"])[0].lower() == name.lower()


def test_what_is_missing_is_told_in_one_line():
    assert missing("run", "a\nb", ["ab", "c"], "look") == "there is no run a\\nb; near it: ab"
    assert missing("run", "qqq", ["ab"], "look there") == "there is no run qqq; look there"
