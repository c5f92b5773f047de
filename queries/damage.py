"""Which file of the store made a query fail: DuckDB's errors, some of which name no file, in words that do.

A file that is gone, cut short or overwritten is named by DuckDB itself. Damage within a file may come out as a bare
"Invalid data", or as text that is no text; then the files are tried one by one, which only a failed query pays for.
What the filesystem of a store at an URL raises comes out as the text of a traceback.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from lm_telemetry.errors import QueryError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import duckdb

    from lm_telemetry.queries.snapshot import Snapshot

SEARCH_SECONDS = 10.0
"""How long files are tried."""

_TRACEBACK = re.compile(r"^Traceback .*?^(?!Traceback|\s)([^\n]+)", re.DOTALL | re.MULTILINE)
"""with the line that names the exception"""

_NAMED = re.compile(r"['\"]([^'\"\n]*\.(?:parquet|merged))['\"]")


def explain(error: Exception, raw: duckdb.DuckDBPyConnection, snapshot: Snapshot) -> QueryError | None:
    """The error to raise in place of `error`; None if it does not come from a file of the store."""
    import duckdb

    if "required extension" in str(error):
        return None  # of DuckDB, not of the store
    bare = (
        type(error) is duckdb.Error
        or isinstance(error, duckdb.InternalException | UnicodeDecodeError)
        or "Parquet metadata is corrupt" in str(error)
    )
    if not bare and not isinstance(error, duckdb.IOException | duckdb.InvalidInputException):
        return None
    text = re.sub(r"\[([\[*?])\]", r"\1", str(error))
    raised = _TRACEBACK.match(text)
    if raised:
        return QueryError(f"the store at {snapshot.base} cannot be read so: {raised[1]}")
    file = _named(text, snapshot.base)
    if file is None and not bare:
        return None
    why = text.strip().split("\n", 1)[0]
    if file is None:
        file = next(_failing(raw, snapshot), None)
    if file is None and isinstance(error, duckdb.InternalException):
        return None  # a bug of DuckDB's, as far as one can see
    if file is None:
        return QueryError(f"a file of the store {snapshot.base} is damaged: {why}; `lmt verify --deep` tells which")
    remedy = "`lmt verify` tells what is lost, `lmt verify --repair` puts it aside"
    name = file if file.startswith(f"{snapshot.base}/") else f"{snapshot.base}/{file}"
    return QueryError(f"cannot read {name}: {why}; {remedy}")


def _named(text: str, base: str) -> str | None:
    """The file of the store that a message names."""
    for name in _NAMED.findall(text):
        if name.startswith(f"{base}/"):
            return str(name)
    return None


def _failing(raw: duckdb.DuckDBPyConnection, snapshot: Snapshot) -> Iterator[str]:
    """Files that cannot be read to the end, as far as there is time to try."""
    import duckdb

    end = time.monotonic() + SEARCH_SECONDS
    cursor = raw.cursor()
    for parts in snapshot.tables.values():
        for part in parts:
            if time.monotonic() > end:
                return
            path = re.sub(r"[\[*?]", r"[\g<0>]", f"{snapshot.base}/{part.file}")
            try:
                cursor.execute("SELECT bit_xor(hash(t)) FROM read_parquet(?) AS t", [path]).fetchall()
            except (duckdb.Error, UnicodeDecodeError):
                yield part.file
