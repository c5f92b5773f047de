"""Which parts' rows a file holds, so that a compacted file can speak for itself when its manifest is lost.

A coverage is, by attempt, the sequence numbers as ascending disjoint intervals [first, past the last). A part covers
itself, by its name; a compacted file has its coverage in its Parquet metadata.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lm_telemetry.store import PART_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

KEY = b"lm_telemetry.replaces"
"""Where a compacted file keeps it, as JSON."""

Coverage = dict[int, list[tuple[int, int]]]


def coverage(file: str, metadata: Mapping[bytes, bytes] | None) -> Coverage | None:
    """What a file with this name and this schema metadata covers; None if neither tells."""
    part = PART_NAME.fullmatch(file.rpartition("/")[2])
    if part is not None:
        return {int(part[1]): [(int(part[2]), int(part[2]) + 1)]}
    try:
        found = json.loads((metadata or {})[KEY])
        return {int(attempt): [(int(lo), int(hi)) for lo, hi in spans] for attempt, spans in found.items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        return None


def encode(covered: Coverage) -> bytes:
    """As a value of Parquet metadata."""
    return json.dumps({str(attempt): spans for attempt, spans in covered.items()}, separators=(",", ":")).encode()


def union(several: Iterable[Coverage]) -> Coverage:
    """What all of them cover."""
    found: Coverage = {}
    for covered in several:
        for attempt, spans in covered.items():
            found.setdefault(attempt, []).extend(spans)
    return {attempt: _merged(spans) for attempt, spans in found.items()}


def overlap(one: Coverage, other: Coverage) -> bool:
    """Whether any part is in both."""
    return any(
        lo < hi2 and lo2 < hi
        for attempt, spans in one.items()
        for lo, hi in spans
        for lo2, hi2 in other.get(attempt, [])
    )


def has(covered: Coverage, attempt: int, seq: int) -> bool:
    """Whether the part is covered."""
    return any(lo <= seq < hi for lo, hi in covered.get(attempt, ()))


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for lo, hi in sorted(spans):
        if merged and lo <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(hi, merged[-1][1]))
        else:
            merged.append((lo, hi))
    return merged
