"""Answers of a query in the formats of the command line: a box for people; CSV, JSON and Parquet for programs.

NULL is an empty field in CSV and `null` in JSON. JSON has no NaN: there it becomes the word `NaN`, and infinities
`Infinity` and `-Infinity`. Decimals are numbers (DuckDB's sums of integers are decimals), bytes are hexadecimal. Rows
of all but the box are streamed, so that an answer may be larger than memory.

Whoever named a run or wrote an event may have put escape sequences into it, which tell a terminal to do things. So
control characters are spelled out in the box, in messages, in JSON (where that changes nothing), and in CSV that goes
to a terminal.

Only what is streamed takes pyarrow; the box is drawn by DuckDB.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
import sys
from contextlib import contextmanager, redirect_stdout
from datetime import date, time
from decimal import Decimal
from itertools import chain, islice
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

from lm_telemetry.errors import QueryError, StoreError
from lm_telemetry.terminal import one_line, printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence

    import duckdb
    import pyarrow as pa

FORMATS = ("table", "csv", "json", "parquet")
DEFAULT_STORE = "telemetry-store"
STORE_VARIABLE = "LM_TELEMETRY_STORE"

_CONTROL = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What JSON does not escape by itself and a terminal may obey: C1 controls, and marks that turn the direction."""

_UNBOUNDED = (100_000, 100_000)
"""Columns and lines when the output is no terminal."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of commands that answer with rows."""
    add_store(parser)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="table",
        help="default: %(default)s, of at most 10,000 rows; others have all",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write here, and not to standard output")


def add_store(parser: argparse.ArgumentParser) -> None:
    """The option that names the store."""
    parser.add_argument(
        "--store",
        metavar="DIR",
        default=os.environ.get(STORE_VARIABLE) or DEFAULT_STORE,
        help=f"directory of the store (default: ${STORE_VARIABLE}, or {DEFAULT_STORE})",
    )


def table_of(
    connection: duckdb.DuckDBPyConnection,
    columns: Mapping[str, str],
    rows: Sequence[Sequence[Any]],
    query: str = "FROM found",
) -> duckdb.DuckDBPyRelation:
    """Rows that are not in the store, as a relation.

    Args:
        connection: where to make it.
        columns: SQL types of the columns, by name.
        rows: values in that order.
        query: what to do with the rows, which are the table `found` in it.
    """
    found = ", ".join(f'unnest(CAST(? AS {type_}[])) AS "{name}"' for name, type_ in columns.items())
    params = [[row[i] for row in rows] for i in range(len(columns))]
    return connection.sql(f"WITH found AS (SELECT {found}) {query}", params=params)


def size(n_bytes: float | None) -> str | None:
    """A number of bytes as people read it: `3.1 MB`."""
    if n_bytes is None:
        return None
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.4g} TB"


def write(relation: duckdb.DuckDBPyRelation, arguments: argparse.Namespace) -> None:
    """Write the rows of `relation` as `--format` and `-o` say.

    Raises:
        QueryError: Parquet would go to a terminal.
        StoreError: the file cannot be written.
    """
    if arguments.format == "parquet":
        if not arguments.output and sys.stdout.isatty():
            raise QueryError("parquet is not for terminals: give -o FILE, or redirect the output")
        with _binary(arguments.output) as file:
            _parquet(relation, file)
        return
    with _text(arguments.output) as file:
        {"table": _table, "csv": _csv, "json": _json}[arguments.format](relation, file)


def write_text(text: str, arguments: argparse.Namespace) -> None:
    """Write a text where `-o` says (StoreError if that cannot be)."""
    with _text(arguments.output) as file:
        file.write(text)


def _table(relation: duckdb.DuckDBPyRelation, file: TextIO) -> None:
    if relation.columns == ["explain_key", "explain_value"]:
        file.writelines(f"{printable(plan)}\n" for _, plan in relation.fetchall())
        return
    width, height = shutil.get_terminal_size(_UNBOUNDED)
    with redirect_stdout(io.StringIO()) as box:
        # Head, types, count and the prompt take some ten lines.
        relation.show(max_width=width, max_rows=max(10, height - 10))
    file.write(printable(box.getvalue()))


def _csv(relation: duckdb.DuckDBPyRelation, file: TextIO) -> None:
    writer = csv.writer(file, lineterminator="\n")
    shown = one_line if file.isatty() else str
    rows = _rows(relation)
    first = list(islice(rows, 1))  # an answer that fails at once has no head either
    writer.writerow(map(shown, relation.columns))
    for row in chain(first, rows):
        writer.writerow([shown(_field(value)) for value in row])


def _json(relation: duckdb.DuckDBPyRelation, file: TextIO) -> None:
    names = relation.columns
    separator = "["
    for row in _rows(relation):
        document = dict(zip(names, map(plain, row), strict=True))
        file.write(f"{separator}\n{to_json(document)}")
        separator = ","
    file.write("[]\n" if separator == "[" else "\n]\n")


def to_json(document: Any) -> str:
    """A document that `plain` has gone over, in one line without control characters."""
    return _CONTROL.sub(_escaped, json.dumps(document, ensure_ascii=False, default=str))


def _escaped(character: re.Match[str]) -> str:
    return f"\\u{ord(character[0]):04x}"


def _parquet(relation: duckdb.DuckDBPyRelation, file: IO[bytes]) -> None:
    import pyarrow.parquet as pq

    reader = _batches(relation)
    with pq.ParquetWriter(file, reader.schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_batch(batch)


def _rows(relation: duckdb.DuckDBPyRelation) -> Iterator[tuple[Any, ...]]:
    for batch in _batches(relation):
        try:
            columns = [column.to_pylist() for column in batch.columns]
        except (OverflowError, ValueError) as error:
            raise QueryError(
                f"a date or time of the answer has no form in csv and json ({error}); CAST(... AS VARCHAR) gives it one"
            ) from error
        yield from zip(*columns, strict=True)


def _batches(relation: duckdb.DuckDBPyRelation) -> pa.RecordBatchReader:
    import pyarrow as pa

    # The one way to a stream of batches that DuckDB 1.2 and 2.0 have both, without a warning.
    return pa.RecordBatchReader.from_stream(relation)


def plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def _field(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str | Decimal):
        return str(value)
    known = plain(value)
    return known if isinstance(known, str) else json.dumps(known, ensure_ascii=False, default=str)


@contextmanager
def _text(path: str | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    with _opened(path, "w") as file:
        yield cast("TextIO", file)


@contextmanager
def _binary(path: str | None) -> Iterator[IO[bytes]]:
    if path is None:
        yield sys.stdout.buffer
        return
    with _opened(path, "wb") as file:
        yield file


@contextmanager
def _opened(path: str, mode: str) -> Iterator[IO[Any]]:
    try:
        with open(path, mode, encoding=None if "b" in mode else "utf-8", newline=None if "b" in mode else "") as file:  # noqa: PTH123
            yield file
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; give another -o", path=path) from error
