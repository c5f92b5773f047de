"""Findings about activations: what is not finite, layers that die or explode, massive activations, lost rank.

Massive activations are common in large models and by themselves no fault (arXiv 2402.17762): a note, which also says
that they lower ranks.
"""

# ruff: noqa: S608 names of runs come quoted from `asking`, all else is our own

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_telemetry.exporters.report.asking import of
from lm_telemetry.exporters.report.model import Finding, Level
from lm_telemetry.exporters.report.words import count, layer_name, listed, number, percent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_telemetry.exporters.report.asking import Source

_STREAM = ("embed", "resid", "final")
"""Sites of the residual stream."""

_PROBLEMS = (
    (
        "dead",
        "died",
        (
            "RMS below 1e-6, or more than 99.9 % exact zeros. Look at initialisation and weight decay there, and"
            " whether it gets a gradient."
        ),
    ),
    (
        "vanishing",
        "shrank more than tenfold",
        (
            "RMS below a tenth of what was usual before. A norm behind it may make up for that; the ratio of updates to"
            " weights tells whether it still learns."
        ),
    ),
    (
        "exploding",
        "grew more than tenfold",
        (
            "RMS above ten times what was usual before. Growth that goes on ends in overflow, and asks for a lower"
            " learning rate, weight decay or a norm."
        ),
    ),
)
"""Problems of the view `dead_layers`: what the places do, and what it means."""


def layer_findings(source: Source, run_id: str) -> Iterator[Finding]:
    """All of this module, of one run."""
    yield from _nonfinite(source, run_id)
    yield from _problems(source, run_id)
    yield from _massive(source, run_id)
    yield from _rank(source, run_id)


def _nonfinite(source: Source, run_id: str) -> Iterator[Finding]:
    sql = f"""WITH captures AS (
    SELECT rank, step, sum(nonfinite) AS nonfinite, 'layers' AS part FROM layers WHERE {of(run_id)} GROUP BY ALL
    UNION ALL
    SELECT rank, step, sum(nonfinite), 'heads' FROM heads WHERE {of(run_id)} GROUP BY ALL
)
SELECT
    count(*) AS captures, max(step) AS last_step, count(*) FILTER (nonfinite > 0) AS broken,
    min(step) FILTER (nonfinite > 0) AS since, max(step) FILTER (nonfinite > 0) AS until,
    arg_min(part, step) FILTER (nonfinite > 0) AS part
FROM captures"""
    (row,) = source.rows(sql)
    if not row["captures"]:
        return
    if not row["broken"]:
        yield Finding(
            level="ok",
            title=f"Nothing non-finite in {count(row['captures'], 'capture')}",
            text="No activation and no attention logit that was captured is NaN or infinite.",
            run_id=run_id,
            sql=sql,
        )
        return
    lasts = row["until"] == row["last_step"]
    what = "activations" if row["part"] == "layers" else "attention logits"
    yield Finding(
        level="critical" if lasts else "warning",
        title="NaN or infinite activations" if lasts else "NaN or infinite activations, gone at the end",
        text=f"{row['broken']:,} of {count(row['captures'], 'capture')} have some, from step {row['since']:,} (first"
        f" seen in {what}) to step {row['until']:,}. `FROM dead_layers WHERE problem = 'nonfinite'` names the layers;"
        " the lowest one that has them first is where it begins.",
        run_id=run_id,
        since=row["since"],
        sql=sql,
    )


def _problems(source: Source, run_id: str) -> Iterator[Finding]:
    sql = f"FROM dead_layers WHERE {of(run_id)} AND problem <> 'nonfinite' ORDER BY since_step, layer"
    rows = source.rows(sql)
    for problem, what, advice in _PROBLEMS:
        held = [row for row in rows if row["problem"] == problem]
        if held:
            yield _problem(source, run_id, held, problem=problem, what=what, advice=advice, sql=sql)
    captures = source.rows(f"SELECT count(DISTINCT step) AS n FROM layers WHERE {of(run_id)}")[0]["n"]
    if not rows and captures > 1:
        yield Finding(
            level="ok",
            title="No layer dies or explodes",
            text=f"In {count(captures, 'capture')} each layer's RMS stays between a tenth and ten times what was usual"
            " before.",
            run_id=run_id,
            figure=source.figure_id("rms", run_id),
            sql=sql,
        )


def _problem(
    source: Source, run_id: str, held: list[dict[str, Any]], *, problem: str, what: str, advice: str, sql: str
) -> Finding:
    present = [row for row in held if row["is_present"]]
    # The writes of a block begin near 0 and grow by design; what they add up to is the stream.
    weighty = [row for row in present if problem == "dead" or row["site"] in _STREAM]
    shown = weighty or present or held
    places = list(dict.fromkeys(layer_name(row["layer"], row["site"], row["stack"]) for row in shown))
    first = shown[0]
    ended = "" if present else ", for a while"
    return Finding(
        level="warning" if weighty else "note",
        title=f"{count(len(places), 'place')} {what}{ended}",
        text=f"{listed(places)}. First {places[0]}, at step {first['since_step']:,}: RMS {number(first['first_rms'])}"
        f" at first and {number(first['rms'])} at last. {advice}",
        run_id=run_id,
        since=first["since_step"],
        figure=source.figure_id("rms", run_id),
        sql=sql,
    )


def _massive(source: Source, run_id: str) -> Iterator[Finding]:
    sql = f"FROM massive_activations WHERE {of(run_id)} AND site IN {_STREAM} AND is_massive ORDER BY layer, rank"
    rows = source.rows(sql)
    if not rows:
        return
    places = list(dict.fromkeys(layer_name(row["layer"], row["site"], row["stack"]) for row in rows))
    worst = max(rows, key=lambda row: abs(row["massive_value"] or row["absmax"] or 0))
    since = [step for row in rows for step in (row["since_step"], row["batch_since_step"]) if step is not None]
    fixed = ""
    if worst["massive_channel"] is not None:
        fixed = f", channel {worst['massive_channel']} of the token at position {worst['massive_position']}"
    yield Finding(
        level="note",
        title=f"Massive activations in {count(len(places), 'place')} of the stream",
        text=f"{listed(places)}. The largest is {number(worst['massive_value'] or worst['absmax'])}{fixed}. They are"
        " common and go with attention sinks; they matter for quantisation, lower the effective rank, and lead CKA.",
        run_id=run_id,
        since=min(since, default=None),
        figure=source.figure_id("absmax", run_id),
        sql=sql,
    )


_LOSSES: tuple[tuple[str, Level, str, str], ...] = (
    ("over training", "warning", "Representations have lost rank over training", "rank_change"),
    ("with depth", "note", "Representations lose rank with depth", "rank_over_entry"),
)
"""Flags of the view `rank_collapse`: level, what holds, and the column that tells how much."""


def _rank(source: Source, run_id: str) -> Iterator[Finding]:
    sql = f"FROM rank_collapse WHERE {of(run_id)} AND site IN {_STREAM} ORDER BY rank, stack, layer"
    rows = source.rows(sql)
    if not rows:
        return
    figure = source.figure_id("effective_rank", run_id)
    for flag, level, title, sign in _LOSSES:
        held = [row for row in rows if flag in row["flag"].split(", ")]
        if not held:
            continue
        places = list(dict.fromkeys(layer_name(row["layer"], row["site"], row["stack"]) for row in held))
        worst = min(held, key=lambda row: row[sign])
        against = "of what it was at the first capture" if flag == "over training" else "of that of the lowest place"
        yield Finding(
            level=level,
            title=title,
            text=f"{listed(places)}: the effective rank is down to {percent(worst[sign])} {against}"
            f" ({number(worst['effective_rank'])} at step {worst['last_step']:,}; half counts as lost). A massive"
            " activation does that by itself; without one, look at the learning rate, at depth and at the residual"
            " scale.",
            run_id=run_id,
            figure=figure,
            sql=sql,
        )
    if all(row["flag"] in {"ok", "anisotropic"} and row["captures"] > 1 for row in rows):
        yield Finding(
            level="ok",
            title="Representations keep their rank",
            text="The effective rank of each layer on the probe is above half of what it was at first, and of what"
            " enters the model.",
            run_id=run_id,
            figure=figure,
            sql=sql,
        )
