"""Which files are the store, at one moment: the manifests of all runs, resolved.

    <store>/_manifests/run_id=<id>/attempt=<a>/rank=<r>.json    parts a rank has written
    <store>/_manifests/run_id=<id>/compaction/rank=<r>.json     what has replaced some of them

A rank's files are its parts, less those that a compaction replaces, and the compacted files. Parts that are replaced
stay listed by the rank that wrote them, and only listed ones are compacted, so it does not matter which of the two is
read first: every row is seen exactly once. Compacted files are listed by their hidden names for as long as what they
replace is there for other readers, who go by directories. A rank whose manifest of an attempt is gone is read by
listing its directories, too: hidden files are in none of them, and what they replace is. A run with a `pruned.json` was
given up by retention, and is not there.

Decisions:

- A snapshot starts from the one before and looks again only at directories whose modification time has changed. A
  time less than `SETTLED` seconds old is not trusted: another change within the clock's tick would go unseen.
- Nothing but the standard library, since every `lmt sql` begins here.

Left out: whether the files are whole (`lmt verify`).
"""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from lm_telemetry.catalogue import TABLES
from lm_telemetry.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path

MANIFESTS = "_manifests"
COMPACTION = "compaction"
PRUNED = "pruned.json"
MERGED = "_merged"
"""Where merged files are until what they replace is deleted (`telemetry.visibility`)."""

SETTLED = 2.0
"""Seconds after which a directory's modification time tells of every change before it."""

_RUN = re.compile(r"run_id=(.+)", re.DOTALL)
_MISREAD = re.compile(r".*[?%\n].*|__HIVE_DEFAULT_PARTITION__", re.DOTALL)
"""Names of directories that readers of hive datasets take for another text, or for NULL."""
_ATTEMPT = re.compile(r"attempt=(\d+)")
_RANK = re.compile(r"rank=(\d+)(\.json)?")
_PART = re.compile(r"part-(\d+)-(\d+)\.parquet")
_COMPACT = re.compile(r"compact-(\d+)-(\d+)\.parquet")


@dataclass(frozen=True, slots=True)
class Part:
    """A file of a table; `file` is relative to the store. Unknown facts are None."""

    table: str
    run_id: str
    rank: int
    file: str
    attempt: int | None
    schema: str | None
    rows: int | None
    bytes: int | None
    first_step: int | None
    last_step: int | None


@dataclass(slots=True)
class _Run:
    """What is known of one run, and the modification times it was known at."""

    seen: dict[str, int] = field(default_factory=dict)
    parts: dict[tuple[int, int], list[tuple[int, Part]]] = field(default_factory=dict)
    """(sequence number, part) by (attempt, rank)"""
    replaced: dict[int, dict[tuple[str, int], int]] = field(default_factory=dict)
    """by rank: the first sequence number that is not replaced, by (table, attempt)"""
    compacted: dict[int, list[Part]] = field(default_factory=dict)
    listed: list[Part] = field(default_factory=list)
    """parts found by listing, of ranks and attempts without a manifest"""
    pruned: bool = False

    def files(self) -> list[Part]:
        found = list(self.listed)
        for (attempt, rank), parts in self.parts.items():
            bounds = self.replaced.get(rank, {})
            found += [part for seq, part in parts if seq >= bounds.get((part.table, attempt), 0)]
        for parts_of_rank in self.compacted.values():
            found += parts_of_rank
        return found

    def starts(self) -> dict[int, dict[int, int | None]]:
        """By rank and attempt, the first step in `steps`; None for an attempt that has none there."""
        found: dict[int, dict[int, int | None]] = {}
        for (attempt, rank), parts in self.parts.items():
            steps = [p.first_step for _, p in parts if p.table == "steps" and p.first_step is not None]
            found.setdefault(rank, {})[attempt] = min(steps, default=None)
        return found

    def is_untold(self) -> bool:
        """Whether there are several attempts, and where one of them began is in its rows alone."""
        listed = {part.attempt for part in self.listed if part.table == "steps" and part.attempt is not None}
        return bool(listed) and len(listed | {attempt for attempt, _ in self.parts}) > 1


@dataclass(frozen=True, slots=True)
class Cut:
    """Rows of this attempt from this step on were overtaken by a later launch of the run."""

    run_id: str
    rank: int
    attempt: int
    step: int


class Snapshot:
    """The files of a store at one moment."""

    def __init__(self, root: Path, base: str, runs: dict[str, _Run], seen: dict[str, int]) -> None:
        self.base = base
        """what the names of files are relative to: a directory or an URL"""
        self._runs = runs
        self._seen = seen
        self.tables: dict[str, list[Part]] = {table: [] for table in TABLES}
        for run in runs.values():
            for part in run.files():
                self.tables.setdefault(part.table, []).append(part)
        self.cuts = tuple(cut for run_id, run in runs.items() for cut in _cuts(run_id, run.starts()))
        """what later launches overtook, as far as manifests tell"""
        self.untold = tuple(run_id for run_id, run in runs.items() if run.is_untold())
        """runs of several launches, of which not all have manifests: there the rows have to tell what was overtaken"""

    @classmethod
    def take(cls, root: Path, before: Self | None = None, *, base: str | None = None) -> Self:
        """The store as it is now; `before`, an earlier snapshot of it, saves reading what has not changed.

        Returns `before` itself if nothing has changed. `base` is where the files of the tables are, if not at `root`.

        Raises:
            StoreError: a manifest cannot be read; `.path` is its path.
        """
        known = {} if before is None else before._runs
        places = [f"{root}/{place}" for place in (MANIFESTS, *TABLES)]
        if before is not None and all(_unchanged(before._seen, place) for place in places):
            seen, names, tables = before._seen, set(known), dict.fromkeys(known, tuple(TABLES))
        else:
            seen = {place: _modified(place) for place in places}
            names, tables = _runs(str(root))
        runs = {name: _read_run(str(root), name, known.get(name), tables.get(name, ())) for name in sorted(names)}
        if before is not None and set(known) == names and all(runs[name] is known[name] for name in names):
            return before
        return cls(root, str(root) if base is None else base, runs, seen)

    @property
    def run_ids(self) -> list[str]:
        """Names of the runs."""
        return [run_id for run_id, run in self._runs.items() if not run.pruned]


# Paths are plain text below: of a thousand runs there are tens of thousands.


def _runs(root: str) -> tuple[set[str], dict[str, tuple[str, ...]]]:
    """Names of all runs, and the tables in which each has a directory."""
    names = {m[1] for entry in _entries(f"{root}/{MANIFESTS}") if (m := _RUN.fullmatch(entry))}
    tables: dict[str, tuple[str, ...]] = {}
    for table in TABLES:
        for entry in _entries(f"{root}/{table}"):
            if match := _RUN.fullmatch(entry):
                tables[match[1]] = (*tables.get(match[1], ()), table)
    misread = next(filter(_MISREAD.fullmatch, sorted(names | tables.keys())), None)
    if misread is not None:
        raise StoreError(
            f"{root} has a directory {f'run_id={misread}'!r}, whose name readers of hive datasets take for another;"
            " rename it, in each table and in the manifests, to letters, digits, '.', '_' and '-'",
            path=root,
        )
    return names | tables.keys(), tables


def _read_run(root: str, run_id: str, before: _Run | None, tables: tuple[str, ...]) -> _Run:
    """The run, with directories in `tables` at most, as it is now; `before` itself if nothing has changed."""
    if before is not None and before.parts and not before.listed:
        known = before.seen
        if all(_unchanged(known, path) for path in known):
            return before
    directory = f"{root}/{MANIFESTS}/run_id={run_id}"
    attempts = [f"{directory}/{name}" for name in _entries(directory) if _ATTEMPT.fullmatch(name)]
    run = _Run(seen={path: _modified(path) for path in (directory, f"{directory}/{COMPACTION}", *attempts)})
    if _is_pruned(directory, attempts):
        run.pruned = True
        return run
    for path in attempts:
        attempt = _number(path)
        for rank, name in _ranks(path):
            try:
                run.parts[attempt, rank] = _manifest_parts(path, name, run_id, rank, attempt)
            except FileNotFoundError:
                continue  # the run is being deleted
    for rank, name in _ranks(f"{directory}/{COMPACTION}"):
        with suppress(FileNotFoundError):
            _read_compaction(run, f"{directory}/{COMPACTION}/{name}", run_id, rank)
    run.listed = _listed(root, run_id, run, max(map(_number, attempts), default=-1), tables)
    if before is not None and _same(before, run):
        before.seen = run.seen
        return before
    return run


def _is_pruned(directory: str, attempts: list[str]) -> bool:
    """Whether the run was given up, and not taken up again since by a later launch."""
    path = f"{directory}/{PRUNED}"
    if not os.path.exists(path):  # noqa: PTH110
        return False
    try:
        return max(map(_number, attempts), default=-1) < int(_read(path)["attempts"])
    except FileNotFoundError:
        return False
    except (KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, error) from error


def _number(path: str) -> int:
    return int(path.rpartition("=")[2])


def _ranks(directory: str) -> list[tuple[int, str]]:
    """(rank, name) of the manifests in a directory."""
    return [(int(m[1]), name) for name in _entries(directory) if (m := _RANK.fullmatch(name)) and m[2]]


def _same(one: _Run, other: _Run) -> bool:
    mine = (one.parts, one.replaced, one.compacted, one.listed)
    return mine == (other.parts, other.replaced, other.compacted, other.listed)


def _unchanged(seen: dict[str, int], path: str) -> bool:
    """Whether nothing was put into a directory since; False while its time may hide a change."""
    then = seen.get(path)
    return then is not None and then == _modified(path) and (then == 0 or time.time_ns() - then > SETTLED * 1e9)


def _modified(path: str) -> int:
    """Modification time in nanoseconds; 0 for what is not there."""
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116
    except FileNotFoundError:
        return 0


def _manifest_parts(directory: str, name: str, run_id: str, rank: int, attempt: int) -> list[tuple[int, Part]]:
    path = f"{directory}/{name}"
    document = _read(path)
    try:
        lists = [_read(f"{directory}/{sealed}")["parts"] for sealed in document["sealed"]]
        parts = [
            (_sequence(entry["file"], table, run_id, rank, attempt), _part(table, run_id, rank, attempt, entry))
            for tables in (*lists, document["parts"])
            for table, entries in tables.items()
            for entry in entries
        ]
    except FileNotFoundError as error:
        if os.path.exists(path):  # noqa: PTH110
            raise _unreadable(path, error) from error
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _unreadable(path, error) from error
    if len({part.file for _, part in parts}) < len(parts):
        raise _unreadable(path, ValueError("a part is listed twice"))
    return parts


def _read_compaction(run: _Run, path: str, run_id: str, rank: int) -> None:
    document = _read(path)
    try:
        run.replaced[rank] = {
            (table, int(attempt)): int(seq)
            for table, bounds in document["replaces"].items()
            for attempt, seq in bounds.items()
        }
        run.compacted[rank] = [
            _merged(table, run_id, rank, entry) for table, entries in document["files"].items() for entry in entries
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _unreadable(path, error) from error


def _sequence(file: str, table: str, run_id: str, rank: int, attempt: int) -> int:
    """The sequence number of a part (ValueError if it is not one of this rank's)."""
    directory, _, name = file.rpartition("/")
    match = _PART.fullmatch(name)
    if match is None or int(match[1]) != attempt or directory != f"{table}/run_id={run_id}/rank={rank}":
        raise ValueError(f"{file} is not a part of rank {rank} in attempt {attempt}")
    return int(match[2])


def _merged(table: str, run_id: str, rank: int, entry: dict[str, Any]) -> Part:
    """A file that a compaction lists (errors as of `_part`)."""
    part = _part(table, run_id, rank, None, entry)
    directory = part.file.rpartition("/")[0].removeprefix(f"{MERGED}/")
    if directory != f"{table}/run_id={run_id}/rank={rank}":
        raise ValueError(f"{part.file} is not a file of rank {rank}")
    return part


def _part(table: str, run_id: str, rank: int, attempt: int | None, entry: dict[str, Any]) -> Part:
    """A part as a manifest lists it (KeyError, TypeError or ValueError if that is not how parts are listed)."""
    facts = [entry[name] for name in ("rows", "bytes", "first_step", "last_step")]
    if not all(fact is None or type(fact) is int for fact in facts):
        raise TypeError(f"{entry['file']}: whole numbers were expected, {facts} came")
    entry["file"].encode()  # a lone surrogate is a ValueError
    return Part(
        table,
        run_id,
        rank,
        entry["file"],
        attempt,
        entry.get("schema"),
        entry["rows"],
        entry["bytes"],
        entry["first_step"],
        entry["last_step"],
    )


def _listed(root: str, run_id: str, run: _Run, last_attempt: int, tables: tuple[str, ...]) -> list[Part]:
    """Parts of ranks that have no manifest of an attempt, as their directories show them."""
    ranks = {rank for _, rank in run.parts}
    complete = {rank for rank in ranks if all((attempt, rank) in run.parts for attempt in range(last_attempt + 1))}
    found = []
    for table in tables:
        for name in _entries(f"{root}/{table}/run_id={run_id}"):
            match = _RANK.fullmatch(name)
            if not match or match[2] or int(match[1]) in complete:
                continue
            rank = int(match[1])
            directory = f"{table}/run_id={run_id}/{name}"
            files = [f for f in sorted(_entries(f"{root}/{directory}")) if f.endswith(".parquet") and f[0] != "."]
            if rank not in run.compacted and rank not in ranks:
                _require_one_meaning(f"{root}/{directory}", files)
            for file in files:
                part = _PART.fullmatch(file)
                if part is None and (rank in run.compacted or rank in ranks):
                    continue
                attempt = int(part[1]) if part else None
                if part and (int(part[1]), rank) in run.parts:
                    continue
                if part and int(part[2]) < run.replaced.get(rank, {}).get((table, int(part[1])), 0):
                    continue
                found.append(Part(table, run_id, rank, f"{directory}/{file}", attempt, None, None, None, None, None))
    return found


def _require_one_meaning(directory: str, files: list[str]) -> None:
    """StoreError if compacted files may hold the rows of others, and the manifest that would tell is gone."""
    generations = {m[1] for file in files if (m := _COMPACT.fullmatch(file))}
    if len(generations) > 1 or (generations and any(map(_PART.fullmatch, files))):
        raise StoreError(
            f"the compacted files in {directory} may hold rows of others there, and the manifest that tells is gone;"
            " `lmt verify --repair` writes it anew",
            path=directory,
        )


def _cuts(run_id: str, starts: dict[int, dict[int, int | None]]) -> list[Cut]:
    """Where later attempts overtook earlier ones, also those that left rows of other tables only."""
    cuts = []
    for rank, by_attempt in starts.items():
        bound: int | None = None
        for attempt in sorted(by_attempt, reverse=True):
            if bound is not None:
                cuts.append(Cut(run_id, rank, attempt, bound))
            known = [step for step in (bound, by_attempt[attempt]) if step is not None]
            bound = min(known, default=None)
    return cuts


def _entries(directory: str) -> list[str]:
    try:
        return os.listdir(directory)  # noqa: PTH208 names are what is wanted, by the ten thousand
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read(path: str) -> dict[str, Any]:
    """A JSON object (FileNotFoundError if it is gone, StoreError if it is anything else)."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            document = json.load(file)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(document, dict):
        raise _unreadable(path, TypeError(f"a JSON object was expected, {type(document).__name__} came"))
    return document


def _unreadable(path: str, error: Exception) -> StoreError:
    return StoreError(
        f"cannot read the manifest {path}: {error!r}; `lmt verify --repair` writes it anew from the parts there are",
        path=path,
    )
