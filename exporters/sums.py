"""What each file of a run adds to the run's counters: seconds, captures, events.

A file never changes under its name, so it is read once, and a counter is the sum over the files there are. A compaction
puts the rows of many into one: then the sum must come out as it was to the last bit, or Prometheus, to which a counter
that falls by the smallest step has begun anew, would count everything twice. So values are rounded to multiples of
2^-40 (a millionth of a microsecond) and added as integers, whose sum does not depend on the order.

Rows that a later launch overtook count, too: their time was spent, their events happened. This is also what
`increase()` makes of the endpoints of the launches one after the other, and it does not fall when a run is resumed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_telemetry.queries.tables import quoted

if TYPE_CHECKING:
    from lm_telemetry.exporters.captures import Files

UNIT = 2**40
"""Parts of 1 that amounts are counted in."""

Key = tuple[str, str, str | None]
"""table, column, and the value of the label"""

Sums = dict[Key, int]

COUNT = "count"
"""Stands for the number of rows among the columns."""

COUNTED: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "steps": (None, ("seconds", "telemetry_seconds")),
    "overhead": ("instrument", ("seconds", "captures")),
    "events": ("severity", (COUNT,)),
}
"""By table, the label and the columns whose sums are served."""


def sums_of(files: Files) -> dict[str, Sums]:
    """What each of these files adds, by name; what is not finite is left out."""
    label, names = COUNTED[files.table]
    present = files.present()
    names = tuple(name for name in names if name in present or name == COUNT)
    amounts = [_amount(name) for name in names]
    query = f"""
        SELECT filename, {"NULL" if label not in present else quoted(str(label))} AS label, {", ".join(amounts)}
        FROM {files.source}
        GROUP BY ALL
    """  # noqa: S608 names are the catalogue's
    found: dict[str, Sums] = {part.file: {} for part in files.parts}
    for filename, value, *totals in files.raw.execute(query, {"files": files.names}).fetchall():
        of_file = found[filename.removeprefix(f"{files.base}/")]
        of_file |= {(files.table, n, value): int(t) for n, t in zip(names, totals, strict=True) if t is not None}
    return found


def _amount(name: str) -> str:
    if name == COUNT:
        return f"CAST(count(*) AS HUGEINT) * {UNIT}"
    return f"sum(TRY_CAST(round(CAST({quoted(name)} AS DOUBLE) * {UNIT}) AS HUGEINT))"
