"""Scaling laws of captured runs: the points that `fits` is given, read through the tables of a store.

    >>> fit = fit_loss_curve(connect("telemetry-store"), "my-run")  # doctest: +SKIP
    >>> fit.a.value, fit.a.low, fit.a.high, fit.at_bound  # doctest: +SKIP

Decisions:

- Tokens and losses of a step are those of all ranks: tokens are added, losses averaged. Losses are training losses.
- A curve begins when the learning rate has first been highest. The warm-up before it follows no power law, and its few
  tokens would decide about the exponent.
- A curve's steps are averaged in bins of equal width in log tokens, weighted by their number. So each decade counts as
  it has steps, neighbours that drift together are one point rather than many witnesses, and a million steps cost no
  more than a thousand.
- A run has the loss of its last steps. Laws across runs take runs that were trained to their end: a run cut off before
  its learning rate has come down lies above the curve (2203.15556).

Left out: batch size and learning rate, which must be near their best for each run if a law is to hold.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lm_telemetry.queries.fit_checks import FitError
from lm_telemetry.queries.fits import Chinchilla, PowerLaw, chinchilla, power_law

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_telemetry.queries.connect import Connection
    from lm_telemetry.queries.fit_checks import Array

BINS = 64
"""Points that a loss curve is averaged into, at most."""
TAIL = 0.05
"""Share of a run's steps, its last ones, whose mean is its loss."""

_CURVE = """
    SELECT step, avg(loss) AS loss, max(learning_rate) AS learning_rate, sum(tokens) AS tokens
    FROM steps WHERE run_id = ? GROUP BY step ORDER BY step
"""

_RUNS = """
    WITH stepped AS (
        SELECT run_id, step, avg(loss) AS loss, sum(tokens) AS tokens FROM steps GROUP BY run_id, step
    ),
    placed AS (
        SELECT
            *,
            row_number() OVER (PARTITION BY run_id ORDER BY step DESC) AS place,
            count(*) OVER (PARTITION BY run_id) AS n_steps
        FROM stepped
    ),
    reached AS (
        SELECT run_id, sum(tokens) AS tokens, avg(CASE WHEN place <= ceil(? * n_steps) THEN loss END) AS loss
        FROM placed GROUP BY run_id
    ),
    described AS (
        SELECT run_id, max(n_parameters) AS n_parameters FROM runs GROUP BY run_id
    )
    SELECT run_id, n_parameters, tokens, loss FROM described JOIN reached USING (run_id) ORDER BY run_id
"""


def fit_loss_curve(
    connection: Connection,
    run_id: str,
    *,
    against: Literal["tokens", "step"] = "tokens",
    first_step: int | None = None,
    bins: int = BINS,
    **options: Any,
) -> PowerLaw:
    """Fit loss = E + A x^-a to the course of a run, x the tokens seen up to and with a step.

    Args:
        connection: of `connect`.
        run_id: name of the run.
        against: what x is; `step` for runs whose tokens were not counted.
        first_step: where the curve begins; None for where the learning rate has first been highest.
        bins: points that the steps are averaged into, at most; fewer where steps are sparse.
        options: of `power_law`: bounds, log_residuals, huber, bootstrap, seed.

    Returns:
        The law. `dropped` counts steps whose loss is not a finite number.

    Raises:
        FitError: no such run, no tokens, or too few steps.
    """
    rows = connection.execute(_CURVE, [run_id]).fetchall()
    if not rows:
        raise FitError(f"there are no steps of a run {run_id!r}; `lmt runs` lists the runs", n=0)
    step, loss, rate, tokens = np.array(rows, float).T
    begin = _highest(step, rate) if first_step is None else first_step
    x = step if against == "step" else np.nancumsum(tokens)
    late = (step >= begin) & (x > 0)
    if not late.any():
        reason = "no tokens were counted; try against='step'" if x[-1] <= 0 else f"its last step is {step[-1]:.0f}"
        raise FitError(f"run {run_id!r} has no steps to fit from step {begin:.0f} on: {reason}", n=0)
    usable = late & np.isfinite(loss)
    if not usable.any():
        raise FitError(f"run {run_id!r}: none of its losses from step {begin:.0f} on is a finite number", n=0)
    points = _binned(x[usable], loss[usable], bins)
    fit = power_law(*points[:2], weights=points[2], **options)
    return replace(fit, dropped=int(late.sum() - usable.sum()))


def fit_scaling(
    connection: Connection,
    *,
    against: Literal["both", "n_parameters", "tokens"] = "both",
    runs: Sequence[str] | None = None,
    tail: float = TAIL,
    **options: Any,
) -> Chinchilla | PowerLaw:
    """Fit the losses that runs ended with, L = E + A N^-a + B D^-b, or a power law in one of N and D.

    Args:
        connection: of `connect`.
        against: `both` for `chinchilla`; `n_parameters` or `tokens` for `power_law`, where the other one is alike.
        runs: names of the runs that count; None for all.
        tail: share of a run's steps, its last ones, whose mean is its loss.
        options: of `chinchilla` or `power_law`.

    Returns:
        The law, of one point a run; `dropped` counts runs whose loss is not a finite number.

    Raises:
        FitError: too few runs, an unknown run, or one whose N or D was not captured.
    """
    if not 0 < tail <= 1:
        raise FitError(f"tail: expected a share of the steps, above 0 and up to 1; got {tail}", n=0)
    rows = connection.execute(_RUNS, [tail]).fetchall()
    names = [row[0] for row in rows]
    if unknown := sorted(set(runs or ()) - set(names)):
        raise FitError(f"there are no steps of runs {', '.join(unknown)}; there are {', '.join(names)}", n=len(names))
    rows = [row for row in rows if runs is None or row[0] in runs]
    wanted = {"both": (1, 2), "n_parameters": (1,), "tokens": (2,)}[against]
    for row in rows:
        if any(not row[place] for place in wanted):
            raise FitError(
                f"run {row[0]!r}: expected n_parameters and tokens; got {row[1]} and {row[2]}. Leave it out by `runs`",
                n=len(rows),
            )
    columns = np.array([row[1:] for row in rows], float).reshape(-1, 3).T
    if against == "both":
        return chinchilla(*columns, **options)
    return power_law(columns[wanted[0] - 1], columns[2], **options)


def _highest(step: Array, rate: Array) -> float:
    """The first step at the highest learning rate; the first of all where none was captured."""
    known = np.isfinite(rate)
    return float(step[known][np.argmax(rate[known])]) if known.any() else float(step[0])


def _binned(x: Array, y: Array, bins: int) -> tuple[Array, Array, Array]:
    """Means of log x (as x) and of y in bins of equal width in log x, and how many fell into each; empty ones go."""
    logs = np.log(x)
    edges = np.linspace(logs[0], logs[-1], bins + 1)
    place = np.clip(np.searchsorted(edges, logs, side="right") - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    filled = counts > 0
    means = [np.bincount(place, values, bins)[filled] / counts[filled] for values in (logs, y)]
    return np.exp(means[0]), means[1], counts[filled].astype(float)
