"""The captures of a run from which its latest values come, read from the last of its files.

A series has the last value that is not NULL, and its columns and labels are captured at cadences of their own. So the
newest files are looked at, a capture is taken if it holds the last value of some column under some labels, and only
those few are handed on, in their order. Whoever observes them ends where an observer of all rows would have.

Decisions:

- Files are chosen by what manifests say of their rows and steps: `REACH` bounds how many, and where a column has no
  value among them, it is looked for once more as far as the second bound. What lies farther back is not found.
- Files of which no manifest tells are read whole.
- Rows that a later launch of the run overtook are passed over, as in the tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import pyarrow as pa

from lm_telemetry.catalogue import columns, schema_id
from lm_telemetry.exporters.naming import LABELS, exported_columns
from lm_telemetry.queries.tables import escape_glob, quoted
from lm_telemetry.schema import schema

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import duckdb

    from lm_telemetry.queries.snapshot import Cut, Part

Moment = tuple[int, int, int]
"""attempt, step, and time in microseconds: one capture of a rank"""

REACH = ((10_000, 128), (100_000, 1024))
"""Rows and files of a table that are looked at for each rank, at first and at last."""

RANK = r"CAST(regexp_extract(filename, '/rank=(\d+)/[^/]*$', 1) AS INTEGER)"
"""A row's rank, from its file's name: what else a stranger may have put into a path is not looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """Rows of a table that one rank captured together."""

    rank: int
    moment: Moment
    rows: pa.Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Some files of one table of one run, and the database that reads them."""

    raw: duckdb.DuckDBPyConnection
    base: str
    """directory or URL that names of files are relative to"""
    table: str
    parts: Sequence[Part]

    @property
    def names(self) -> list[str]:
        """The files as DuckDB takes them."""
        return [f"{escape_glob(self.base)}/{escape_glob(part.file)}" for part in self.parts]

    @property
    def source(self) -> str:
        """The relation of their rows; its parameter `$files` is `names`."""
        union = "" if self._schemas == {schema_id(self.table)} else "union_by_name = true, "
        return f"read_parquet($files, {union}hive_partitioning = false, filename = true, can_have_nan = true)"

    def present(self) -> set[str]:
        """The columns that they have; files are opened only where no manifest tells."""
        if self._schemas == {schema_id(self.table)}:
            return {m.name for m in columns(self.table)}
        return set(self.raw.sql(f"FROM {self.source}", params={"files": self.names}).columns)

    @property
    def _schemas(self) -> set[str | None]:
        return {part.schema for part in self.parts}


def last_captures(files: Files, *, cuts: Iterable[Cut], after: Mapping[int, Moment]) -> Iterator[Capture]:
    """Captures that hold a last value, by rank and in order of time.

    Args:
        files: where to look.
        cuts: what later launches overtook.
        after: by rank, the last capture that is known; only later ones are wanted.
    """
    for n_rows, n_files in REACH:
        chosen = [part for parts in _by_rank(files.parts) for part in newest(parts, n_rows, n_files)]
        near = Files(raw=files.raw, base=files.base, table=files.table, parts=chosen)
        found = list(_split(_read(near, cuts, after)))
        if len(chosen) == len(files.parts) or _is_filled(found, files.table, {p.rank for p in chosen} - after.keys()):
            break
    yield from found


def newest(parts: Sequence[Part], n_rows: int, n_files: int) -> list[Part]:
    """The newest files of a rank, until there are so many rows or files; all of which no manifest tells."""
    chosen = [part for part in parts if part.rows is None or part.last_step is None]
    told = [(part.attempt if part.attempt is not None else -1, part.last_step or 0, part) for part in parts]
    rows = 0
    for *_, part in sorted(told, key=lambda entry: entry[:2], reverse=True):
        if part.rows is None or part.last_step is None:
            continue
        if rows >= n_rows or n_files <= 0:
            break
        chosen.append(part)
        rows += part.rows
        n_files -= 1
    return chosen


def _by_rank(parts: Iterable[Part]) -> Iterable[list[Part]]:
    ranks: dict[int, list[Part]] = {}
    for part in parts:
        ranks.setdefault(part.rank, []).append(part)
    return ranks.values()


def _columns(table: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Labels and values that are wanted of a table; of one that is not served nothing but when it was captured."""
    if table == "runs":
        return (), tuple(m.name for m in columns(table) if not m.key)
    if table == "events":
        return ("severity",), ("kind",)
    return (LABELS[table], exported_columns(table)) if table in LABELS else ((), ())


def _read(files: Files, cuts: Iterable[Cut], after: Mapping[int, Moment]) -> pa.Table:
    """Rows of the wanted captures, in order, with the columns that the catalogue has of them."""
    import duckdb

    labels, values = _columns(files.table)
    present = files.present()
    wanted = [name for name in (*labels, *values) if name in present]
    conditions = [
        f"NOT (rank = {cut.rank} AND attempt = {cut.attempt} AND step >= {cut.step})"
        for cut in cuts
        if files.table != "runs"
    ]
    conditions += [
        f"NOT (rank = {rank} AND (attempt, step, us) <= ({attempt}, {step}, {us}))"
        for rank, (attempt, step, us) in after.items()
    ]
    last = "max({'attempt': attempt, 'step': step, 'us': us})"
    lasts = [last, *(f"{last} FILTER ({quoted(name)} IS NOT NULL)" for name in values if name in present)]
    groups = ", ".join(["rank", *(quoted(name) for name in labels if name in present)])
    query = f"""
        WITH near AS MATERIALIZED (
            SELECT * FROM (
                SELECT {", ".join([f"{RANK} AS rank", "attempt", "step", "epoch_us(time) AS us", "time"])}
                {"".join(f", {quoted(name)}" for name in wanted)}
                FROM {files.source})
            WHERE {" AND ".join(conditions) or "true"}),
        wanted AS (
            SELECT DISTINCT rank, moment.attempt, moment.step, moment.us
            FROM (SELECT rank, unnest([{", ".join(lasts)}]) AS moment FROM near GROUP BY {groups}))
        FROM near SEMI JOIN wanted USING (rank, attempt, step, us)
        ORDER BY rank, attempt, step, us
    """  # noqa: S608 names are the catalogue's, the rest are integers
    relation = files.raw.sql(query, params={"files": files.names})
    try:
        rows = pa.RecordBatchReader.from_stream(relation).read_all()
    except pa.ArrowException as error:
        raise duckdb.Error(str(error)) from error
    for name in (*labels, *values):
        if name not in present:
            rows = rows.append_column(name, pa.nulls(rows.num_rows, schema(files.table).field(name).type))
    return rows


def _split(rows: pa.Table) -> Iterator[Capture]:
    """One rank and capture after the other."""
    keys = list(zip(*(rows[name].to_pylist() for name in ("rank", "attempt", "step", "us")), strict=True))
    starts = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
    for start, end in pairwise([*starts, len(keys)]):
        rank, *moment = keys[start]
        yield Capture(rank=rank, moment=(moment[0], moment[1], moment[2]), rows=rows.slice(start, end - start))


def _is_filled(captures: Iterable[Capture], table: str, ranks: set[int]) -> bool:
    """Whether each of these ranks has a value in every column."""
    _, values = _columns(table)
    missing = {rank: set(values) for rank in ranks}
    for capture in captures:
        left = missing.get(capture.rank, set())
        left -= {name for name in left if capture.rows[name].null_count < capture.rows.num_rows}
    return not any(missing.values())
