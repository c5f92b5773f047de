"""From instruments' columns to Arrow tables in the catalogue's schema, of one capture or of all since the last flush.

What could not be measured is NULL: a column left out, a masked entry, None. NaN is a measurement and stays NaN. What
would have to be bent to fit (a fraction for an integer, a number for text) is refused, and the error names the column.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Self

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


@dataclass(frozen=True, slots=True)
class Captured:
    """What one capture has for one table, and what it is stamped with; `check` makes one.

    The values are not copied: whoever hands them over does not change them any more.
    """

    columns: Columns
    rows: int
    step: int
    time_us: int

    @classmethod
    def check(cls, table: str, columns: Columns, *, step: int, time_us: int) -> Self:
        """The capture, if `columns` are sequences or arrays of equal length by names that `table` has.

        Raises:
            ColumnError: they are not. Whether values are of the column's type is found by `to_rows`.
        """
        return cls(columns, _count(table, columns), step, time_us)

    @property
    def bytes(self) -> int:
        """Memory it takes, about."""
        return sum(map(_weight, self.columns.values()))


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
    return to_rows(table, [Captured.check(table, columns, step=step, time_us=time_us)], attempt=attempt)


def to_rows(table: str, captures: Sequence[Captured], *, attempt: int) -> pa.Table:
    """The rows of many captures of one table, in their order, as `to_table` has those of one.

    Making Arrow columns takes about as long for fifty captures as for five. Where a capture lacks a column, it is NULL.

    Raises:
        ColumnError: values of any of the captures are not of the column's type.
    """
    fields = _fields(table)
    counts = [captured.rows for captured in captures]
    names = dict.fromkeys(name for captured in captures for name in captured.columns)
    arrays = {name: _column(table, fields[name], [c.columns.get(name) for c in captures], counts) for name in names}
    arrays["attempt"] = pa.repeat(pa.scalar(attempt, type=fields["attempt"].type), sum(counts))
    for name, stamps in (("step", [c.step for c in captures]), ("time", [c.time_us for c in captures])):
        arrays[name] = pa.array(np.repeat(np.array(stamps, np.int64), counts), type=fields[name].type)
    return pa.Table.from_arrays(
        [
            arrays[field.name] if field.name in arrays else pa.nulls(sum(counts), field.type)
            for field in fields.values()
        ],
        schema=schema(table),
    )


def split(rows: pa.Table) -> list[pa.Table]:
    """The rows of each capture, in order, of rows of many."""
    step, time = (rows[name].cast(pa.int64()).to_numpy() for name in ("step", "time"))
    starts = [0, *(np.flatnonzero((np.diff(step) != 0) | (np.diff(time) != 0)) + 1).tolist(), rows.num_rows]
    return [rows.slice(start, end - start) for start, end in pairwise(starts)]


def _count(table: str, columns: Columns) -> int:
    """Rows of a capture, whose columns are all in the catalogue and of equal length."""
    try:
        fields = _fields(table)
    except KeyError as error:
        raise ColumnError(str(error.args[0]), table=table) from None
    rows = None
    for name, values in columns.items():
        if name not in fields or name in STAMPS:
            known = ", ".join(n for n in fields if n not in STAMPS)
            what = "is filled by the writer; leave it out" if name in STAMPS else "is not in the catalogue"
            raise ColumnError(f"{table}.{name} {what}; {table} has {known}", table=table, column=name)
        if not _is_sequence(values):
            raise ColumnError(
                f"{table}.{name}: expected a sequence or an array, got {type(values).__name__}",
                table=table,
                column=name,
            )
        if rows is None:
            rows = len(values)
        elif len(values) != rows:
            first = next(iter(columns))
            raise ColumnError(
                f"{table}.{name} has {len(values)} rows where {table}.{first} has {rows}; they must be equal",
                table=table,
                column=name,
            )
    return rows or 0


def _is_sequence(values: Any) -> bool:
    kind = type(values)
    if kind is list:
        return True
    if kind is np.ndarray or isinstance(values, np.ndarray):
        return bool(values.ndim)
    return isinstance(values, Sequence) and not isinstance(values, str | bytes)


def _joined(pieces: Sequence[Sequence[Any] | np.ndarray[Any, Any] | None], counts: list[int]) -> Any:
    """The values of all captures, one after the other, in an array where they are in arrays of one type."""
    if len(pieces) == 1 and pieces[0] is not None:
        return pieces[0]
    given = [piece for piece in pieces if piece is not None]
    arrays = [piece for piece in given if isinstance(piece, np.ndarray)]
    like = arrays[0] if arrays else np.empty(0, object)
    is_alike = all(isinstance(p, np.ndarray) and (p.dtype, p.shape[1:]) == (like.dtype, like.shape[1:]) for p in given)
    # A masked row of a matrix would be a list of NULLs, and not NULL.
    if not is_alike or like.dtype == object or (like.ndim > 1 and len(given) < len(pieces)):
        filled = ([None] * count if p is None else p for p, count in zip(pieces, counts, strict=True))
        return list(chain.from_iterable(filled))
    if len(arrays) == len(pieces) and not any(isinstance(array, np.ma.MaskedArray) for array in arrays):
        return np.concatenate(arrays)
    hidden = (
        np.ma.masked_all(count, like.dtype) if p is None else p  # type: ignore[no-untyped-call]
        for p, count in zip(pieces, counts, strict=True)
    )
    return np.ma.concatenate(list(hidden))  # type: ignore[no-untyped-call]


def _weight(values: Any) -> int:
    """Bytes that a column of a capture takes, about; of entries that are arrays, all are taken to be as the first."""
    if isinstance(values, np.ndarray):
        return values.nbytes
    if isinstance(values, list | tuple) and values:
        return len(values) * int(getattr(values[0], "nbytes", 32))
    return sys.getsizeof(values)


@cache
def _fields(table: str) -> dict[str, pa.Field[Any]]:
    """The schema's fields by name: a schema makes each anew when it is asked, which took a fifth of a capture."""
    return {field.name: field for field in schema(table)}


def _column(
    table: str, field: pa.Field[Any], pieces: Sequence[Sequence[Any] | np.ndarray[Any, Any] | None], counts: list[int]
) -> pa.Array[Any]:
    """The Arrow column of the values of all captures, one after the other; None stands for a capture that lacks it."""
    try:
        if len(pieces) > 1 and _repeats(field.type, pieces):
            return pa.concat_arrays([_array(field.type, pieces[0])] * len(pieces))
        return _array(field.type, _joined(pieces, counts))
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ColumnError(
            f"{table}.{field.name}: expected values of type {field.type}; {error}", table=table, column=field.name
        ) from error


def _repeats(kind: pa.DataType, pieces: Sequence[Any]) -> bool:
    """Whether all captures have the same list of keys, as those of an instrument mostly do."""
    first = pieces[0]
    if not (pa.types.is_string(kind) or pa.types.is_integer(kind)) or not isinstance(first, list):
        return False  # not floats: 0.0 equals -0.0
    return all(piece is first or (isinstance(piece, list) and piece == first) for piece in pieces)


def _array(kind: pa.DataType, values: Any) -> pa.Array[Any]:
    if isinstance(values, np.ndarray) and values.dtype != object and not pa.types.is_list(kind):
        mask = np.ma.getmaskarray(values) if isinstance(values, np.ma.MaskedArray) else None
        # What lies under a mask may be anything, and Arrow would check it.
        plain = np.ma.filled(values, 0) if mask is not None else values
        native = plain.astype(plain.dtype.newbyteorder("="), copy=False)
        array: pa.Array[Any] = pa.array(native, type=kind, mask=mask, from_pandas=False)
        return array
    entries = [None if value is np.ma.masked else value for value in values]
    if pa.types.is_list(kind):
        entries = [entry.tolist() if isinstance(entry, np.ma.MaskedArray) else entry for entry in entries]
    if pa.types.is_integer(kind):
        # Given the type, pa.array truncates 1.5 in a list to 1 without a word; the cast refuses, but reads text.
        inferred = pa.array(entries, from_pandas=False)
        return pa.array(entries, type=kind) if pa.types.is_string(inferred.type) else inferred.cast(kind)
    return pa.array(entries, type=kind, from_pandas=False)
