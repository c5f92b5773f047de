"""What is asked of a run's recent rows, each question as SQL over the library's views.

The answers, by name:

| name | rows |
| --- | --- |
| `run` | what the run is, as its last launch described it |
| `pace` | one: last step, loss and its slope, speed, what was not finite |
| `losses`, `ratios` | loss by step; curvature as a share of its threshold, the series with the most captures first |
| `spikes` | view `spikes` |
| `cost` | view `cost`, all parts together |
| `edge` | view `edge_of_stability`, the last capture of each estimate over all parameters |
| `attention` | view `attention_health`, by layer, at the last capture |
| `growth` | view `logit_growth`, the head that reaches the bound first |
| `rms` | by layer, of the residual stream, at the last capture |
| `layers` | view `dead_layers`, by problem, of what the last capture shows |
| `updates` | view `update_ratios`, at the last capture |
| `events` | the newest first |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_telemetry.exporters.watch.recent import RECENT, judged, window
from lm_telemetry.queries.tables import text

if TYPE_CHECKING:
    from collections.abc import Mapping

TABLES = ("steps", "layers", "heads", "params", "curvature")
"""Tables whose first and last step are asked first."""

EVENTS = 50
"""Events that are kept."""

PACE = 100
"""Steps over which the speed is taken."""

LARGEST = "scope = 'all' AND coalesce(index, 0) = 0 AND threshold > 0 AND value IS NOT NULL"
"""The condition that a row of `curvature` can be held against its threshold."""

_LOSSES = """SELECT step, loss AS value FROM steps WHERE {steps} AND loss IS NOT NULL ORDER BY step"""

_NEWEST = """WHERE scope = 'all' AND coalesce(index, 0) = 0
QUALIFY row_number() OVER (PARTITION BY operator, estimator ORDER BY step DESC) = 1
ORDER BY operator, estimator"""

_RUN = """SELECT * FROM runs WHERE {run} ORDER BY attempt DESC, rank, time DESC LIMIT 1"""

_PACE = """WITH recent AS (
    SELECT
        step, time, loss, smoothed_loss, grad_norm, learning_rate, seconds,
        row_number() OVER (ORDER BY step DESC) AS back
    FROM ({training}) JOIN (SELECT step, seconds FROM steps WHERE {steps}) USING (step)
    WHERE step > {last} - {window}
)
SELECT
    max(step) AS last_step,
    max(time) AS last_row,
    count(*) AS n_steps,
    count(*) FILTER (back <= {pace} AND seconds IS NOT NULL) / nullif(sum(seconds) FILTER (back <= {pace}), 0) AS pace,
    arg_max(loss, step) AS loss,
    arg_max(smoothed_loss, step) AS smoothed_loss,
    arg_max(learning_rate, step) AS learning_rate,
    count(loss) FILTER (isfinite(loss)) AS n_finite,
    regr_slope(loss, step) FILTER (isfinite(loss)) AS slope,
    sqrt(greatest(regr_syy(loss, step) FILTER (isfinite(loss))
        - (regr_sxy(loss, step) FILTER (isfinite(loss))) ** 2 / nullif(regr_sxx(loss, step) FILTER (isfinite(loss)), 0)
        , 0) / nullif(n_finite - 2, 0) / nullif(regr_sxx(loss, step) FILTER (isfinite(loss)), 0)) AS slope_stderr,
    count(*) FILTER (NOT isfinite(loss)) AS nonfinite_losses,
    count(*) FILTER (NOT isfinite(grad_norm)) AS nonfinite_gradients,
    max(step) FILTER (NOT isfinite(loss) OR NOT isfinite(grad_norm)) AS last_nonfinite
FROM recent"""

_RATIOS = """SELECT operator, estimator, step, value / threshold AS value
FROM curvature
WHERE {curvature} AND {largest}
ORDER BY count(*) OVER (PARTITION BY operator, estimator) DESC, operator, estimator, step"""

_RMS = """SELECT stack, layer, avg(CAST(rms AS DOUBLE)) FILTER (isfinite(rms)) AS rms, sum(nonfinite) AS nonfinite
FROM layers
WHERE {layers} AND site = 'resid' AND step = {last}
GROUP BY stack, layer
ORDER BY stack, layer"""

_ATTENTION = """SELECT
    stack, layer,
    count(*) AS n_heads,
    avg(entropy) FILTER (isfinite(entropy) AND kind = 'self') AS entropy,
    count(*) FILTER (flag LIKE '%entropy collapse%') AS collapsed,
    count(*) FILTER (flag LIKE '%logit growth%') AS grown,
    count(*) FILTER (flag LIKE '%nonfinite%') AS nonfinite,
    min(normalized_entropy) FILTER (isfinite(normalized_entropy)) AS lowest,
    arg_min(head, normalized_entropy) FILTER (isfinite(normalized_entropy)) AS lowest_head,
    max(max_logit) FILTER (isfinite(max_logit)) AS largest,
    arg_max(head, max_logit) FILTER (isfinite(max_logit)) AS largest_head
FROM ({attention_health})
WHERE last_step = {last}
GROUP BY stack, layer
ORDER BY stack, layer"""

_GROWTH = """SELECT layer, head, doubling_time, steps_to_bound
FROM ({logit_growth})
WHERE steps_to_bound IS NOT NULL
ORDER BY steps_to_bound
LIMIT 1"""

_LAYERS = """SELECT problem, count(*) AS n, min(since_step) AS since_step, arg_min((layer, site), since_step) AS place
FROM ({dead_layers})
WHERE is_present
GROUP BY problem
ORDER BY problem"""

_UPDATES = """SELECT stack, layer, name, update_ratio, flag
FROM ({update_ratios})
WHERE step = {last} AND NOT (flag = 'still' AND learning_rate = 0)
ORDER BY stack, layer, name"""

_EVENTS = """SELECT step, time, rank, severity, kind, message
FROM events
WHERE {run}
ORDER BY time DESC, step DESC
LIMIT {limit}"""


def questions(run_id: str, rank: int, bounds: Mapping[str, tuple[int, int]]) -> dict[str, tuple[tuple[str, ...], str]]:
    """The tables that each question reads, and its SQL; of tables without rows nothing is asked.

    Args:
        run_id: name of the run.
        rank: rank of the process.
        bounds: first and last step of those `TABLES` that have rows.
    """
    run = f"run_id = {text(run_id)}"
    where = {table: window(run_id, rank, bounds.get(table)) for table in TABLES}
    last = {table: steps[1] for table, steps in bounds.items()}
    found: dict[str, tuple[tuple[str, ...], str]] = {
        "run": (("runs",), _RUN.format(run=run)),
        "events": (("events",), _EVENTS.format(run=run, limit=EVENTS)),
    }

    def view(name: str, *tables: str, **others: str) -> str:
        return judged(name, {table: where[table] for table in tables} | others)

    if "steps" in bounds:
        training = view("training", "steps")
        pace = _PACE.format(training=training, steps=where["steps"], last=last["steps"], window=RECENT, pace=PACE)
        events = f"{run} AND step > {last['steps'] - RECENT}"
        spikes = view("spikes", "steps", "curvature", "layers", events=events)
        nothing = dict.fromkeys(("overhead", "spectra", "head_effects"), "false")  # of parts, which are not asked for
        cost = view("cost", "steps", "curvature", runs=run, **nothing)
        found |= {
            "pace": (("steps",), pace),
            "losses": (("steps",), _LOSSES.format(steps=where["steps"])),
            "spikes": (("steps", "curvature", "layers", "events"), f"{spikes} ORDER BY step"),
            "cost": (("steps", "runs"), f"{cost} WHERE part = 'all'"),
        }
    if "curvature" in bounds:
        edge = view("edge_of_stability", "curvature", "steps")
        found |= {
            "edge": (("curvature",), f"{edge} {_NEWEST}"),
            "ratios": (("curvature",), _RATIOS.format(curvature=where["curvature"], largest=LARGEST)),
        }
    if "heads" in bounds:
        attention = _ATTENTION.format(attention_health=view("attention_health", "heads"), last=last["heads"])
        found |= {
            "attention": (("heads",), attention),
            "growth": (("heads",), _GROWTH.format(logit_growth=view("logit_growth", "heads", "steps"))),
        }
    if "layers" in bounds:
        found |= {
            "rms": (("layers",), _RMS.format(layers=where["layers"], last=last["layers"])),
            "layers": (("layers",), _LAYERS.format(dead_layers=view("dead_layers", "layers"))),
        }
    if "params" in bounds:
        ratios = view("update_ratios", "params", "steps")
        found["updates"] = (("params", "steps"), _UPDATES.format(update_ratios=ratios, last=last["params"]))
    return found
