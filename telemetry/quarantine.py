"""Where a repair puts what it will not delete, and the list of all that it has done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

QUARANTINE = "_quarantine"
"""Directory in the store; a file lies there under the path it had. Nobody reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """One thing that was done.

    Attributes:
        kind: `removed`, `adopted`, `restored`, `relisted`, `quarantined`, `lost`, `manifest`, `compaction`, or
            `skipped`.
        file: path relative to the store.
        message: what was done and why.
    """

    kind: str
    file: str
    message: str


@dataclass(slots=True)
class Log:
    """What a repair of the store at `root` does to files, as it does it."""

    root: Path
    done: list[Repaired] = field(default_factory=list)

    def note(self, kind: str, path: Path, message: str) -> None:
        """Something was done to the file at `path`."""
        self.done.append(Repaired(kind=kind, file=str(path.relative_to(self.root)), message=message))

    def remove(self, path: Path) -> None:
        """Delete the temporary file of a process that is gone."""
        path.unlink(missing_ok=True)
        self.note("removed", path, "left by a killed process; no reader ever saw it")

    def set_aside(self, path: Path, why: str) -> None:
        """Move a file into the quarantine."""
        target = self.root / QUARANTINE / path.relative_to(self.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        number = 0
        while target.exists():
            number += 1
            target = target.with_name(f"{path.name}.{number}")
        path.rename(target)
        self.note("quarantined", path, f"{why}; moved to {target.relative_to(self.root)}")
