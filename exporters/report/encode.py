"""The numbers of a report as one JSON document that is safe inside an HTML page.

Decisions:

- An array is base64 of little-endian float32, or of float64 where float32 would lose what is seen: values of a place
  (`x`, `columns`) must come out exactly, and no finite value may become infinite or zero. Values otherwise keep a
  relative error below 6e-8. Base64 is a third larger than the bytes, and needs neither a second file nor a decoder
  that some browsers lack.
- Arrays of equal content are kept once: figures over the same steps share them.
- The JSON is ASCII without `<`, `>` and `&`, so that no name in it can end the element that holds it or begin another.
- NaN and infinity outside of arrays become null, which JSON has.

What is drawn of it, and how, is in `assets/`.
"""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_telemetry.exporters.report.model import Heatmap, Lines

if TYPE_CHECKING:
    from lm_telemetry.exporters.report.model import Array, Body, Figure, Report

_PLACES = {"x", "columns"}
"""Fields whose values are read as places, such as steps."""

_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}


class Pool:
    """Arrays of a page, each content once.

    Attributes:
        arrays: [`f4` or `f8`, base64] of each, in the order they came.
    """

    def __init__(self) -> None:
        self.arrays: list[list[str]] = []
        self._indices: dict[tuple[str, bytes], int] = {}

    def add(self, values: Array, *, exact: bool) -> int:
        """Index of the array of these values.

        Args:
            values: numbers or booleans of any shape, kept in row-major order.
            exact: whether a value that float32 does not have must not be rounded.
        """
        wide = np.ascontiguousarray(values, dtype="<f8")
        kind = "f4" if _fits(wide, exact=exact) else "f8"
        content = wide.astype(f"<{kind}").tobytes()
        if (kind, content) not in self._indices:
            self._indices[kind, content] = len(self.arrays)
            self.arrays.append([kind, base64.b64encode(content).decode()])
        return self._indices[kind, content]


def document(report: Report) -> str:
    """What the scripts of the page need of a report: a JSON object of `runs`, `arrays` and `figures`.

    A figure has its `kind` (of the body, in lower case), `body` (its fields; arrays as `{"array": index}`), `family`
    (figures of which are coloured alike) and, if it has an x axis to be shared, `reach` ([lowest, highest] x, or null).
    """
    pool = Pool()
    figures = [_figure(figure, pool) for figure in report.figures]
    whole = {"runs": [run.run_id for run in report.runs], "arrays": pool.arrays, "figures": figures}
    return json.dumps(whole, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def _figure(figure: Figure, pool: Pool) -> dict[str, Any]:
    encoded: dict[str, Any] = {
        "kind": type(figure.body).__name__.lower(),
        "family": family(figure.id),
        "body": _plain(figure.body, pool),
    }
    if isinstance(figure.body, Lines | Heatmap):
        encoded["reach"] = reach(figure.body)
    return encoded


def family(figure_id: str) -> str:
    """Name of a figure without the number of its run: `rms` of `rms-2`."""
    return re.sub(r"-\d+$", "", figure_id)


def reach(body: Body) -> list[float] | None:
    """Lowest and highest x of a figure: of positive ones for a log scale; None if there is none."""
    if isinstance(body, Lines):
        places = [line.x for line in body.lines]
    elif isinstance(body, Heatmap):
        places = [body.columns]
    else:
        return None
    every = np.concatenate([np.ravel(np.asarray(x, dtype=np.float64)) for x in places] or [np.empty(0)])
    finite = every[np.isfinite(every) & ((every > 0) | (body.x.scale != "log"))]
    return [float(finite.min()), float(finite.max())] if finite.size else None


def _plain(value: Any, pool: Pool, *, exact: bool = False) -> Any:
    """A value of a body as JSON has it."""
    if is_dataclass(value):
        names = [field.name for field in fields(value)]
        return {name: _plain(getattr(value, name), pool, exact=name in _PLACES) for name in names}
    if isinstance(value, np.ndarray):
        return {"array": pool.add(value, exact=exact)}
    if isinstance(value, tuple):
        return [_plain(entry, pool) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _fits(wide: Array, *, exact: bool) -> bool:
    """Whether float32 has these values closely enough."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = wide.astype(np.float32).astype(np.float64)
    if exact:
        return bool(np.array_equal(narrow, wide, equal_nan=True))
    normal = np.abs(wide) >= np.finfo(np.float32).tiny
    return bool(np.all((np.isfinite(narrow) == np.isfinite(wide)) & (normal | (wide == 0) | np.isnan(wide))))
