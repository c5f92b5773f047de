"""Asking a store on somebody's behalf: what goes wrong has words and no traceback, and Ctrl-C ends a query.

Python runs its handler of SIGINT when the main thread is back from DuckDB, which may be minutes later: DuckDB looks for
signals only while the main thread happens to work on the query itself. So another thread is woken by the signal, and
tells DuckDB to stop.
"""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from threading import Thread
from typing import TYPE_CHECKING

from lm_telemetry.errors import QueryError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_telemetry.queries import Connection


@contextmanager
def asking(store: str) -> Iterator[Connection]:
    """A connection for queries of our own.

    Raises:
        StoreError: there is no store, or a manifest in it cannot be read.
        QueryError: a file of the store cannot be read, or DuckDB cannot answer for another reason.
        KeyboardInterrupt: of Ctrl-C, at once.
    """
    from lm_telemetry.queries import connect

    with connect(store) as connection, guarded(connection):
        yield connection


@contextmanager
def guarded(connection: Connection) -> Iterator[None]:
    """A context for queries of our own: Ctrl-C ends them, and what DuckDB cannot answer is a QueryError."""
    import duckdb

    with interruptible(connection):
        try:
            with connection.explained():
                yield
        except duckdb.InterruptException:
            raise
        except duckdb.Error as error:
            # The line of a query that nobody typed tells nobody anything.
            raise QueryError(str(error).partition("\n\nLINE ")[0].strip()) from error


@contextmanager
def interruptible(connection: Connection) -> Iterator[None]:
    """A context in which Ctrl-C stops the query that runs, and comes out as KeyboardInterrupt. For the main thread."""
    import duckdb

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watcher = Thread(target=_watch, args=(reading, connection), daemon=True)
    watcher.start()
    try:
        yield
    except duckdb.InterruptException:
        raise KeyboardInterrupt from None
    except RuntimeError as error:  # what DuckDB makes of a signal that it sees itself
        if "interrupted" not in str(error):
            raise
        raise KeyboardInterrupt from None
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        watcher.join()
        os.close(reading)


def _watch(reading: int, connection: Connection) -> None:
    while signals := os.read(reading, 64):
        if signal.SIGINT in signals:
            connection.interrupt()
