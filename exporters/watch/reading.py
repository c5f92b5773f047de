"""What the view knows of a run at one moment: questions to the store, asked again only where something has changed.

- Judgements are those of the library's views, over the last `RECENT` steps (`recent`).
- The course of the loss, and of curvature as a share of its threshold, is that of the whole run, folded by DuckDB into
  `BUCKETS` stretches of equal length. It is asked again when the run has grown by a `GROWTH`th; what came since is
  added from the recent rows. So looking at a run from its beginning to its end costs a few passes over it.
- A question that cannot be answered keeps its last answer, and the reason is shown.

One rank stands for all (`rank`); events are those of every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_telemetry.errors import QueryError, StoreError
from lm_telemetry.exporters.watch.questions import LARGEST, PACE, TABLES, questions
from lm_telemetry.exporters.watch.recent import RECENT, Recent
from lm_telemetry.queries.connect import rows_of
from lm_telemetry.queries.tables import quoted, text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from lm_telemetry.queries import Connection

BUCKETS = 400
GROWTH = 25
Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A stretch of a course."""

    step: int
    """its first step"""
    last: int
    """its last step"""
    low: float | None
    """smallest finite value; None if there is none"""
    high: float | None
    nonfinite: int
    """values that are NaN or infinite"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is known of a run.

    Attributes:
        run_id: name of the run; None while there is none.
        answers: rows by the question's name (see `questions`).
        loss: course of the training loss.
        edge: course of the estimate of curvature with the most captures, as a share of its threshold.
        edge_name: operator and estimator of that.
        is_live: whether somebody writes into the run.
        last_row: when the last row was captured, UTC.
        problems: why something could not be asked.
    """

    run_id: str | None
    answers: Mapping[str, Rows]
    loss: tuple[Bucket, ...] = ()
    edge: tuple[Bucket, ...] = ()
    edge_name: str = ""
    is_live: bool = False
    last_row: datetime | None = None
    problems: tuple[str, ...] = ()

    def first(self, question: str) -> dict[str, Any]:
        """The first row of an answer; empty if there is none."""
        return next(iter(self.answers.get(question, ())), {})


@dataclass(slots=True)
class _Course:
    """A folded course, and how far the run was then."""

    buckets: tuple[Bucket, ...] = ()
    steps: tuple[int, int] = (0, 0)


class Watcher:
    """Looks at one rank of one run, again and again.

    Args:
        connection: the store.
        run_id: name of the run.
        rank: rank of the process that stands for all.
        is_live: told when the last row was captured, whether somebody writes into the run.
    """

    def __init__(
        self,
        connection: Connection,
        run_id: str,
        *,
        rank: int,
        is_live: Callable[[datetime | None], bool],
    ) -> None:
        self._connection = connection
        self._recent = Recent.of(connection, run_id, rank)
        self._run_id, self._rank = run_id, rank
        self._is_live = is_live
        self._files: dict[str, tuple[str, ...]] = {}
        self._answers: dict[str, Rows] = {}
        self._loss, self._edge = _Course(), _Course()
        self._edge_series: tuple[str, str] | None = None

    def look(self) -> Reading:
        """What is known now."""
        import duckdb

        problems: dict[str, None] = {}
        try:
            if not self._recent.look():
                problems[f"run {self._run_id} is not in the store any more; what was seen last is shown"] = None
            else:
                for problem in self._ask((QueryError, StoreError, duckdb.Error)):
                    problems[problem] = None
        except StoreError as error:
            problems[str(error)] = None
        pace = next(iter(self._answers.get("pace", ())), {})
        last_row = pace.get("last_row")
        return Reading(
            run_id=self._run_id,
            answers=dict(self._answers),
            loss=self._with_tail(self._loss, "losses"),
            edge=self._with_tail(self._edge, "ratios"),
            edge_name=" ".join(self._edge_series or ()),
            is_live=self._is_live(last_row),
            last_row=last_row,
            problems=tuple(problems),
        )

    def _ask(self, errors: tuple[type[Exception], ...]) -> list[str]:
        """Ask what may have changed; why something could not be asked."""
        problems = []
        bounds: dict[str, tuple[int, int]] = {}
        for table in TABLES:
            sql = f"SELECT min(step) AS first, max(step) AS last FROM {quoted(table)}"  # noqa: S608 our own name
            try:
                (found,) = self._cached(f"bounds {table}", (table,), f"{sql} WHERE {self._where}")
            except errors as error:
                problems.append(str(error))
                continue
            if found["last"] is not None:
                bounds[table] = (found["first"], found["last"])
        for name, (tables, sql) in questions(self._run_id, self._rank, bounds).items():
            try:
                self._cached(name, tables, sql)
            except errors as error:
                problems.append(str(error))
        try:
            self._follow(bounds)
        except errors as error:
            problems.append(str(error))
        return problems

    @property
    def _where(self) -> str:
        return f"run_id = {text(self._run_id)} AND rank = {self._rank}"

    def _cached(self, name: str, tables: tuple[str, ...], sql: str) -> Rows:
        files = self._recent.files(*tables)
        if self._files.get(name) != files:
            self._answers[name] = rows_of(self._recent.execute(sql))
            self._files[name] = files
        return self._answers[name]

    def _follow(self, bounds: Mapping[str, tuple[int, int]]) -> None:
        """Fold the whole courses again, if the run has grown enough."""
        if "steps" in bounds:
            source = f"SELECT step, loss AS value FROM steps WHERE {self._where} AND loss IS NOT NULL"  # noqa: S608 ours
            self._fold(self._loss, bounds["steps"], source)
        series = self._answers.get("ratios", [])
        if "curvature" in bounds and series:
            self._edge_series = (series[0]["operator"], series[0]["estimator"])
            named = f"operator = {text(series[0]['operator'])} AND estimator = {text(series[0]['estimator'])}"
            source = f"""SELECT step, value / threshold AS value FROM curvature
                WHERE {self._where} AND {named} AND {LARGEST}"""  # noqa: S608 ours, quoted
            self._fold(self._edge, bounds["curvature"], source)

    def _fold(self, course: _Course, steps: tuple[int, int], source: str) -> None:
        first, last = steps
        if course.steps[0] == first and first < course.steps[1] and last >= course.steps[1]:
            grown = last - course.steps[1]
            # Recent rows join on to it only while they reach back to its end.
            if grown < RECENT - PACE and grown * GROWTH < course.steps[1] - first + RECENT:
                return
        width = (last - first) // BUCKETS + 1
        asked = self._connection.execute(_FOLDED.format(source=source, first=first, width=width))
        course.buckets = tuple(Bucket(**row) for row in rows_of(asked))
        course.steps = (first, last)

    def _with_tail(self, course: _Course, question: str) -> tuple[Bucket, ...]:
        rows = self._answers.get(question, [])
        tail = [row for row in rows if row["step"] > course.steps[1] and _series(row) == _series(rows[0])]
        return course.buckets + tuple(_bucket(row["step"], row["value"]) for row in tail)


def _series(row: dict[str, Any]) -> tuple[Any, Any]:
    return row.get("operator"), row.get("estimator")


def _bucket(step: int, value: float) -> Bucket:
    known = value if abs(value) < float("inf") else None
    return Bucket(step=step, last=step, low=known, high=known, nonfinite=int(known is None))


_FOLDED = """SELECT
    min(step) AS step,
    max(step) AS last,
    min(value) FILTER (isfinite(value)) AS low,
    max(value) FILTER (isfinite(value)) AS high,
    count(*) FILTER (NOT isfinite(value)) AS nonfinite
FROM ({source})
GROUP BY (step - {first}) // {width}
ORDER BY 1"""
