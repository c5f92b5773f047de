"""Findings about attention heads: entropy, logits, sinks, induction.

A sink is common and harmless (arXiv 2309.17453) and an induction head is good news (2209.11895), so that both are only
told. Entropy that collapses (2303.06296) and logits that grow (2309.14322) come before a divergence.
"""

# ruff: noqa: S608 names of runs come quoted from `asking`, all else is our own

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_telemetry.exporters.report.asking import of
from lm_telemetry.exporters.report.model import Finding
from lm_telemetry.exporters.report.words import count, head_name, listed, number, percent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_telemetry.exporters.report.asking import Source

LOGIT_BOUND = 50
"""Of the view `logit_growth`."""


def attention_findings(source: Source, run_id: str) -> Iterator[Finding]:
    """All of this module, of one run."""
    asked = f"SELECT count(DISTINCT (stack, layer, kind, head)) AS heads FROM heads WHERE {of(run_id)}"
    heads = source.rows(asked + " AND entropy IS NOT NULL")[0]["heads"]
    if heads:
        yield _entropy(source, run_id, heads)
        yield _logits(source, run_id, heads)
        yield from _sinks(source, run_id)
        yield from _induction(source, run_id)


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(head_name(r["layer"], r["head"], r["stack"], r["kind"]) for r in rows))


def _entropy(source: Source, run_id: str, heads: int) -> Finding:
    sql = f"FROM entropy_collapse WHERE {of(run_id)} ORDER BY is_collapsed DESC, collapse_step, layer, head"
    rows = source.rows(sql)
    collapsed = [row for row in rows if row["is_collapsed"]]
    figure = source.figure_id("entropy", run_id)
    if collapsed:
        names, first = _names(collapsed), collapsed[0]
        logit = first["collapse_max_logit"]
        return Finding(
            level="warning",
            title=f"Attention entropy has collapsed in {count(len(names), 'head')} of {heads:,}",
            text=f"{listed(names)}: at the last capture their entropy is below 0.05 of its largest possible value. The"
            f" first, {names[0]}, fell below it at step {first['collapse_step']:,}"
            + (f", with a largest logit of {number(logit)}" if logit is not None else "")
            + ". In many heads at once, or with growing logits, this comes before a divergence: QK-norm, a cap on"
            " logits, or a lower learning rate help. A head that looks back one token has a low entropy because it"
            " does its work.",
            run_id=run_id,
            since=first["collapse_step"],
            figure=figure,
            sql=sql,
        )
    halved = _names(rows)
    if halved:
        return Finding(
            level="note",
            title=f"Attention has sharpened in {count(len(halved), 'head')} of {heads:,}, none has collapsed",
            text=f"{listed(halved)}: their entropy fell below half of its highest, or was below 0.05 for a while. Heads"
            " that specialise do that.",
            run_id=run_id,
            figure=figure,
            sql=sql,
        )
    return Finding(
        level="ok",
        title=f"Attention keeps its entropy in all {count(heads, 'head')}",
        text="At the last capture no head is below 0.05 of its largest possible entropy, or below half of its highest.",
        run_id=run_id,
        figure=figure,
        sql=sql,
    )


def _logits(source: Source, run_id: str, heads: int) -> Finding:
    sql = f"FROM logit_growth WHERE {of(run_id)} ORDER BY max_logit DESC, layer, head"
    rows = source.rows(sql)
    figure = source.figure_id("max_logit", run_id)
    above = [row for row in rows if row["max_logit"] > LOGIT_BOUND]
    soon = [
        row
        for row in rows
        if row["steps_to_bound"] is not None and row["steps_to_bound"] < row["last_step"] - row["first_step"]
    ]
    if above:
        names = _names(above)
        since = min(row["bound_step"] for row in above)
        return Finding(
            level="warning",
            title=f"Attention logits are above {LOGIT_BOUND} in {count(len(names), 'head')} of {heads:,}",
            text=f"{listed(names)}: up to {number(above[0]['max_logit'])} at the last capture, first above"
            f" {LOGIT_BOUND} at step {since:,}. Growing logits come before entropy collapse and divergence: QK-norm,"
            " clipping of query and key weights, or a lower learning rate hold them.",
            run_id=run_id,
            since=since,
            figure=figure,
            sql=sql,
        )
    if soon:
        nearest = min(soon, key=lambda row: row["steps_to_bound"])
        return Finding(
            level="note",
            title=f"Attention logits grow in {count(len(_names(soon)), 'head')} of {heads:,}",
            text=f"{_names([nearest])[0]} has a largest logit of {number(nearest['max_logit'])} that doubles every"
            f" {number(nearest['doubling_time'])} steps; if that went on, it would pass {LOGIT_BOUND} in"
            f" {number(nearest['steps_to_bound'])} steps. Growth need not be exponential.",
            run_id=run_id,
            figure=figure,
            sql=sql,
        )
    largest = f", the largest at the last capture is {number(rows[0]['max_logit'])}" if rows else ""
    return Finding(
        level="ok",
        title=f"Attention logits are below {LOGIT_BOUND}",
        text=f"No head of {heads:,} is above it at the last capture, or near it at its rate of growth{largest}.",
        run_id=run_id,
        figure=figure,
        sql=sql,
    )


def _sinks(source: Source, run_id: str) -> Iterator[Finding]:
    sql = f"FROM attention_sinks WHERE {of(run_id)} AND is_sink AND rank = 0 ORDER BY sink_mass DESC, layer, head"
    rows = source.rows(sql)
    if rows:
        formed = [row["formation_step"] for row in rows if row["previous_step"] is not None]
        yield Finding(
            level="note",
            title=f"{count(len(rows), 'head')} with an attention sink",
            text=f"{listed(_names(rows))}: above 0.3 of their attention rests on the first key"
            f" ({percent(rows[0]['sink_mass'])} at most). That is common and does no harm: a head that has nothing to"
            " do rests there. It matters when the cache of keys is cut, and for quantisation.",
            run_id=run_id,
            since=min(formed, default=None),
            figure=source.figure_id("heads", run_id),
            sql=sql,
        )


def _induction(source: Source, run_id: str) -> Iterator[Finding]:
    sql = f"FROM induction_heads WHERE {of(run_id)} AND is_induction AND rank = 0 ORDER BY place"
    rows = source.rows(sql)
    if rows:
        first = rows[0]
        formed = first["formation_step"] if first["previous_step"] is not None else None
        when = f" It formed about step {formed:,}." if formed is not None else ""
        yield Finding(
            level="ok",
            title=f"{count(len(rows), 'induction head')}",
            text=f"{listed(_names(rows))} look up what came after the same token before: the strongest gives it"
            f" {percent(first['induction_score'])} of its attention (30 % count).{when}",
            run_id=run_id,
            since=formed,
            figure=source.figure_id("heads", run_id),
            sql=sql,
        )
