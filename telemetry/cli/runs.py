"""`lmt runs`: which runs are in the store, how far they got, whether they go on, and how large they are.

How far they got is the view `overview`. A run is `live` while a process writes it (its lock tells, on this host; on
others, and for a store at an URL, whether anything was written in the last quarter of an hour), else `finished`,
however it ended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_telemetry.cli import output
from lm_telemetry.cli.asking import asking
from lm_telemetry.cli.du import bytes_of

if TYPE_CHECKING:
    import argparse

    from lm_telemetry.queries import Connection

_FULL = """
    SELECT run_id, state, o.* EXCLUDE (run_id), files, bytes
    FROM found LEFT JOIN overview AS o USING (run_id)
    ORDER BY began NULLS LAST, run_id
"""

# Of a box that is too wide the middle is left out.
_SHORT = """
    SELECT run_id, state, strftime(began, '%Y-%m-%d %H:%M') AS began_utc, attempts, ranks,
        CAST(round(100 * telemetry_share, 2) AS VARCHAR) || ' %' AS telemetry,
        last_step, round(last_loss, 4) AS last_loss, size
    FROM found LEFT JOIN overview AS o USING (run_id)
    ORDER BY began NULLS LAST, run_id
"""

_FOUND = {"run_id": "VARCHAR", "state": "VARCHAR", "files": "BIGINT", "bytes": "BIGINT", "size": "VARCHAR"}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "runs",
        help="list the runs in the store",
        description="List the runs in the store, how far they got, and which are live.",
    )
    output.add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print; the box is rounded for people, the other formats have the view `overview` as it is."""
    query = _SHORT if arguments.format == "table" else _FULL
    with asking(arguments.store) as connection:
        output.write(output.table_of(connection, _FOUND, _found(connection, arguments.store), query), arguments)
    return 0


def _found(connection: Connection, store: str) -> list[tuple[str, str, int, int, str | None]]:
    """Rows of `_FOUND`."""
    files: dict[str, list[int]] = {run_id: [] for run_id in connection.snapshot.run_ids}
    for parts in connection.snapshot.tables.values():
        for part in parts:
            files[part.run_id].append(bytes_of(connection.snapshot.base, part))
    live = _live(connection, store)
    return [
        (run_id, "live" if run_id in live else "finished", len(sizes), sum(sizes), output.size(sum(sizes)))
        for run_id, sizes in files.items()
    ]


def _live(connection: Connection, store: str) -> set[str]:
    """Names of runs that are being written."""
    from lm_telemetry.liveness import life_of
    from lm_telemetry.remote import is_url

    is_live = life_of(store)
    last = "SELECT run_id, epoch(last_row) FROM overview"
    written = dict(connection.execute(last).fetchall()) if is_url(store) else {}
    return {run_id for run_id in connection.snapshot.run_ids if is_live(run_id, written.get(run_id) or 0.0)}
