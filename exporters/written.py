"""What the manifests of one run say of its ranks: rows and bytes written, and when last.

Writers' manifests list every part for good, also those that a compaction has replaced, and those that were damaged and
put aside since: so what a rank has written never falls while its manifests are there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from lm_telemetry.errors import StoreError
from lm_telemetry.queries.snapshot import MANIFESTS

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(slots=True)
class Written:
    """By one rank, in all its attempts."""

    rows: int = 0
    bytes: int = 0


class Manifests:
    """The manifests of run `run_id` in the store, or the mirror of one, at `root`; sealed lists are read once."""

    def __init__(self, root: Path, run_id: str) -> None:
        self._directory = root / MANIFESTS / f"run_id={run_id}"
        self._sealed: dict[Path, Written] = {}

    def last_written(self) -> float:
        """Unix time at which a rank last wrote its manifest, by the writer's clock; 0 if there is none.

        Raises:
            StoreError: a manifest cannot be read.
        """
        return max((_time(path) for path in self._paths()), default=0.0)

    def written(self) -> dict[int, Written]:
        """By rank, what it has written.

        Raises:
            StoreError: a manifest cannot be read.
        """
        ranks: dict[int, Written] = {}
        for path in self._paths():
            document = _read(path)
            sealed = [path.with_name(str(name)) for name in document["sealed"]]
            for name in sealed:
                if name not in self._sealed:
                    self._sealed[name] = _sum(_read(name), name)
            of_rank = ranks.setdefault(int(path.stem.removeprefix("rank=")), Written())
            for written in (_sum(document, path), *(self._sealed[name] for name in sealed)):
                of_rank.rows += written.rows
                of_rank.bytes += written.bytes
        return ranks

    def _paths(self) -> list[Path]:
        """Manifests of all ranks and attempts."""
        return [path for path in self._directory.glob("attempt=*/rank=*.json") if path.stem[5:].isdecimal()]


def _time(path: Path) -> float:
    try:
        return datetime.fromisoformat(_read(path)["updated"]).timestamp()
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, error) from error


def _sum(document: dict[str, Any], path: Path) -> Written:
    written = Written()
    try:
        for tables in (document["parts"], document.get("lost", {})):
            for entry in (entry for entries in tables.values() for entry in entries):
                written.rows += int(entry["rows"])
                written.bytes += int(entry["bytes"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _unreadable(path, error) from error
    return written


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(document, dict) or not isinstance(document.get("sealed", []), list):
        raise _unreadable(path, TypeError("an object was expected"))
    return document


def _unreadable(path: Path, error: Exception) -> StoreError:
    return StoreError(f"cannot read the manifest {path}: {error!r}", path=str(path))
