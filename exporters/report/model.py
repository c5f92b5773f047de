"""What a report consists of: findings and figures, as plain data, before any of it is drawn.

A figure carries its numbers as numpy arrays (NaN is a gap), the words a reader needs, and the SQL that made it. It
knows nothing of pixels or colours: `page` encodes it, and the scripts in `assets/` draw it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Level = Literal["ok", "note", "warning", "critical"]
Scale = Literal["linear", "log"]
"""A log scale leaves out what is not positive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One sentence of the verdict: something that is well, or is not, and since when."""

    level: Level
    title: str
    """what holds, in a few words: `Attention entropy has collapsed in 3 heads`"""
    text: str
    """what was seen, against which threshold, and what one usually does about it"""
    run_id: str
    since: int | None = None
    """step since which it holds; None if it has no beginning"""
    figure: str | None = None
    """`id` of the figure that shows it"""
    sql: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """What an axis or a colour means."""

    label: str
    unit: str = ""
    scale: Scale = "linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Values over x, with an interval where there is one."""

    name: str
    run: int
    """index into `Report.runs`, which chooses the colour"""
    x: Array
    y: Array
    low: Array | None = None
    high: Array | None = None
    role: Literal["value", "raw", "threshold"] = "value"
    """`raw` is drawn faint behind a smoothed `value`; `threshold` dashed"""
    points: bool = False
    """whether there are few enough that each is marked"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A stretch of x with a name, such as a regime; drawn behind the lines."""

    run: int
    start: float
    end: float
    label: str
    level: Level


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A moment on x: a spike, a restart."""

    run: int
    x: float
    label: str
    level: Level


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """A line chart; lines of several runs lie over each other."""

    x: Axis
    y: Axis
    lines: tuple[Line, ...]
    bands: tuple[Band, ...] = ()
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Heatmap:
    """A matrix of colours: rows (layers, from the first at the bottom) over columns (steps)."""

    x: Axis
    y: Axis
    z: Axis
    columns: Array
    """(C,) x of each column"""
    rows: tuple[str, ...]
    """(R,) names"""
    values: Array
    """(R, C)"""
    run: int
    middle: float | None = None
    """value at which two colours part; None for one hue from low to high"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistic:
    """A statistic of a `HeadMap`."""

    axis: Axis
    meaning: str
    values: Array
    """(L, H)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadMap:
    """A cell for each head, layer x head; the reader chooses the statistic."""

    layers: tuple[str, ...]
    statistics: tuple[Statistic, ...]
    run: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """A step of a pathway: what a position took from another (or kept, where `head` is -1) in one layer."""

    layer: int
    head: int
    query: int
    """position that receives"""
    key: int
    """position that is read"""
    share: float
    """how much of what arrives at the end came along here, 0 to 1"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pathways:
    """Routes along which the end of a probe sentence came from its beginning, over its tokens."""

    tokens: tuple[str, ...]
    """(T,) text of each position; its number where the text is not known"""
    layers: int
    target: int
    """position whose sources are drawn"""
    edges: tuple[Edge, ...]
    run: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Amounts by name, such as what each instrument cost."""

    x: Axis
    names: tuple[str, ...]
    values: Array
    """(runs, N)"""
    limit: float | None = None
    """a budget, drawn as a line"""


Body = Lines | Heatmap | HeadMap | Pathways | Bars


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Something to look at, and how to read it."""

    id: str
    """short, unique, fit for an URL fragment: `loss`; with the run's number where each of several has one of its own:
    `rms-1` and `rms-2`, which share one range of colours"""
    section: str
    """the heading it stands under: `Training`, `Curvature`, `Attention`, `Representation`, `Telemetry`"""
    title: str
    caption: str
    """what is seen and how it is read, one to three sentences for someone who was not there"""
    body: Body
    sql: str
    """the query that gives these numbers, to be pasted into `lmt sql`"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a run is, for the head of the page."""

    run_id: str
    facts: tuple[tuple[str, str], ...]
    """(name, value) pairs worth a line: model, parameters, optimizer, learning rate, steps, duration, tokens, hardware,
    versions"""
    state: str
    """`running`, `finished`, or what else is known, in words"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All of it."""

    runs: tuple[RunFacts, ...]
    verdict: str
    """the whole in one or two sentences"""
    findings: tuple[Finding, ...]
    """worst first"""
    figures: tuple[Figure, ...]
    written: str
    """when the report was made, UTC, ISO 8601"""
    store: str
    """name of the store, for the reader's orientation"""
    missing: tuple[str, ...] = ()
    """figures that could not be made, each with the reason: `No spectra were captured (instrument spectrum)`"""
