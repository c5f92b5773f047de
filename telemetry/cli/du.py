"""`lmt du [RUN ...]`: what the store takes on disk, by run and table, and what a value costs.

A value is an entry that is not NULL in a column that measures something (keys, step and time are not counted), as the
footers of the files count them. `waiting` are files that no query reads any more: replaced by compaction and kept for a
grace, or left by a crash. What was captured and never came to disk is told below the box, from `events`.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lm_telemetry.cli import output
from lm_telemetry.cli.asking import asking
from lm_telemetry.meant import require_runs
from lm_telemetry.terminal import one_line

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from lm_telemetry.queries import Connection
    from lm_telemetry.queries.snapshot import Part

LOSSES = ("rows_dropped", "capture_failed", "flush_failed", "spool_full", "spool_left")
"""Kinds of events that tell of rows which did not come to disk, or not in time."""

_COLUMNS = {
    "run_id": "VARCHAR",
    "table": "VARCHAR",
    "rows": "BIGINT",
    "values": "BIGINT",
    "parts": "BIGINT",
    "compacted": "BIGINT",
    "bytes": "BIGINT",
    "bytes_per_value": "DOUBLE",
    "waiting": "BIGINT",
}

_SHORT = """
    SELECT run_id, "table", rows, "values", parts, compacted, size, round(bytes_per_value, 2) AS bytes_per_value,
        waiting_size AS waiting
    FROM found ORDER BY bytes DESC, run_id, "table"
"""

_COUNT = """
    SELECT file_name, any_value(rows), CAST(coalesce(sum(values) FILTER (NOT is_key), 0) AS BIGINT)
    FROM (
        SELECT file_name, sum(row_group_num_rows) AS rows, sum(num_values - coalesce(stats_null_count, 0)) AS values,
            list_contains(?, split_part(path_in_schema, ', ', 1)) AS is_key
        FROM parquet_metadata(?)
        GROUP BY file_name, path_in_schema
    )
    GROUP BY file_name
"""

_LOST = """
    SELECT run_id, kind, count(*), arg_max(message, time)
    FROM events
    WHERE kind IN (SELECT unnest(?)) AND run_id IN (SELECT unnest(?))
    GROUP BY run_id, kind ORDER BY run_id, kind
"""


MANY_PARTS = 100
"""Parts of a run beyond which the box is followed by a word on compaction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one table of one run takes."""

    run_id: str
    table: str
    rows: int
    values: int
    parts: int
    compacted: int
    bytes: int
    waiting: int
    """bytes of files that no query reads; 0 where that cannot be seen"""

    @property
    def bytes_per_value(self) -> float | None:
        """None if there are no values."""
        return self.bytes / self.values if self.values else None


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "du",
        help="say what the store takes on disk",
        description="Show rows, values, files and bytes by run and table, what a value costs, and what was lost.",
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="runs to look at (default: all)")
    output.add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print; StoreError if there is no such run."""
    with asking(arguments.store) as connection:
        _write(connection, arguments)
    return 0


def _write(connection: Connection, arguments: argparse.Namespace) -> None:
    require_runs(connection, arguments.runs)
    run_ids = list(dict.fromkeys(arguments.runs)) or connection.snapshot.run_ids
    usages = list(usage(connection, run_ids))
    rows = [[getattr(u, name) for name in _COLUMNS] for u in usages]
    if arguments.format != "table":
        output.write(output.table_of(connection, _COLUMNS, rows), arguments)
        return
    columns = {**_COLUMNS, "size": "VARCHAR", "waiting_size": "VARCHAR"}
    rows = [[*row, output.size(u.bytes), output.size(u.waiting)] for row, u in zip(rows, usages, strict=True)]
    output.write(output.table_of(connection, columns, rows, _SHORT), arguments)
    if not arguments.output:
        for line in _summary(connection, usages):
            print(one_line(line))


def usage(connection: Connection, run_ids: list[str]) -> Iterator[Usage]:
    """What each table of these runs takes; of tables without files nothing.

    Raises:
        QueryError: a file cannot be read.
    """
    snapshot = connection.snapshot
    for table, parts in snapshot.tables.items():
        by_run: dict[str, list[Part]] = {}
        for part in parts:
            by_run.setdefault(part.run_id, []).append(part)
        wanted = {run_id: by_run[run_id] for run_id in run_ids if run_id in by_run}
        counts = _counts(connection, table, [f"{snapshot.base}/{p.file}" for ps in wanted.values() for p in ps])
        for run_id, files in wanted.items():
            found = [counts.get(f"{snapshot.base}/{part.file}", (0, 0)) for part in files]
            compacted = sum(part.attempt is None for part in files)
            yield Usage(
                run_id=run_id,
                table=table,
                rows=sum(rows for rows, _ in found),
                values=sum(values for _, values in found),
                parts=len(files) - compacted,
                compacted=compacted,
                bytes=sum(bytes_of(snapshot.base, part) for part in files),
                waiting=_waiting(snapshot.base, f"{table}/run_id={run_id}", {part.file for part in files}),
            )


def bytes_of(base: str, part: Part) -> int:
    """The size of a file; from the disk, where no manifest tells."""
    if part.bytes is not None:
        return part.bytes
    try:
        return Path(base, part.file).stat().st_size
    except FileNotFoundError:
        return 0  # deleted at this moment


def _counts(connection: Connection, table: str, files: list[str]) -> dict[str, tuple[int, int]]:
    """By file, its rows and its values."""
    from lm_telemetry.catalogue import TABLES, columns
    from lm_telemetry.queries.tables import escape_glob

    if not files:
        return {}
    keys = [m.name for m in columns(table) if m.key] if table in TABLES else []
    found = connection.execute(_COUNT, [keys, [escape_glob(file) for file in files]]).fetchall()
    return {file: (rows, values) for file, rows, values in found}


def _waiting(base: str, directory: str, read: set[str]) -> int:
    """Bytes of the files in the ranks of a directory that are not read."""
    waiting = 0
    for rank in _entries(f"{base}/{directory}"):
        for entry in _entries(rank.path):
            if entry.name.endswith(".parquet") and f"{directory}/{rank.name}/{entry.name}" not in read:
                with suppress(FileNotFoundError):
                    waiting += entry.stat().st_size
    return waiting


def _entries(directory: str) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _summary(connection: Connection, usages: list[Usage]) -> Iterator[str]:
    """What stands below the box."""
    parts, compacted = sum(u.parts for u in usages), sum(u.compacted for u in usages)
    runs = list(dict.fromkeys(u.run_id for u in usages))
    yield (
        f"{len(runs)} runs, {sum(u.rows for u in usages):,} rows, {output.size(sum(u.bytes for u in usages))} in"
        f" {parts} parts and {compacted} compacted files"
    )
    if parts > MANY_PARTS * len(runs):
        yield "many small parts: `lmt compact` merges them"
    lost = connection.execute(_LOST, [list(LOSSES), runs]).fetchall()
    for run_id, kind, count, message in lost:
        yield f"{run_id}: {count} x {kind}, last: {message}"
