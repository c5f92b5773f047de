"""`lmt diff RUN RUN`: what was set differently in two runs, and what became of it.

Settings are compared as the last launch of each run recorded them, JSON by its fields. Losses are compared at equal
steps, means over ranks. They depart at the first step at which

    |mean of d over the last 20 steps that both have| > 4 standard errors,   d = loss_a - loss_b,

and stays so for 20 such steps: a whole window that shares no step with the first. The noise is thus that of the
difference itself, small for two runs on the same batches, and white noise does not pass (two independent windows both
beyond 4 errors: about one in a million a step). A loss that is not finite in one run alone is a departure at once.
Apart from that it is told where two losses are not equal to the last bit: whether runs that should be the same are.

Left out: other quantities (the view `compare_runs` has some), and more than two runs.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lm_telemetry.cli import output
from lm_telemetry.cli.asking import asking
from lm_telemetry.meant import require_runs
from lm_telemetry.terminal import one_line

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence

    from lm_telemetry.queries import Connection

WINDOW = 20
"""Steps that a mean is over, and that a departure lasts."""

ERRORS = 4.0
"""Standard errors beyond which a difference is no noise."""

SHOWN = 12
"""Steps that are shown."""

HASH_SHOWN = 12
"""Digits of a hash that are shown."""

_ABOUT_THE_ROW = {"run_id", "rank", "attempt", "step", "time"}

_SETTINGS = """
    SELECT * FROM raw.runs WHERE run_id = ?
    QUALIFY row_number() OVER (ORDER BY attempt DESC, rank, time DESC) = 1
"""

_STEPS = f"""
    WITH means AS (
        SELECT run_id, step, avg(loss) AS loss, avg(grad_norm) AS grad_norm, max(learning_rate) AS learning_rate
        FROM steps WHERE run_id IN ($a, $b) GROUP BY run_id, step
    ),
    pairs AS (
        SELECT step, a.loss AS loss_a, b.loss AS loss_b, a.grad_norm AS grad_norm_a, b.grad_norm AS grad_norm_b,
            a.learning_rate AS learning_rate_a, b.learning_rate AS learning_rate_b,
            CASE WHEN isfinite(a.loss - b.loss) THEN a.loss - b.loss END AS d
        FROM (FROM means WHERE run_id = $a) AS a JOIN (FROM means WHERE run_id = $b) AS b USING (step)
    )
    SELECT * EXCLUDE (d), d AS loss_difference, avg(d) OVER recent AS smoothed_difference,
        stddev_samp(d) OVER recent / sqrt(count(d) OVER recent) AS stderr, count(d) OVER recent AS n
    FROM pairs
    WINDOW recent AS (ORDER BY step ROWS BETWEEN {WINDOW - 1} PRECEDING AND CURRENT ROW)
    ORDER BY step
"""  # noqa: S608 a constant

_FINAL = """
    SELECT count(DISTINCT step) AS steps, max(step) AS last_step, avg(loss) FILTER (step = last) AS last_loss,
        avg(loss) FILTER (place <= $window) AS mean_of_last_losses, min(loss) AS lowest_loss,
        CAST(sum(tokens) AS BIGINT) AS tokens, sum(seconds) / nullif(count(DISTINCT rank), 0) AS seconds
    FROM (
        SELECT *, max(step) OVER () AS last, dense_rank() OVER (ORDER BY step DESC) AS place
        FROM steps WHERE run_id = $run
    )
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """Where the losses of two runs part.

    Attributes:
        matched_steps: steps that both have a loss of.
        first_unequal_step: first of them at which the losses are not equal bit by bit; None if all are.
        departed_by_step: first at which they differ beyond noise, and go on to; None if they do not. A jump is told
            some steps late, since the window has to fill with it.
    """

    matched_steps: int
    first_unequal_step: int | None
    departed_by_step: int | None


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "diff",
        help="compare two runs",
        description="Show what two runs were set to do differently, their losses at equal steps, and where they part.",
    )
    parser.add_argument("a", metavar="RUN", help="one run")
    parser.add_argument("b", metavar="RUN", help="the other")
    output.add_store(parser)
    parser.add_argument("--format", choices=("table", "json"), default="table", help="default: %(default)s")
    parser.set_defaults(run=run, output=None)


def run(arguments: argparse.Namespace) -> int:
    """Print; StoreError if there is no such run."""
    with asking(arguments.store) as connection:
        _write(connection, arguments)
    return 0


def _write(connection: Connection, arguments: argparse.Namespace) -> None:
    a, b = arguments.a, arguments.b
    require_runs(connection, (a, b))
    settings = differing(_settings(connection, a), _settings(connection, b))
    steps = _rows(connection, _STEPS, {"a": a, "b": b})
    departed = departure(steps)
    finals = [_rows(connection, _FINAL, {"run": name, "window": WINDOW})[0] for name in (a, b)]
    if arguments.format == "json":
        chosen = {
            "a": a,
            "b": b,
            "settings": [{"setting": name, "a": one, "b": other} for name, one, other in settings],
            "departure": asdict(departed),
            "steps": steps,
            "final": dict(zip("ab", finals, strict=True)),
        }
        print(output.to_json(output.plain(chosen)))
        return
    _print(connection, arguments, settings, steps, finals)
    print(_sentence(departed))


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, value in a, value in b) of what is not equal; None stands for what is not there."""
    names = dict.fromkeys((*a, *b))
    return [(name, a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)]


def departure(steps: Iterable[dict[str, Any]]) -> Departure:
    """Where two runs part.

    Args:
        steps: by step that both have, in order: `step`, `loss_a`, `loss_b`, and over the last 20 of finite differences
            `smoothed_difference` and its `stderr`.
    """
    matched, lasted = 0, 0
    unequal = since = departed = None
    for row in steps:
        a, b = row["loss_a"], row["loss_b"]
        if a is None or b is None:
            continue
        matched += 1
        if unequal is None and a != b and not (math.isnan(a) and math.isnan(b)):
            unequal = row["step"]
        if departed is not None:
            continue
        if math.isfinite(a) != math.isfinite(b):
            departed = row["step"]
        elif _is_beyond_noise(row["smoothed_difference"], row["stderr"]):
            since, lasted = (row["step"], 1) if not lasted else (since, lasted + 1)
            departed = since if lasted >= WINDOW else None
        else:
            lasted = 0
    return Departure(matched_steps=matched, first_unequal_step=unequal, departed_by_step=departed)


def _is_beyond_noise(mean: float | None, stderr: float | None) -> bool:
    return mean is not None and stderr is not None and abs(mean) > ERRORS * stderr


def _settings(connection: Connection, run_id: str) -> dict[str, Any]:
    """What the last launch of a run recorded of itself, JSON taken apart."""
    found = _rows(connection, _SETTINGS, [run_id])
    settings: dict[str, Any] = {}
    for name, value in (found[0] if found else {}).items():
        if name not in _ABOUT_THE_ROW:
            settings |= _flat(name, _from_json(value))
    return settings


def _from_json(value: Any) -> Any:
    """The object or list in a text; any other value as it is."""
    if isinstance(value, str) and value[:1] in {"{", "["}:
        with suppress(ValueError):
            return json.loads(value)
    return value


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {path: entry for key, inner in value.items() for path, entry in _flat(f"{name}.{key}", inner).items()}


def _rows(connection: Connection, query: str, params: Any) -> list[dict[str, Any]]:
    from lm_telemetry.queries.connect import rows_of

    return rows_of(connection.execute(query, params))


def _print(
    connection: Connection,
    arguments: argparse.Namespace,
    settings: list[tuple[str, Any, Any]],
    steps: list[dict[str, Any]],
    finals: list[dict[str, Any]],
) -> None:
    print(one_line(f"a is {arguments.a}, b is {arguments.b}"))
    texts = [(name, _text(name, one), _text(name, other)) for name, one, other in settings]
    _box(connection, arguments, "setting a b", texts, "no setting differs")
    shown = (
        [steps[i] for i in sorted({round(i * (len(steps) - 1) / (SHOWN - 1)) for i in range(SHOWN)})] if steps else []
    )
    # Of a box that is too wide the middle is left out.
    names = "step loss_a loss_b grad_norm_a grad_norm_b loss_difference smoothed_difference stderr"
    rows = [[_text(name, row[name]) for name in names.split()] for row in shown]
    _box(connection, arguments, names, rows, "the runs have no step in common")
    ends = [(name, *(_text(name, final[name]) for final in finals)) for name in finals[0]]
    _box(connection, arguments, "at_the_end a b", ends, "")


def _box(
    connection: Connection, arguments: argparse.Namespace, columns: str, rows: Sequence[Sequence[Any]], without: str
) -> None:
    if rows:
        output.write(output.table_of(connection, dict.fromkeys(columns.split(), "VARCHAR"), rows), arguments)
    else:
        print(without)


def _text(name: str, value: Any) -> str | None:
    """A value in a box: six digits of a number, the beginning of a hash."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return value[:HASH_SHOWN] if name.endswith("sha256") else value
    return None if value is None else json.dumps(value, default=str)


def _sentence(found: Departure) -> str:
    if not found.matched_steps:
        return "There is nothing to compare: no step has a loss in both runs."
    if found.first_unequal_step is None:
        return f"The losses of all {found.matched_steps} steps in common are equal to the last bit."
    departed = f"depart beyond noise by step {found.departed_by_step}"
    never = "never depart beyond noise for longer than a moment"
    return (
        f"Of {found.matched_steps} steps in common, the losses first differ at step {found.first_unequal_step}, and"
        f" {never if found.departed_by_step is None else departed}."
    )
