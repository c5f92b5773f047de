"""What a report says in words, as HTML that is whole without any script: verdict, findings, facts, captions, queries.

Figures are empty boxes here, which the scripts in `assets/` fill. Whoever named a run, a token or a parameter may mean
no good, so every text goes through `text`, which leaves no markup, no control character and no half of a surrogate
pair, and an end to its length; names that turn the direction of writing are isolated by the style sheet.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING

from lm_telemetry.exporters.report.encode import family, reach
from lm_telemetry.exporters.report.model import Bars, HeadMap, Heatmap, Lines, Pathways

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lm_telemetry.exporters.report.model import Figure, Finding, Report, RunFacts

LEVELS = {"critical": "Critical", "warning": "Warning", "note": "Note", "ok": "OK"}
"""Words of the levels, worst first."""

LONGEST = 2_000
"""Characters of a text that are kept; of a query all are."""

LONGEST_VERDICT = 260
"""Characters of a verdict that stands in large type; of a longer one only its first sentence does."""

LONGEST_NAME = 90
"""Characters of a run's name that are shown where it stands for the run."""

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

_SWATCHES = 8
"""Colours of runs, in the style sheet."""


def text(value: str, limit: int | None = LONGEST) -> str:
    """Any string as HTML text or the value of an attribute in double quotes."""
    shown = value if limit is None or len(value) <= limit else f"{value[: limit - 1]}…"
    return html.escape(_UNPRINTABLE.sub("\ufffd", shown), quote=True)


def prose(value: str, limit: int = LONGEST) -> str:
    """Sentences as HTML text, in which what stands between backticks is code."""
    return re.sub(r"`([^`\n]{1,80})`", r"<code>\1</code>", text(value, limit))


def fragment(figure_id: str) -> str:
    """The `id` of a figure's element; those of the page itself begin with `page-`."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", figure_id)


def title(report: Report) -> str:
    """The title of the document, as HTML text."""
    return text(", ".join(text_of_name(run.run_id, 40) for run in report.runs) + " · training report", 200)


def text_of_name(run_id: str, limit: int = LONGEST_NAME) -> str:
    """A run's name in at most `limit` characters, its end kept, in which names of one project differ."""
    if len(run_id) <= limit:
        return run_id
    head = limit // 2
    return f"{run_id[:head]}…{run_id[head + 1 - limit :]}"


def content(report: Report) -> str:
    """The body of the page but for its scripts."""
    sections = {
        name: list(group) for name, group in groupby(_in_sections(report.figures), lambda figure: figure.section)
    }
    ids = {name: f"page-section-{i}" for i, name in enumerate(sections)}
    named = [
        ("page-findings", "Verdict"),
        ("page-runs", _runs_title(report)),
        *((ids[name], name) for name in sections),
    ]
    numbers = {id(figure): i for i, figure in enumerate(report.figures)}
    parts = [_head(report), _navigation(named), "<main>", _findings(report), _facts(report)]
    for name, figures in sections.items():
        drawn = "".join(
            _figure(figure, numbers[id(figure)], report, wide=wide)
            for figure, wide in zip(figures, _wide(figures), strict=True)
        )
        parts.append(f'<section id="{ids[name]}"><h2>{text(name)}</h2><div class="figures">{drawn}</div></section>')
    if report.missing:
        reasons = "".join(f"<li>{prose(reason)}</li>" for reason in report.missing)
        parts.append(f'<section id="page-missing"><h2>Not shown</h2><ul class="missing">{reasons}</ul></section>')
    parts += ["</main>", _foot(report)]
    return "\n".join(parts)


def _in_sections(figures: Iterable[Figure]) -> list[Figure]:
    """Figures with those of one section together, sections in the order of their first figures."""
    figures = list(figures)
    order = list(dict.fromkeys(figure.section for figure in figures))
    return sorted(figures, key=lambda figure: order.index(figure.section))


def _head(report: Report) -> str:
    names = ", ".join(f'<span class="run" title="{text(run.run_id, 500)}">{_name(run)}</span>' for run in report.runs)
    states = {run.state for run in report.runs}
    state = f" · {text(states.pop(), 200)}" if len(states) == 1 else ""
    worst = next((level for level in LEVELS if any(f.level == level for f in report.findings)), None)
    level = _level(worst) if worst else ""
    lead, stop, rest = (
        report.verdict.partition(". ") if len(report.verdict) > LONGEST_VERDICT else (report.verdict, "", "")
    )
    more = f'<p class="more-verdict">{prose(rest)}</p>' if rest else ""
    return (
        f'<header><div class="eyebrow"><h1>{names}</h1>{state}</div>'
        f'{level}<p class="verdict">{prose(lead + stop.strip(), 1_000)}</p>'
        f"{more}</header>"
    )


def _name(run: RunFacts) -> str:
    return text(text_of_name(run.run_id), None)


def _runs_title(report: Report) -> str:
    return "Run" if len(report.runs) == 1 else "Runs"


def _navigation(sections: Sequence[tuple[str, str]]) -> str:
    links = "".join(f'<li><a href="#{anchor}">{text(name, 40)}</a></li>' for anchor, name in sections)
    return (
        f'<nav aria-label="Sections"><div><ul>{links}</ul>'
        '<button type="button" id="page-zoom" hidden><span></span> · show all</button>'
        '<button type="button" id="page-theme">Theme</button></div></nav>'
    )


def _level(level: str) -> str:
    icon = f'<svg aria-hidden="true"><use href="#page-icon-{level}"></use></svg>'
    return f'<span class="level {level}">{icon}{LEVELS[level]}</span>'


def _findings(report: Report) -> str:
    amiss = [finding for finding in report.findings if finding.level != "ok"]
    well = [finding for finding in report.findings if finding.level == "ok"]
    items = "".join(_finding(finding, report) for finding in amiss)
    parts = [f'<ul class="findings">{items}</ul>' if amiss else ""]
    if well:
        items = "".join(_finding(finding, report) for finding in well)
        parts.append(f'<ul class="findings well">{items}</ul>')
    if not report.findings:
        parts.append('<p class="missing">Nothing was captured that a verdict could rest on.</p>')
    return f'<section id="page-findings"><h2>What was found</h2>{"".join(parts)}</section>'


def _finding(finding: Finding, report: Report) -> str:
    figures = {figure.id: figure for figure in report.figures}
    top = [_level(finding.level)]
    if finding.since is not None:
        top.append(f"<span>since step {finding.since:,}</span>")
    if len(report.runs) > 1:
        top.append(f'<span class="run">{text(text_of_name(finding.run_id, 40))}</span>')
    if finding.figure in figures:
        figure = figures[finding.figure]
        top.append(f'<a href="#{fragment(figure.id)}">{text(figure.title, 60)}</a>')
    return (
        f'<li class="finding {finding.level}"><div class="top">{"".join(top)}</div><h3>{text(finding.title, 300)}</h3>'
        f'<p>{prose(finding.text)}</p><div class="more">{_query(finding.sql)}</div></li>'
    )


def _query(sql: str) -> str:
    return (
        '<details class="sql"><summary>SQL</summary><button type="button" class="copy" hidden>Copy</button>'
        f"<pre><code>{text(sql.strip(), None)}</code></pre></details>"
    )


def _facts(report: Report) -> str:
    heading = f'<section id="page-runs"><h2>{_runs_title(report)}</h2>'
    if len(report.runs) == 1:
        (run,) = report.runs
        pairs = "".join(
            f"<div><dt>{text(n)}</dt><dd>{text(v)}</dd></div>" for n, v in (("State", run.state), *run.facts)
        )
        return f'{heading}<dl class="facts">{pairs}</dl></section>'
    tables = [{"State": run.state, **dict(run.facts)} for run in report.runs]
    heads = "".join(
        f'<th scope="col"><i class="swatch run-{i % _SWATCHES}" aria-hidden="true"></i> '
        f'<span class="run" title="{text(run.run_id, 500)}">{text(text_of_name(run.run_id, 40))}</span></th>'
        for i, run in enumerate(report.runs)
    )
    rows = []
    for name in dict.fromkeys(name for table in tables for name in table):
        values = [table.get(name, "") for table in tables]
        differs = ' class="differs"' if len(set(values)) > 1 else ""
        cells = "".join(f"<td>{text(value, 300)}</td>" for value in values)
        rows.append(f'<tr{differs}><th scope="row">{text(name, 100)}</th>{cells}</tr>')
    return (
        f'{heading}<div class="scroll" tabindex="0"><table class="facts-table"><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _wide(figures: Sequence[Figure]) -> list[bool]:
    """Which figures take a whole row: the loss, pathways, and what would stand alone in one.

    Maps of several runs keep one size, so that they can be compared.
    """
    families = Counter(family(figure.id) for figure in figures)
    wide = [figure.id == "loss" or isinstance(figure.body, Pathways) for figure in figures]
    half = False
    for i, alone in enumerate(wide):
        if not alone:
            half = not half
        last = i + 1 == len(wide) or wide[i + 1]
        if half and last:
            wide[i], half = families[family(figures[i].id)] == 1, False
    return wide


def _figure(figure: Figure, number: int, report: Report, *, wide: bool) -> str:
    kind = type(figure.body).__name__.lower()
    # A chart of bars is elements that can be read; all others are pictures that arrow keys go through.
    role = 'role="group"' if isinstance(figure.body, Bars) else 'role="img" tabindex="0"'
    label = text(f"{figure.title}. {contents(figure)}", 600)
    return (
        f'<figure class="figure {kind}{" wide" if wide else ""}" id="{fragment(figure.id)}" data-figure="{number}">'
        f"<figcaption><h3>{text(figure.title, 300)}</h3>{_run_of(figure, report)}"
        f"<p>{prose(figure.caption)}</p></figcaption>"
        f'<div class="controls"></div><div class="plot {kind}-plot" {role} aria-label="{label}"></div>'
        '<div class="more"><details class="data"><summary>Data</summary><div></div></details>'
        f"{_query(figure.sql)}</div></figure>"
    )


def _run_of(figure: Figure, report: Report) -> str:
    """Which run a figure is of, where there are several and it is of one."""
    if len(report.runs) == 1 or not isinstance(figure.body, Heatmap | HeadMap | Pathways):
        return ""
    swatch = f'<i class="swatch run-{figure.body.run % _SWATCHES}" aria-hidden="true"></i>'
    return f'<p class="of">{swatch}<span class="run">{_name(report.runs[figure.body.run])}</span></p>'


def contents(figure: Figure) -> str:
    """What kind of picture a figure is, and of what: the words for those who do not see it."""
    body = figure.body
    span = reach(body)
    if isinstance(body, Lines | Heatmap) and span is not None:
        over = f"over {body.x.label} {span[0]:,.6g} to {span[1]:,.6g}"
    else:
        over = "without values"
    if isinstance(body, Lines):
        names = "; ".join(line.name for line in body.lines[:8])
        return f"Line chart of {body.y.label} {over}: {names}. Arrow keys read it."
    if isinstance(body, Heatmap):
        return f"Heatmap of {body.z.label} by {body.y.label}, {len(body.rows)} rows, {over}. Arrow keys read it."
    if isinstance(body, HeadMap):
        return f"Map of {len(body.layers)} layers and their heads at step {body.step:,}. Arrow keys read it."
    if isinstance(body, Pathways):
        return (
            f"{len(body.edges)} routes over {len(body.tokens)} tokens and {body.layers} layers. Arrow keys read them."
        )
    return f"Bars of {body.x.label} for {len(body.names)} names."


def _foot(report: Report) -> str:
    return (
        f"<footer><p>Written {text(report.written)} from the store {text(report.store, 200)} by lm-telemetry."
        " The file is whole: it needs no network and sends nothing.</p>"
        '<p class="keys">Point or tap to read values; drag, or spread two fingers, to zoom; double-click to see all.'
        " With the keyboard: <kbd>Tab</kbd> to a figure, arrows to read, <kbd>+</kbd> <kbd>&minus;</kbd> to zoom,"
        " <kbd>0</kbd> to see all.</p></footer>"
    )
