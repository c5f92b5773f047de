"""Rows in memory that wait for a flush: kept in order, bounded, the oldest given up first."""

from __future__ import annotations

from collections import deque

import pyarrow as pa

KEEP_BYTES = 256 * 2**20
"""What may wait while nothing can be written."""

_OVERHEAD = 4096
"""Bytes that the Python and Arrow objects of a small table take beside its values, about."""


class Pending:
    """Batches of rows by table.

    Attributes:
        rows: rows that wait.
        bytes: memory they take, about.
    """

    def __init__(self) -> None:
        self._batches: deque[tuple[str, pa.Table, int]] = deque()
        self.rows = 0
        self.bytes = 0

    def add(self, table: str, rows: pa.Table) -> int:
        """Keep `rows`; how many older ones had to be given up for them."""
        weight = int(rows.nbytes) + _OVERHEAD
        self._batches.append((table, rows, weight))
        self.rows += rows.num_rows
        self.bytes += weight
        given_up = 0
        while self.bytes > KEEP_BYTES:
            _, oldest, weight = self._batches.popleft()
            self.rows -= oldest.num_rows
            self.bytes -= weight
            given_up += oldest.num_rows
        return given_up

    def by_table(self) -> dict[str, pa.Table]:
        """All that waits, one table of rows each."""
        tables: dict[str, list[pa.Table]] = {}
        for table, rows, _ in self._batches:
            tables.setdefault(table, []).append(rows)
        return {table: pa.concat_tables(batches) for table, batches in tables.items()}

    def forget(self, table: str) -> None:
        """The rows of `table` wait no longer."""
        kept = deque(batch for batch in self._batches if batch[0] != table)
        self.rows = sum(rows.num_rows for _, rows, _ in kept)
        self.bytes = sum(weight for _, _, weight in kept)
        self._batches = kept
