"""From an instrument's columns to an Arrow table in the catalogue's schema.

What could not be measured is NULL: a column left out, a masked entry, None. NaN is a measurement and stays NaN. What
would have to be bent to fit (a fraction for an integer, a number for text) is refused, and the error names the column.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lm_telemetry.errors import TelemetryError
from lm_telemetry.schema import schema

if TYPE_CHECKING:
    from lm_telemetry.instruments.base import Columns

STAMPS = ("attempt", "step", "time")
"""Columns the writer fills for every table."""


class ColumnError(TelemetryError, ValueError):
    """Columns that do not fit the catalogue.

    Attributes:
        table: the table they were meant for.
        column: the column that does not fit; None if it is the table.
    """

    def __init__(self, message: str, *, table: str, column: str | None = None) -> None:
        super().__init__(message)
        self.table = table
        self.column = column


def to_table(table: str, columns: Columns, *, attempt: int, step: int, time_us: int) -> pa.Table:
    """`columns` of equal length as an Arrow table of the catalogue's schema, stamped with attempt, step and time.

    Args:
        table: name of the table.
        columns: sequences or 1-D arrays by name; for list columns, sequences of 1-D arrays or a 2-D array.
        attempt: number of the launch.
        step: optimizer step.
        time_us: microseconds since 1970 UTC.

    Raises:
        ColumnError: no such table or column, lengths differ, or values are not of the column's type.
    """
    try:
        wanted = schema(table)
    except KeyError as error:
        raise ColumnError(str(error.args[0]), table=table) from None
    fields = _fields(table)
    for name in columns:
        if name in STAMPS:
            raise ColumnError(f"{table}.{name} is filled by the writer; leave it out", table=table, column=name)
        if name not in fields:
            known = ", ".join(n for n in fields if n not in STAMPS)
            raise ColumnError(f"{table}.{name} is not in the catalogue; {table} has {known}", table=table, column=name)
    arrays = {name: _array(table, fields[name], values) for name, values in columns.items()}
    rows = len(next(iter(arrays.values()), ()))
    for name, array in arrays.items():
        if len(array) != rows:
            first = next(iter(arrays))
            raise ColumnError(
                f"{table}.{name} has {len(array)} rows where {table}.{first} has {rows}; they must be equal",
                table=table,
                column=name,
            )
    stamps = dict(zip(STAMPS, (attempt, step, time_us), strict=True))
    return pa.Table.from_arrays(
        [
            pa.repeat(pa.scalar(stamps[f.name], type=f.type), rows)
            if f.name in stamps
            else arrays[f.name]
            if f.name in arrays
            else pa.nulls(rows, f.type)
            for f in fields.values()
        ],
        schema=wanted,
    )


@cache
def _fields(table: str) -> dict[str, pa.Field[Any]]:
    """The schema's fields by name: a schema makes each anew when it is asked, which took a fifth of a capture."""
    return {field.name: field for field in schema(table)}


def _array(table: str, field: pa.Field[Any], values: Any) -> pa.Array[Any]:
    if isinstance(values, str | bytes) or not isinstance(values, Sequence | np.ndarray):
        raise ColumnError(
            f"{table}.{field.name}: expected a sequence or an array, got {type(values).__name__}",
            table=table,
            column=field.name,
        )
    try:
        if isinstance(values, np.ndarray) and values.dtype != object and not pa.types.is_list(field.type):
            mask = np.ma.getmaskarray(values) if isinstance(values, np.ma.MaskedArray) else None
            # What lies under a mask may be anything, and Arrow would check it.
            plain = np.ma.filled(values, 0) if mask is not None else values
            native = plain.astype(plain.dtype.newbyteorder("="), copy=False)
            array: pa.Array[Any] = pa.array(native, type=field.type, mask=mask, from_pandas=False)
            return array
        entries = [None if value is np.ma.masked else value for value in values]
        if pa.types.is_integer(field.type):
            # Given the type, pa.array truncates 1.5 in a list to 1 without a word; the cast refuses, but reads text.
            inferred = pa.array(entries, from_pandas=False)
            array = (
                pa.array(entries, type=field.type) if pa.types.is_string(inferred.type) else inferred.cast(field.type)
            )
        else:
            array = pa.array(entries, type=field.type, from_pandas=False)
        return array
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ColumnError(
            f"{table}.{field.name}: expected values of type {field.type}; {error}", table=table, column=field.name
        ) from error
