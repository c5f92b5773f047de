"""Which run is meant: the newest one, or that of a name; and which names are near one that is not there.

The command line begins with this: nothing heavy is imported before something is asked.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

from lm_telemetry.errors import StoreError
from lm_telemetry.terminal import one_line

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from lm_telemetry.queries.connect import Connection

NAMES_SHOWN = 3
"""Near names of a thing, and tables that have a column."""


def newest_run(connection: Connection) -> str | None:
    """The run that began last, by the time of its description, or of its first step if it has none; None for none."""
    from lm_telemetry.queries.tables import text

    sql = "SELECT run_id, max(time) FROM raw.runs GROUP BY run_id"
    began: dict[str, datetime] = dict(connection.execute(sql).fetchall())
    known = connection.snapshot.run_ids
    others = sorted(set(known) - began.keys())
    if others:
        names = ", ".join(map(text, others))
        sql = f"SELECT run_id, min(time) FROM raw.steps WHERE run_id IN ({names}) GROUP BY run_id"  # noqa: S608 quoted
        began |= dict(connection.execute(sql).fetchall())
    return max(began, key=lambda run_id: (began[run_id], run_id), default=max(known, default=None))


def require_runs(connection: Connection, names: Iterable[str]) -> None:
    """StoreError, with what is near, if the store has no run of one of these names."""
    known = connection.snapshot.run_ids
    for name in names:
        if name not in known:
            raise StoreError(missing("run", name, known, "`lmt runs` lists them"), path=connection.snapshot.base)


def missing(what: str, name: str, known: Iterable[str], remedy: str) -> str:
    """A sentence that there is no such thing, with the names that are near."""
    near = nearest(name, known)
    return one_line(f"there is no {what} {name}; " + (f"near it: {', '.join(near)}" if near else remedy))


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Those of `known` that look most like `name`, the likest first; none if none does."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    return [by_lower[found] for found in get_close_matches(name.lower(), by_lower, NAMES_SHOWN)]
