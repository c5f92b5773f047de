"""Curves and strips, dot by dot."""

import math

import pytest

from lm_telemetry.exporters.watch.plot import curve, strip
from lm_telemetry.exporters.watch.reading import Bucket


def buckets(*values):
    return [
        Bucket(step=i, last=i, low=None if not math.isfinite(v) else v, high=None if not math.isfinite(v) else v,
               nonfinite=int(not math.isfinite(v)))
        for i, v in enumerate(values)
    ]  # fmt: skip


def test_a_line_goes_from_corner_to_corner():
    drawn = curve(buckets(0, 1), 10, 5)
    assert (drawn.low, drawn.high) == (0, 1)
    for place, text in enumerate(drawn.lines):  # one stroke, from the lower left to the upper right
        inked = [i for i, c in enumerate(text) if c != " "]
        assert inked
        assert all(abs(i - 2 * (4 - place) - 0.5) <= 1.5 for i in inked)


def test_each_column_has_ink_where_the_line_is_whole():
    drawn = curve(buckets(3, 1, 4, 1, 5, 9, 2, 6), 20, 4)
    assert all(any(line[x] != " " for line in drawn.lines) for x in range(20))


def test_a_value_that_is_none_breaks_the_line_and_is_marked():
    drawn = curve(buckets(1, 1, math.nan, 1, 1), 20, 3)
    assert drawn.broken == {9}
    assert all(line[8] == " " for line in drawn.lines)


def test_a_single_spike_does_not_flatten_the_rest():
    drawn = curve(buckets(*[1 + (i % 2) for i in range(80)], 1000, *[1 + (i % 2) for i in range(80)]), 100, 4)
    assert drawn.high == 2
    assert drawn.cut == {49}


@pytest.mark.parametrize("values", [(), (math.nan,), (1.0,), (2.0, 2.0), (0.0, math.inf)])
def test_little_can_be_drawn_too(values):
    drawn = curve(buckets(*values), 10, 3)
    assert [len(line) for line in drawn.lines] == [10, 10, 10]
    assert math.isnan(drawn.low) == (not any(map(math.isfinite, values)))


def test_ascii():
    drawn = curve(buckets(*range(8)), 4, 2, ascii_only=True)
    assert "".join(drawn.lines).isascii()
    assert any(c != " " for line in drawn.lines for c in line)


@pytest.mark.parametrize(
    ("values", "log", "text"),
    [
        ((0, 1, 2, 3, 4, 5, 6, 7), False, "▁▂▃▄▅▆▇█"),
        ((1, 10, 100, 1e7), True, "▁▂▃█"),
        ((1, None, math.nan, math.inf, 2), False, "▁  !█"),
        ((0, 1, 2), True, "▁▁█"),
        ((3, 3), False, "▅▅"),
        ((None, math.nan), False, "  "),
    ],
)
def test_a_strip(values, log, text):
    assert strip(values, log=log) == text
    assert strip(values, log=log, ascii_only=True).isascii()
