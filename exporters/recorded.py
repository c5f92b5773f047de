"""The latest values of one run as its files tell them, kept up to date: what was read is not read again.

Each poll hands over the files that the run has now. Of new ones the last captures are observed (`captures`), and what
they add to the counters is kept (`sums`). Where a later launch overtook rows, or no file is left that was read before,
the rank's values are taken anew from what is there.

Left out, as no file holds them, and never shown as 0: the writer's queue, captures that were dropped or lost, flushes
that failed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lm_telemetry.exporters.captures import RANK, Files, Moment, last_captures
from lm_telemetry.exporters.naming import exported_columns
from lm_telemetry.exporters.render import Latest, clean_label
from lm_telemetry.exporters.sums import COUNT, COUNTED, UNIT, Key, Sums, sums_of
from lm_telemetry.queries.snapshot import Cut

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import duckdb
    from prometheus_client import Metric

    from lm_telemetry.exporters.written import Written
    from lm_telemetry.queries.snapshot import Part


class RecordedLatest(Latest):
    """`Latest` of which the counters are given, and not counted as rows are observed."""

    def __init__(self, *, run_id: str, rank: int) -> None:
        super().__init__(run_id=run_id, rank=rank, info={})
        self._sums: Mapping[Key, int] = {}
        self._written: Written | None = None

    def count(self, sums: Mapping[Key, int], written: Written | None) -> None:
        """Have the counters be these.

        Args:
            sums: amounts by table, column and label, in `UNIT` parts of 1.
            written: what the rank wrote; None if that is not known.
        """
        self._sums, self._written = sums, written

    def collect(self) -> Iterator[Metric]:
        """The metric families. Exemplars are those of the rows that were observed."""
        totals: dict[tuple[str, str], Counter[str]] = {}
        for (table, column, label), amount in self._sums.items():
            totals.setdefault((table, column), Counter())["other" if label is None else clean_label(label)] += amount
        for column in self._seconds:
            self._seconds[column] = totals.get(("steps", column), Counter()).total() / UNIT
        events = totals.get(("events", COUNT), Counter())
        known = {severity: events.pop(severity, 0) // UNIT for severity in self._events if severity != "other"}
        others = events.total() // UNIT
        for severity, count in {**known, **({"other": others} if others else {})}.items():
            self._events[severity] = (count, self._events.get(severity, (0, None))[1])
        for column in exported_columns("overhead"):
            observed = self._series["overhead", column]
            self._series["overhead", column] = {
                (label,): (amount / UNIT, observed.get((label,), (0.0, None))[1])
                for label, amount in totals.get(("overhead", column), Counter()).items()
            }
        yield from super().collect()

    def _about(self) -> Iterator[Metric]:
        yield from super()._about()
        if self._written is not None:
            yield self._counter("written_rows", "rows on disk", self._written.rows)
            yield self._counter("written_bytes", "bytes of Parquet on disk", self._written.bytes)


@dataclass(slots=True)
class _Rank:
    """One rank: its values, and how far they have been read."""

    latest: RecordedLatest
    cuts: frozenset[Cut]
    parts: dict[str, frozenset[Part]] = field(default_factory=dict)
    """by table, the files that were read"""
    moments: dict[str, Moment] = field(default_factory=dict)
    """by table, the last capture that was observed"""


class RecordedRun:
    """The latest values of all ranks of a run."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self._ranks: dict[int, _Rank] = {}
        self._sums: dict[Part, Sums] = {}

    @property
    def latests(self) -> list[Latest]:
        """Those of the ranks, in order."""
        return [self._ranks[rank].latest for rank in sorted(self._ranks)]

    def read(
        self,
        raw: duckdb.DuckDBPyConnection,
        base: str,
        tables: Mapping[str, list[Part]],
        *,
        cuts: Iterable[Cut],
        is_untold: bool,
        written: Mapping[int, Written],
    ) -> None:
        """Bring the values up to date.

        Args:
            raw: a database that can read the store's files.
            base: what their names are relative to.
            tables: the files that the run has now, by table.
            cuts: what later launches overtook, as far as manifests tell.
            is_untold: whether the rows have to tell that.
            written: what each rank wrote, of those that have told.

        Raises:
            duckdb.Error: a file cannot be read. Values of tables that could be read before it are those of now.
        """
        if is_untold:
            cuts = [*cuts, *_told_by_rows(Files(raw=raw, base=base, table="steps", parts=tables.get("steps", [])))]
        cuts = frozenset(cuts)
        ranks = {part.rank for parts in tables.values() for part in parts}
        self._ranks = {rank: self._rank(rank, cuts, tables) for rank in ranks}
        for table, parts in tables.items():
            new = [part for part in parts if self._is_news(part)]
            if new:
                self._observe(Files(raw=raw, base=base, table=table, parts=new), cuts)
            for rank, known in self._ranks.items():
                known.parts[table] = frozenset(part for part in parts if part.rank == rank)
        self._count(raw, base, tables, written)

    def _rank(self, rank: int, cuts: frozenset[Cut], tables: Mapping[str, list[Part]]) -> _Rank:
        """The rank as it is known, or a new one where that would mislead."""
        own = frozenset(cut for cut in cuts if cut.rank == rank)
        known = self._ranks.get(rank)
        if known is not None and known.cuts == own:
            before = {part for parts in known.parts.values() for part in parts}
            if any(part in before for parts in tables.values() for part in parts):
                return known
        return _Rank(RecordedLatest(run_id=self.run_id, rank=rank), own)

    def _is_news(self, part: Part) -> bool:
        """Whether a file may hold captures that were not observed: not one that was read, nor older ones merged."""
        known = self._ranks[part.rank]
        if part in known.parts.get(part.table, ()):
            return False
        moment = known.moments.get(part.table)
        if moment is None or part.last_step is None:
            return True
        attempt, step, _ = moment
        return part.last_step >= step or (part.attempt is not None and part.attempt > attempt)

    def _observe(self, files: Files, cuts: Iterable[Cut]) -> None:
        ranks = {part.rank for part in files.parts}
        after = {rank: moment for rank in ranks if (moment := self._ranks[rank].moments.get(files.table)) is not None}
        for capture in last_captures(files, cuts=cuts, after=after):
            known = self._ranks[capture.rank]
            known.latest.observe(files.table, capture.rows)
            known.moments[files.table] = capture.moment

    def _count(
        self,
        raw: duckdb.DuckDBPyConnection,
        base: str,
        tables: Mapping[str, list[Part]],
        written: Mapping[int, Written],
    ) -> None:
        sums: dict[Part, Sums] = {}
        for table in COUNTED:
            parts = tables.get(table, [])
            new = [part for part in parts if part not in self._sums]
            found = sums_of(Files(raw=raw, base=base, table=table, parts=new)) if new else {}
            sums |= {part: found[part.file] if part.file in found else self._sums[part] for part in parts}
        self._sums = sums
        totals: dict[int, Counter[Key]] = {rank: Counter() for rank in self._ranks}
        for part, of_file in sums.items():
            totals[part.rank].update(of_file)
        for rank, known in self._ranks.items():
            known.latest.count(totals[rank], written.get(rank))


def _told_by_rows(files: Files) -> list[Cut]:
    """What later launches overtook, from the first step of each; as `Snapshot.cuts` has it from manifests."""
    if not files.parts:
        return []
    query = f"SELECT {RANK} AS rank, attempt, min(step) FROM {files.source} GROUP BY ALL"  # noqa: S608 no names
    starts = files.raw.execute(query, {"files": files.names}).fetchall()
    return [
        Cut(files.parts[0].run_id, rank, attempt, min(later))
        for rank, attempt, _ in starts
        if (later := [step for other, launch, step in starts if other == rank and launch > attempt])
    ]
