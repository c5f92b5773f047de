"""Arrow schemas of all tables, derived from the catalogue.

Partition columns (`run_id`, `rank`) are in the path of a file and not in the file. Each schema carries its table's
name and the format version; each field its unit and meaning, so that a Parquet file explains itself.
"""

from __future__ import annotations

from functools import cache

import pyarrow as pa

from lm_telemetry.catalogue import TABLES, ColumnType, columns

FORMAT_VERSION = "1"
"""Raised when a reader of an older version would misunderstand a file. New columns do not raise it."""

_TYPES: dict[ColumnType, pa.DataType] = {
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "string": pa.string(),
    "timestamp": pa.timestamp("us", tz="UTC"),
    "list<int32>": pa.list_(pa.int32()),
    "list<float32>": pa.list_(pa.float32()),
}


@cache
def schema(table: str) -> pa.Schema:
    """Arrow schema of `table` (KeyError if there is no such table)."""
    fields = [pa.field(m.name, _TYPES[m.type], metadata={"unit": m.unit, "meaning": m.meaning}) for m in columns(table)]
    return pa.schema(fields, metadata={"lm_telemetry.table": table, "lm_telemetry.format": FORMAT_VERSION})


def float_columns(table: str) -> list[str]:
    """Columns that are stored byte-stream-split."""
    return [f.name for f in schema(table) if pa.types.is_floating(f.type)]


def empty(table: str) -> pa.Table:
    """A table of no rows."""
    return schema(table).empty_table()


ALL_TABLES: tuple[str, ...] = tuple(TABLES)
