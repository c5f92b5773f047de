"""The rows of several files of a table as one table: in the catalogue's columns, sorted, with what they cover.

Sorted by what the rows are about and then by step, so that one series of a long run is a few row groups of a file.

Left out: which files are merged, and what becomes of them (`compaction`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from lm_telemetry.catalogue import columns
from lm_telemetry.coverage import KEY, Coverage, coverage, encode, union
from lm_telemetry.errors import StoreError
from lm_telemetry.schema import schema

if TYPE_CHECKING:
    from pathlib import Path

    from lm_telemetry.store import PartInfo


def read_source(root: Path, source: PartInfo) -> pa.Table:
    """The rows of a file of the store at `root`, with what it covers in the metadata of its schema.

    Raises:
        StoreError: it cannot be read, or has not the rows it should have.
    """
    path = root / source.file
    try:
        rows = pq.read_table(path, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, str(error)) from error
    if rows.num_rows != source.rows:
        raise _damaged(path, f"{source.rows} rows were expected, {rows.num_rows} came")
    covered = coverage(source.file, rows.schema.metadata)
    if covered is None:
        raise _damaged(path, "it does not say which parts it holds")
    return rows.replace_schema_metadata({KEY: encode(covered)})


def merge(table: str, pieces: list[pa.Table]) -> pa.Table:
    """The rows of what `read_source` gave, as those of one file. It covers what they do."""
    return _unified(table, pieces).sort_by([(key, "ascending") for key in sort_keys(table)])


def sort_keys(table: str) -> list[str]:
    """What a table's compacted files are sorted by: what the rows are about, then when."""
    stamps = ("step", "attempt", "time")
    about = [m.name for m in columns(table) if m.key and m.name not in stamps]
    return [*about, "step", "attempt"]


def _unified(table: str, pieces: list[pa.Table]) -> pa.Table:
    """The pieces as one table: the catalogue's columns first, then what only the files have."""
    wanted = pa.unify_schemas([schema(table), *(piece.schema for piece in pieces)], promote_options="permissive")
    covered: list[Coverage] = [found for piece in pieces if (found := coverage("", piece.schema.metadata))]
    wanted = wanted.with_metadata({**(schema(table).metadata or {}), KEY: encode(union(covered))})
    return pa.concat_tables(
        [
            pa.Table.from_arrays(
                [
                    piece[f.name].cast(f.type) if f.name in piece.column_names else pa.nulls(piece.num_rows, f.type)
                    for f in wanted
                ],
                schema=wanted,
            )
            for piece in pieces
        ]
    )


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"{path} is damaged: {why}; `lmt verify --repair` puts it aside", path=str(path))
