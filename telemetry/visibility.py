"""A merged file has two names: one that only our readers are given, and one by which every reader finds it.

    <store>/_merged/<table>/run_id=<id>/rank=<r>/compact-<generation>-<n>.merged    hidden
    <store>/<table>/run_id=<id>/rank=<r>/compact-<generation>-<n>.parquet           visible

While the files that it replaces are kept for queries that have begun, a merged file is hidden, or whoever reads a
table's directory without our manifests (pandas, Polars, Spark, a glob) would meet its rows twice.

Decisions:

- The hidden name is outside every table. In a table's directory no name is hidden from all: DuckDB's `*.parquet` takes
  up names that begin with `_` or `.`, and Polars refuses a directory in which endings differ, whatever they begin with.
- It becomes visible by a second link to the same file, so that queries that were given the hidden name go on; by a copy
  where there are no links.

Left out: when that is done (`compaction`).
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

from lm_telemetry.durable import put_file, sync_directory
from lm_telemetry.schema import ALL_TABLES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lm_telemetry.store import PartInfo, Store

HIDDEN = "_merged"
"""Directory in the store for merged files that are hidden; its underscore hides it from readers of the whole store."""

_HIDDEN_NAME = re.compile(r"compact-(\d+)-(\d+)\.merged")
_VISIBLE_NAME = re.compile(r"compact-(\d+)-(\d+)\.parquet")


def is_hidden(file: str) -> bool:
    """Whether a file, relative to the store, is one that only our readers are given."""
    return file.startswith(f"{HIDDEN}/")


def visible(file: str) -> str:
    """The visible name of a hidden file; both relative to the store."""
    return f"{file.removeprefix(f'{HIDDEN}/').removesuffix('.merged')}.parquet"


def compact_key(file: str) -> tuple[int, int] | None:
    """(generation, number) in the name of a merged file, relative to the store; None if it is no merged file's."""
    name = _HIDDEN_NAME if is_hidden(file) else _VISIBLE_NAME
    match = name.fullmatch(file.rpartition("/")[2])
    return (int(match[1]), int(match[2])) if match else None


def hidden_partition(store: Store, table: str, run_id: str, rank: int) -> Path:
    """The directory of a rank's hidden files of a table."""
    return store.path / HIDDEN / table / f"run_id={run_id}" / f"rank={rank}"


def hidden_files(store: Store, run_id: str, rank: int) -> Iterator[tuple[str, Path]]:
    """Table and path of a rank's hidden files, and of temporaries beside them."""
    for table in ALL_TABLES:
        for path in hidden_partition(store, table, run_id, rank).glob("*"):
            if _HIDDEN_NAME.fullmatch(path.name) or path.name.endswith(".tmp"):
                yield table, path


def is_shown(root: Path, file: PartInfo) -> bool:
    """Whether a hidden file of the store at `root` has its visible name, too."""
    try:
        return (root / visible(file.file)).stat().st_size == file.bytes
    except FileNotFoundError:
        return False


def show(root: Path, file: PartInfo) -> PartInfo:
    """Give a hidden file its visible name beside the hidden one; the file under that name.

    Raises:
        OSError: it cannot be done, or another file has the name.
    """
    target = root / visible(file.file)
    if not is_shown(root, file):
        try:
            target.hardlink_to(root / file.file)
        except FileExistsError:
            raise
        except OSError:  # no links on this filesystem, or the table is on another
            with (root / file.file).open("rb") as source:
                put_file(target, lambda copy: shutil.copyfileobj(source, copy))
    return replace(file, file=visible(file.file))


def sync(root: Path, file: PartInfo) -> None:
    """Have the name of a visible file survive a power cut."""
    sync_directory((root / file.file).parent)
