"""The report's way of asking a store: SQL as text, so that a reader can ask the same again, and arrays back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lm_telemetry.queries.connect import rows_of
from lm_telemetry.queries.tables import text

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from lm_telemetry.exporters.report.model import Array
    from lm_telemetry.queries import Connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A store, and the runs of it that the report is about."""

    connection: Connection
    run_ids: tuple[str, ...]
    columns_shown: int
    """columns that each heatmap may have"""

    @property
    def is_comparison(self) -> bool:
        """Whether there are several runs."""
        return len(self.run_ids) > 1

    @property
    def of_runs(self) -> str:
        """The condition that a row is of one of the runs, on any rank."""
        names = ", ".join(map(text, self.run_ids))
        return f"run_id IN ({names})" if self.is_comparison else f"run_id = {names}"

    @property
    def where(self) -> str:
        """The condition that a row is of one of the runs, and of rank 0."""
        return f"{self.of_runs} AND rank = 0"

    def columns(self, sql: str) -> dict[str, Array]:
        """The answer by column: numbers as float64, where NULL and what is not finite are NaN; texts as objects."""
        found = self.connection.execute(sql).fetchnumpy()
        return {name: _plain(column) for name, column in found.items()}

    def rows(self, sql: str) -> list[dict[str, Any]]:
        """The answer row by row, as DuckDB has it: NULL is None, NaN is NaN."""
        return rows_of(self.connection.execute(sql))

    def figure_id(self, stem: str, run_id: str) -> str:
        """`id` of a figure of one run: `rms`, or `rms-2` for the second of several.

        Figures whose ids agree but for that number show the same of several runs, in one range of colours.
        """
        return f"{stem}-{self.run_ids.index(run_id) + 1}" if self.is_comparison else stem

    def absent(self, captured: Collection[str], what: str, how: str) -> Iterator[str]:
        """A sentence for the runs of which nothing was captured, if there are any.

        >>> source.absent([], "spectra", "instrument `spectrum`")  # doctest: +SKIP
        'No spectra were captured (instrument `spectrum`)'
        """
        without = [run_id for run_id in self.run_ids if run_id not in captured]
        if without:
            whose = f" of {', '.join(without)}" if self.is_comparison else ""
            yield f"No {what} captured{whose} ({how})"


def of(run_id: str) -> str:
    """The condition that a row is of the run, on any rank."""
    return f"run_id = {text(run_id)}"


def on_rank_0(run_id: str) -> str:
    """The condition that a row is of the run's rank 0, which stands for all in figures."""
    return f"{of(run_id)} AND rank = 0"


def _plain(column: Any) -> Array:
    if column.dtype == object or column.dtype.kind in "MmUS":
        return np.ma.filled(column.astype(object), None)
    values: Array = np.ma.filled(np.ma.asarray(column).astype(np.float64), np.nan)
    values[~np.isfinite(values)] = np.nan
    return values
