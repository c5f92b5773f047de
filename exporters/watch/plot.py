"""Curves and strips as text: braille dots, eighths of a block, or plain ASCII where the terminal has no more.

A curve has two columns of dots a character and four rows a line. A stretch is drawn from its lowest to its highest
value, and joined to the one before, so that a single step that spikes is seen. Values above the axis are cut,
and marked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lm_telemetry.exporters.watch.reading import Bucket

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a braille character, from the top, left and right."""
_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = ".:-=+*#@"
_USUAL = 0.98
"""Share of a curve's stretches that the axis reaches over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A drawn curve.

    Attributes:
        lines: from the top, all of one width.
        low, high: the ends of its axis; NaN if there is nothing to draw.
        broken: columns in which a value was not finite.
        cut: columns that go beyond the axis.
    """

    lines: tuple[str, ...]
    low: float
    high: float
    broken: frozenset[int]
    cut: frozenset[int]


def curve(buckets: Sequence[Bucket], width: int, height: int, *, ascii_only: bool = False, least: float = 0.0) -> Curve:
    """Draw a course into `width` x `height` characters; the axis spans `least` at least, in the course's own unit."""
    spans, broken = _columns(buckets, 2 * width)
    low, high = _axis([span for span in spans if span is not None], least)
    dots = [[0] * width for _ in range(height)]
    rows = 4 * height
    cut: set[int] = set()
    before: tuple[int, int] | None = None
    for x, span in enumerate(spans):
        if x in broken:
            before = None
        if span is None:
            continue
        if span[1] > high:
            cut.add(x // 2)
        bottom, top = (_row(value, low, high, rows) for value in span)
        middle = (bottom + top) // 2
        for column, lower, upper in _joined(before, (x, middle)):
            _fill(dots, column, lower, upper)
        _fill(dots, x, bottom, top)
        before = (x, middle)
    draw = _plain if ascii_only else _braille
    return Curve(
        lines=tuple("".join(map(draw, line)) for line in dots),
        low=low,
        high=high,
        broken=frozenset(x // 2 for x in broken),
        cut=frozenset(cut),
    )


def strip(values: Sequence[float | None], *, log: bool, ascii_only: bool = False) -> str:
    """One character for each value, as high as it is among the others; a space for none."""
    finite = [v for v in values if v is not None and math.isfinite(v) and not (log and v <= 0)]
    bars = _ASCII_BARS if ascii_only else _BARS
    if not finite:
        return " " * len(values)
    scale = math.log if log else float
    low, high = scale(min(finite)), scale(max(finite))
    text = ""
    for value in values:
        if value is None or math.isnan(value):
            text += " "
        elif not math.isfinite(value):
            text += "!"
        elif log and value <= 0:
            text += bars[0]
        else:
            share = (scale(value) - low) / (high - low) if high > low else 0.5
            text += bars[min(len(bars) - 1, int(share * len(bars)))]
    return text


def _joined(start: tuple[int, int] | None, end: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
    """Column, lowest and highest row of a line between two points, without its ends' own columns."""
    if start is None:
        return
    (x0, y0), (x1, y1) = start, end
    if x1 == x0 + 1:  # neighbours meet half way
        half = (y0 + y1) // 2
        yield x0, min(y0, half), max(y0, half)
        yield x1, min(half, y1), max(half, y1)
    for x in range(x0 + 1, x1):
        first, last = (y0 + (y1 - y0) * (at - x0) // (x1 - x0) for at in (x, x + 1))
        yield x, min(first, last), max(first, last)


def _fill(dots: list[list[int]], x: int, bottom: int, top: int) -> None:
    """Set the dots of a column from one row to another, counted from below."""
    for row in range(bottom, top + 1):
        line, dot = divmod(4 * len(dots) - 1 - row, 4)
        dots[line][x // 2] |= _DOTS[dot][x % 2]


def _columns(buckets: Sequence[Bucket], width: int) -> tuple[list[tuple[float, float] | None], set[int]]:
    """Lowest and highest value of each column of dots, and the columns where something was not finite."""
    spans: list[tuple[float, float] | None] = [None] * width
    broken: set[int] = set()
    if not buckets:
        return spans, broken
    first, last = buckets[0].step, buckets[-1].step
    for bucket in buckets:
        x = (bucket.step - first) * (width - 1) // max(1, last - first)
        if bucket.nonfinite:
            broken.add(x)
        if bucket.low is not None and bucket.high is not None:
            known = spans[x]
            spans[x] = (
                (bucket.low, bucket.high) if known is None else (min(known[0], bucket.low), max(known[1], bucket.high))
            )
    return spans, broken


def _axis(spans: Sequence[tuple[float, float]], least: float) -> tuple[float, float]:
    if not spans:
        return math.nan, math.nan
    low = min(span[0] for span in spans)
    highs = sorted(span[1] for span in spans)
    high = highs[-1]
    usual = highs[min(len(highs) - 1, math.ceil(_USUAL * len(highs)))] if len(highs) >= 50 else high
    if high - low > 1.5 * (usual - low):
        high = usual
    return low, max(high, low + least)


def _row(value: float, low: float, high: float, rows: int) -> int:
    share = (value - low) / (high - low) if high > low else 0.5
    return min(rows - 1, max(0, int(share * rows)))


def _braille(mask: int) -> str:
    return chr(0x2800 + mask) if mask else " "


def _plain(mask: int) -> str:
    """The dots as one of a few ASCII characters."""
    high = [any(mask & bit for bit in row) for row in _DOTS]
    if sum(high) >= 3:
        return "|"
    return {(False, False): " ", (True, False): "'", (False, True): "."}.get((any(high[:2]), any(high[2:])), "-")
