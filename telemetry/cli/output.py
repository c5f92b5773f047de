"""Answers of a query in the formats of the command line: a box for people; CSV, JSON and Parquet for programs.

NULL is an empty field in CSV and `null` in JSON. JSON has no NaN: there it becomes the word `NaN`, and infinities
`Infinity` and `-Infinity`. Rows are streamed, so that an answer may be larger than memory.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import sys
from contextlib import contextmanager, redirect_stdout
from datetime import date, time
from typing import IO, TYPE_CHECKING, Any, TextIO, cast

from lm_telemetry.errors import QueryError, StoreError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    import duckdb
    import pyarrow as pa

FORMATS = ("table", "csv", "json", "parquet")
DEFAULT_STORE = "telemetry-store"
STORE_VARIABLE = "LM_TELEMETRY_STORE"

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


def _table(relation: duckdb.DuckDBPyRelation, file: TextIO) -> None:
    if relation.columns == ["explain_key", "explain_value"]:
        file.writelines(f"{plan}\n" for _, plan in _rows(relation))
        return
    width, height = shutil.get_terminal_size(_UNBOUNDED)
    with redirect_stdout(file):
        # Head, types, count and the prompt take some ten lines.
        relation.show(max_width=max(40, width), max_rows=max(10, height - 10))


def _csv(relation: duckdb.DuckDBPyRelation, file: TextIO) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(relation.columns)
    for row in _rows(relation):
        writer.writerow([_field(value) for value in row])


def _json(relation: duckdb.DuckDBPyRelation, file: TextIO) -> None:
    names = relation.columns
    separator = "["
    for row in _rows(relation):
        document = dict(zip(names, map(_plain, row), strict=True))
        file.write(f"{separator}\n{json.dumps(document, ensure_ascii=False, default=str)}")
        separator = ","
    file.write("[]\n" if separator == "[" else "\n]\n")


def _parquet(relation: duckdb.DuckDBPyRelation, file: IO[bytes]) -> None:
    import pyarrow.parquet as pq

    reader = _batches(relation)
    with pq.ParquetWriter(file, reader.schema, compression="zstd") as writer:
        for batch in reader:
            writer.write_batch(batch)


def _rows(relation: duckdb.DuckDBPyRelation) -> Iterator[tuple[Any, ...]]:
    for batch in _batches(relation):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _batches(relation: duckdb.DuckDBPyRelation) -> pa.RecordBatchReader:
    import pyarrow as pa

    # The one way to a stream of batches that DuckDB 1.2 and 2.0 have both, without a warning.
    return pa.RecordBatchReader.from_stream(relation)


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _field(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    plain = _plain(value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False, default=str)


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
