"""The lines that say whether a run is well: one for each thing that goes wrong in training.

    level   word in front   when
    ok      ok              the view finds nothing
    note    note            usual, or harmless by itself: the edge of stability, slow updates, a spike that came back
    warning WARN            worth a look: heads without entropy, large logits, dead layers, telemetry over its budget
    alarm   ALARM           the loss, or the last capture, is not finite

Thresholds are those of the views. Only whether a loss rises is judged here: its least-squares slope over the last
`RECENT` steps against the slope's standard error, 2 of which are a trend and 6 a warning, as in the report.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from lm_telemetry.exporters.report.words import count, head_name, layer_name, number, percent
from lm_telemetry.exporters.watch.recent import RECENT

if TYPE_CHECKING:
    from lm_telemetry.exporters.watch.reading import Reading

Level = Literal["ok", "note", "warning", "alarm", "none"]
"""`none`: not captured, so that nothing is known."""

_LATELY = f"in the last {RECENT:,} steps"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One thing, and how it is."""

    level: Level
    name: str
    text: str


def health(reading: Reading) -> tuple[Line, ...]:
    """All lines, always the same ones in the same order."""
    return (
        _loss(reading),
        _spikes(reading),
        _finite(reading),
        _sharpness(reading),
        _entropy(reading),
        _logits(reading),
        _layers(reading),
        _updates(reading),
        _cost(reading),
    )


def _loss(reading: Reading) -> Line:
    pace = reading.first("pace")
    loss = pace.get("loss")
    if loss is None:
        return Line(level="none", name="loss", text="no loss yet")
    if not math.isfinite(loss):
        return Line(level="alarm", name="loss", text=f"{number(loss)} at step {pace['last_step']:,}")
    smooth = pace["smoothed_loss"]
    mean = f" (mean of 20: {number(smooth)})" if smooth is not None and math.isfinite(smooth) else ""
    text = f"{number(loss)} nats{mean}"
    slope, stderr = pace["slope"], pace["slope_stderr"]
    if slope is None or stderr is None or pace["n_finite"] < 20:
        return Line(level="ok", name="loss", text=text)
    word = "flat" if abs(slope) <= 2 * stderr else "falling" if slope < 0 else "rising"
    change = "" if word == "flat" else f" by {number(100 * abs(slope))} per 100 steps"
    rises = slope > 6 * stderr
    return Line(level="warning" if rises else "ok", name="loss", text=f"{text}, {word}{change}")


def _spikes(reading: Reading) -> Line:
    if not reading.first("pace"):
        return Line(level="none", name="spikes", text="no loss yet")
    spikes = [row for row in reading.answers.get("spikes", ()) if not row["n_nonfinite"]]
    if not spikes:
        return Line(level="ok", name="spikes", text=f"none {_LATELY}")
    last = spikes[-1]
    after = last["loss_after"]
    back = after is not None and after <= last["baseline"] + 6 * last["baseline_sd"]
    sigmas = "" if last["sigmas"] is None else f" ({number(last['sigmas'])} sd)"
    text = f"{len(spikes)} {_LATELY}; {number(last['peak_loss'])}{sigmas} at {last['step']:,}, "
    text += "recovered" if back else "not recovered"
    return Line(level="note" if back else "warning", name="spikes", text=text)


def _finite(reading: Reading) -> Line:
    pace = reading.first("pace")
    if not pace:
        return Line(level="none", name="not finite", text="nothing captured yet")
    earlier = (("nonfinite_losses", "the loss"), ("nonfinite_gradients", "the gradient"))
    found = [f"{what} at {count(pace[key], 'step')}" for key, what in earlier if pace[key]]
    if found:
        found[-1] += f", last at {pace['last_nonfinite']:,}"
    sites = sum(row["n"] for row in reading.answers.get("layers", ()) if row["problem"] == "nonfinite")
    heads = sum(row["nonfinite"] for row in reading.answers.get("attention", ()))
    now = [f"activations at {count(sites, 'site')}"] if sites else []
    now += [f"logits of {count(heads, 'head')}"] if heads else []
    level: Level = "alarm" if now else "warning" if found else "ok"
    return Line(level=level, name="not finite", text=", ".join([*now, *found]) or f"nothing {_LATELY}")


def _sharpness(reading: Reading) -> Line:
    rows = [row for row in reading.answers.get("edge", ()) if row["ratio"] is not None]
    if not rows:
        return Line(level="none", name="sharpness", text="not captured, or no threshold is known")
    rows.sort(key=lambda row: -abs(row["ratio"]))
    said = ", ".join(f"{number(row['ratio'])} ({estimate_name(row['operator'], row['estimator'])})" for row in rows)
    at_edge = any(row["at_edge"] for row in rows)
    text = f"at the edge of stability: {said} of the threshold" if at_edge else f"{said} of the threshold"
    return Line(level="note" if at_edge else "ok", name="sharpness", text=text)


def estimate_name(operator: str, estimator: str) -> str:
    """What was estimated: `hessian lanczos`; the critical sharpness is no operator's."""
    return "critical" if estimator == "critical" else f"{operator.replace('_', '-')} {estimator}"


def _entropy(reading: Reading) -> Line:
    rows = [row for row in reading.answers.get("attention", ()) if row["lowest"] is not None]
    if not rows:
        return Line(level="none", name="entropy", text="attention is not captured")
    least = min(rows, key=lambda row: row["lowest"])
    lowest = f"lowest {number(least['lowest'])} normalized ({_head(least, 'lowest')})"
    collapsed = sum(row["collapsed"] for row in rows)
    if collapsed:
        heads = count(sum(row["n_heads"] for row in rows), "head")
        return Line(level="warning", name="entropy", text=f"collapsed in {collapsed} of {heads}; {lowest}")
    return Line(level="ok", name="entropy", text=f"{lowest}; a collapse is below 0.05")


def _logits(reading: Reading) -> Line:
    rows = [row for row in reading.answers.get("attention", ()) if row["largest"] is not None]
    if not rows:
        return Line(level="none", name="logits", text="attention is not captured")
    most = max(rows, key=lambda row: row["largest"])
    text = f"largest {number(most['largest'])} ({_head(most, 'largest')})"
    grown = sum(row["grown"] for row in rows)
    if grown:
        return Line(level="warning", name="logits", text=f"{text}; above 50 in {count(grown, 'head')}")
    growth = reading.first("growth")
    if growth and growth["steps_to_bound"] < RECENT:
        soon = f"{head_name(growth['layer'], growth['head'])} is above 50 in {number(growth['steps_to_bound'])} steps"
        return Line(level="note", name="logits", text=f"{text}; at its rate {soon}")
    return Line(level="ok", name="logits", text=f"{text}; the bound is 50")


def _head(row: dict[str, Any], which: str) -> str:
    return head_name(row["layer"], row[f"{which}_head"], row["stack"] or "")


def _layers(reading: Reading) -> Line:
    if "layers" not in reading.answers:
        return Line(level="none", name="layers", text="activations are not captured")
    problems = [row for row in reading.answers["layers"] if row["problem"] != "nonfinite"]
    if not problems:
        return Line(level="ok", name="layers", text="none is dead, vanishing or exploding")
    said = [
        f"{row['n']} {row['problem']} (first {layer_name(*row['place'])}, step {row['since_step']:,})"
        for row in problems
    ]
    return Line(level="warning", name="layers", text=", ".join(said))


def _updates(reading: Reading) -> Line:
    rows = reading.answers.get("updates", ())
    flag = next((flag for flag in _PACES if any(row["flag"] == flag for row in rows)), None)
    if flag is None:
        return Line(level="none", name="updates", text="parameters are not captured")
    level, words = _PACES[flag]
    held = [row for row in rows if row["flag"] == flag]
    if flag == "ok":
        usual = median(row["update_ratio"] for row in held)
        return Line(level=level, name="updates", text=f"{number(usual)} of the weights a step (median), all usual")
    one = max(held, key=lambda row: row["update_ratio"] or 0.0)
    where = layer_name(one["layer"], stack=one["stack"] or "", name=one["name"])
    ratio = f": {number(one['update_ratio'])}" if flag in {"fast", "slow"} else ""
    text = f"{words} in {len(held)} of {count(len(rows), 'place')} ({where}{ratio}); 1e-4 to 1e-2 is usual"
    return Line(level=level, name="updates", text=text)


_PACES: dict[str, tuple[Level, str]] = {
    "nonfinite": ("alarm", "not finite"),
    "still": ("warning", "no change"),
    "fast": ("warning", "fast"),
    "slow": ("note", "slow"),
    "ok": ("ok", "usual"),
}
"""Flags of the view `update_ratios`, worst first."""


def _cost(reading: Reading) -> Line:
    row = reading.first("cost")
    if not row or row["share"] is None:
        return Line(level="none", name="telemetry", text="its cost is not known yet")
    text = f"{percent(row['share'])} of the time {_LATELY}"
    if row["max_overhead"] is None:
        return Line(level="ok", name="telemetry", text=text)
    budget = f"; the budget is {percent(row['max_overhead'])}"
    return Line(level="warning" if row["is_over"] else "ok", name="telemetry", text=text + budget)
