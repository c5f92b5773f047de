"""The last steps of one run, asked with the library's own views at a cost that does not grow with the run.

A run of days has ten thousands of files, and a view looks at all of them. So the snapshot that a connection answers
from is narrowed, by what manifests tell, to the files of one run and rank that reach into the last `RECENT` steps of
their table, and to the file of the first capture, which views compare with. A view is then asked through `judged`: its
own SELECT, over common table expressions that have the names of its tables and hold the recent rows alone. Thresholds
and definitions stay where they are, in `queries/views`.

Compacted files are all kept: they are few, and row groups that are too old are skipped by their statistics.
"""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Self

from lm_telemetry.queries import Connection, list_views
from lm_telemetry.queries.tables import quoted, text

if TYPE_CHECKING:
    from lm_telemetry.queries.snapshot import Part, Snapshot

RECENT = 1000
"""Steps that are looked back."""


class Recent(Connection):
    """A connection to what one rank of one run has captured lately, and to the events of all its ranks.

    It sees what was there at the last `look`, so that several questions are answered from the same files.
    """

    run_id: str
    rank: int
    _narrowed: Snapshot | None = None

    @classmethod
    def of(cls, connection: Connection, run_id: str, rank: int) -> Self:
        """The recent part of what `connection` sees; nothing before the first `look`."""
        cursor = connection._raw.cursor()
        recent = cls(cursor, connection._root, connection._tables, mirror=connection._mirror)
        recent.run_id, recent.rank = run_id, rank
        return recent

    def look(self) -> bool:
        """Look for what was written since; whether the run is still there.

        Raises:
            StoreError: a manifest cannot be read.
        """
        super().refresh()
        if self._snapshot is not self._narrowed:
            self._snapshot = self._narrowed = _narrow(self._snapshot, self.run_id, self.rank)
        return self.run_id in self._snapshot.run_ids

    def refresh(self) -> None:
        """Nothing: queries are answered from the last `look`."""

    def files(self, *tables: str) -> tuple[str, ...]:
        """The files that these tables are read from; an answer holds for as long as they are the same."""
        return tuple(part.file for table in tables for part in self._snapshot.tables[table])


def judged(view: str, windows: dict[str, str]) -> str:
    """A query for a view of the library over rows for which a condition holds.

    Args:
        view: its name.
        windows: conditions by table; every table that the view reads should have one.
    """
    (found,) = (v for v in list_views() if v.name == view)
    tables = ", ".join(f"{quoted(table)} AS (FROM main.{quoted(table)} WHERE {w})" for table, w in windows.items())
    return f"WITH {tables} FROM ({found.sql})"


def window(run_id: str, rank: int, steps: tuple[int, int] | None) -> str:
    """The condition that a row is of the rank, and of its first or its last captures.

    Args:
        run_id: name of the run.
        rank: rank of the process.
        steps: first and last step of the table; None if it has none.
    """
    condition = f"run_id = {text(run_id)} AND rank = {rank}"
    return condition if steps is None else f"{condition} AND (step > {steps[1] - RECENT} OR step = {steps[0]})"


def _narrow(snapshot: Snapshot, run_id: str, rank: int) -> Snapshot:
    """The snapshot with recent files of one run and rank alone."""
    narrowed = copy(snapshot)
    narrowed.tables = {
        table: _recent([p for p in parts if p.run_id == run_id and (p.rank == rank or table == "events")])
        if run_id not in snapshot.untold
        else [p for p in parts if p.run_id == run_id]
        for table, parts in snapshot.tables.items()
    }
    return narrowed


def _recent(parts: list[Part]) -> list[Part]:
    """Those whose steps reach into the last `RECENT` or are the first, and those that are of several launches."""
    dated = [part for part in parts if part.attempt is not None and part.last_step is not None]
    # A launch goes on from a checkpoint: it may be far behind what the one before had reached.
    launch = max((part.attempt or 0 for part in dated), default=0)
    last = max((part.last_step or 0 for part in dated if part.attempt == launch), default=0)
    first = min((part.first_step or 0 for part in dated), default=0)
    return [
        part
        for part in parts
        if part.attempt is None or part.last_step is None or part.last_step > last - RECENT or part.first_step == first
    ]
