"""Names that mean no good: they are shown, and do nothing."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from itertools import cycle

import pytest
from made_up_report import made_up

from lm_telemetry.exporters.report.page import page

HOSTILE = {
    "script": "</script><script>window.owned = 1</script>",
    "comment": "<!--<script>",
    "image": '"><img src=x onerror="window.owned = 1">',
    "attribute": "' onmouseover='window.owned = 1' \" onfocus=\"window.owned = 1",
    "style": "</style><style>* { display: none }",
    "title": "</title></head><body onload=alert(1)>",
    "template": "$script ${style} {{7*7}} %s",
    "entity": "&lt;b&gt; &#0; &amp;",
    "long": "x" * 10_000,
    "lines": "a\nb\r\nc\u2028d\te\x00f\x1b[31m",
    "direction": "\u202egnp.exe\u2066",
    "surrogate": "half \ud800 pair",
    "json": '\\u003c \\" ]]> <![CDATA[',
}


def poisoned(report, poisons):
    """The report with hostile words for all its texts, but for what the contract says is one of a few words."""
    endless = cycle(poisons)

    def changed(value):
        if is_dataclass(value):
            kept = {"level", "role", "scale", "id", "figure"}
            return replace(
                value, **{f.name: changed(getattr(value, f.name)) for f in fields(value) if f.name not in kept}
            )
        if isinstance(value, tuple):
            return tuple(changed(entry) for entry in value)
        return next(endless) if isinstance(value, str) else value

    return changed(report)


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.seen = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, sorted(name for name, _ in attributes)))


@pytest.fixture(scope="module")
def report():
    return made_up(runs=("a", "b"), steps=60, points=30, columns=10, layers=2, heads=2)


@pytest.mark.parametrize("poison", HOSTILE.values(), ids=HOSTILE)
def test_markup_is_what_it_is_with_harmless_names(report, poison):
    harmless, hostile = (Tags(page(poisoned(report, (word,)))).seen for word in ("harmless", poison))
    assert hostile == harmless
    page(poisoned(report, (poison,))).encode("utf-8")


@pytest.mark.parametrize("poisons", [tuple(HOSTILE.values()), (HOSTILE["long"],)], ids=["all", "long"])
def test_a_browser_shows_them_and_nothing_happens(opening, report, poisons):
    hostile = poisoned(report, poisons)
    shown = opening(hostile, width=390)
    for figure in hostile.figures:
        plot = shown.figure(figure.id)
        plot.dispatch_event("pointermove", {"clientX": 200, "clientY": plot.bounding_box()["y"] + 90})
    shown.tab.evaluate("document.querySelectorAll('details').forEach((one) => (one.open = true))")
    shown.tab.locator(f"#{hostile.figures[-1].id} td").first.wait_for()
    assert shown.tab.locator(".tip:visible").count() > 0
    assert shown.errors == []
    assert shown.tab.evaluate("window.owned") is None
    assert [url for url in shown.requests if not url.startswith("file:")] == []
    assert shown.tab.evaluate("document.documentElement.scrollWidth") == 390
    assert shown.tab.locator("script").count() == 2


def test_a_name_is_there_to_be_read(opening, report):
    shown = opening(poisoned(report, ("</script><b>owned</b>",)))
    assert shown.tab.locator(".verdict").inner_text() == "</script><b>owned</b>"
    assert shown.tab.title() == "</script><b>owned</b>, </script><b>owned</b> · training report"
