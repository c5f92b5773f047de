"""What waits in memory for a flush: captures as they came, and rows that could not be written, which are bounded.

    catch -> captures -> [take_caught, made into rows] -> add -> by_table -> forget

Making rows of all captures of a flush together costs a fraction of what it costs one by one (`columns.to_rows`).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from lm_telemetry.columns import Captured

KEEP_BYTES = 256 * 2**20
"""What may wait while nothing can be written."""

_OVERHEAD = 4096
"""Bytes that the Python and Arrow objects of a capture or a small table take beside its values, about."""


class Pending:
    """Captures and rows that wait.

    Attributes:
        caught_bytes: memory that captures take, about.
    """

    def __init__(self) -> None:
        self._caught: dict[str, list[Captured]] = {}
        self._caught_rows = self.caught_bytes = 0
        self._batches: deque[tuple[str, pa.Table, int]] = deque()
        self._batch_rows = self._batch_bytes = 0

    @property
    def rows(self) -> int:
        """Rows that wait."""
        return self._caught_rows + self._batch_rows

    @property
    def bytes(self) -> int:
        """Memory they take, about."""
        return self.caught_bytes + self._batch_bytes

    def catch(self, table: str, captured: Captured) -> None:
        """Keep a capture."""
        weight, rows = captured.bytes + _OVERHEAD, captured.rows
        self._caught.setdefault(table, []).append(captured)
        self.caught_bytes += weight
        self._caught_rows += rows

    def take_caught(self) -> dict[str, list[Captured]]:
        """The captures by table, in order; they wait no longer."""
        caught, self._caught = self._caught, {}
        self._caught_rows = self.caught_bytes = 0
        return caught

    def add(self, table: str, rows: pa.Table) -> int:
        """Keep `rows`; how many older ones had to be given up for them."""
        weight = int(rows.nbytes) + _OVERHEAD
        self._batches.append((table, rows, weight))
        self._batch_rows += rows.num_rows
        self._batch_bytes += weight
        given_up = 0
        while self._batch_bytes > KEEP_BYTES:
            _, oldest, weight = self._batches.popleft()
            self._batch_rows -= oldest.num_rows
            self._batch_bytes -= weight
            given_up += oldest.num_rows
        return given_up

    def by_table(self) -> dict[str, pa.Table]:
        """All rows that wait, one table of rows each."""
        tables: dict[str, list[pa.Table]] = {}
        for table, rows, _ in self._batches:
            tables.setdefault(table, []).append(rows)
        return {table: pa.concat_tables(batches) for table, batches in tables.items()}

    def forget(self, table: str) -> None:
        """The rows of `table` wait no longer."""
        kept = deque(batch for batch in self._batches if batch[0] != table)
        self._batch_rows = sum(rows.num_rows for _, rows, _ in kept)
        self._batch_bytes = sum(weight for _, _, weight in kept)
        self._batches = kept
