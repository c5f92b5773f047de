"""Many rows to a few: mean, 90th percentile, maximum, minimum and norm of groups of rows, exactly.

Arrow's grouped quantiles are approximate (t-digest), so the rows are sorted by group and value once, and everything is
read off the sorted values. The percentile interpolates linearly between ranks, h = 0.9 (n - 1), as `quantile_cont` in
SQL and `numpy.percentile` do. NULLs are left out; a NaN makes mean and maximum of its group NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pyarrow as pa
    from numpy.typing import NDArray

Key = tuple[Any, ...]


class Groups:
    """The rows of a table by the values of some columns."""

    def __init__(self, rows: pa.Table, names: Sequence[str]) -> None:
        numbers: dict[Key, int] = {}
        keys = zip(*(rows[name].to_pylist() for name in names), strict=True)
        self._group = np.fromiter((numbers.setdefault(key, len(numbers)) for key in keys), np.intp, rows.num_rows)
        self.keys: tuple[Key, ...] = tuple(numbers)
        """values of the columns, in the order in which they first occur"""

    def summarise(self, column: Any, stats: Sequence[str]) -> dict[tuple[Key, str], float]:
        """Statistics of a column of the table, an Arrow array, by group and name: `mean`, `p90`, `max`, `min`, `norm`.

        A group without values is left out.
        """
        kept = column.is_valid().to_numpy(zero_copy_only=False)
        values = column.to_numpy(zero_copy_only=False)[kept].astype(np.float64)
        group = self._group[kept]
        order = np.lexsort((values, group))
        values, group = values[order], group[order]
        first = np.flatnonzero(np.diff(group, prepend=-1))
        count = np.diff(first, append=len(values))
        result: dict[tuple[Key, str], float] = {}
        for stat in stats:
            for number, value in zip(group[first], _STATS[stat](values, first, count).tolist(), strict=True):
                result[self.keys[number], stat] = value
        return result


def _sums(values: NDArray[np.float64], first: NDArray[np.intp]) -> NDArray[np.float64]:
    if not len(first):
        return np.empty(0)
    with np.errstate(invalid="ignore", over="ignore"):  # infinities of both signs have the sum NaN
        sums: NDArray[np.float64] = np.add.reduceat(values, first)
    return sums


def _p90(values: NDArray[np.float64], first: NDArray[np.intp], count: NDArray[np.intp]) -> NDArray[np.float64]:
    rank = 0.9 * (count - 1)
    below = rank.astype(np.intp)
    low = values[first + below]
    high = values[first + np.minimum(below + 1, count - 1)]
    with np.errstate(invalid="ignore"):  # between infinities of both signs there is nothing
        between: NDArray[np.float64] = np.where(low == high, low, low + (rank - below) * (high - low))
    return between


_STATS: dict[str, Any] = {
    "mean": lambda values, first, count: _sums(values, first) / count,
    "p90": _p90,
    "max": lambda values, first, count: values[first + count - 1],
    "min": lambda values, first, _count: values[first],
    "norm": lambda values, first, _count: np.sqrt(_sums(np.square(values), first)),
}
