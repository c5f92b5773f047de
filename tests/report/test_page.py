"""The file as a whole: its parts in order, its policy true, its size bounded, its words there without a script."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise

import numpy as np
import pytest
from made_up_report import made_up

from lm_telemetry.exporters.report import markup
from lm_telemetry.exporters.report.page import MARK, SCRIPTS, is_page, page

SMALL = {"steps": 100, "points": 50, "columns": 10, "layers": 2, "heads": 2}


class Outline(HTMLParser):
    """Elements of a page with their attributes, and the text of all but scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.words, self.inline, self._open = [], [], {}, []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in {"script", "style"}:
            self._open.append((tag, dict(attributes).get("id", "")))

    def handle_endtag(self, tag):
        if tag in {"script", "style"}:
            self._open.pop()

    def handle_data(self, data):
        if self._open:
            self.inline[self._open[-1]] = self.inline.get(self._open[-1], "") + data
        else:
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def outline():
    return Outline(page(made_up(**SMALL)))


def test_a_long_deep_run_stays_small():
    assert len(page(made_up(steps=10_000, layers=32, heads=32)).encode()) < 750_000
    # Also if nothing had been thinned: each of 10,000 steps is a point.
    assert len(page(made_up(steps=10_000, points=10_000, layers=32, heads=32)).encode()) < 1_500_000


def test_the_policy_lets_run_what_is_there_and_nothing_else(outline):
    (policy,) = [meta["content"] for meta in outline.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert set(rules) == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}
    for (tag, name), rule in ((("script", ""), "script-src"), (("style", ""), "style-src")):
        digest = hashlib.sha256(outline.inline[tag, name].encode()).digest()
        assert rules[rule] == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert ("script", "page-data") in outline.inline


def test_nothing_refers_to_the_network(outline):
    links = [attributes.get("href", "") for _, attributes in outline.elements if "href" in attributes]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert not any({"src", "srcset", "action"} & set(attributes) for _, attributes in outline.elements)
    html = page(made_up(**SMALL))
    assert set(re.findall(r"https?://[^\s\"']+", html)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in html
    assert "url(" not in html.replace("referrer", "")


def test_no_style_is_inline_for_the_policy_forbids_it(outline):
    assert [name for name, attributes in outline.elements if "style" in attributes] == []
    handlers = [a for _, attributes in outline.elements for a in attributes if a.startswith("on")]
    assert handlers == []


def test_the_words_are_there_without_a_script(outline):
    report = made_up(**SMALL)
    words = " ".join(" ".join(outline.words).split())
    said = [report.verdict, *report.missing, *(f.title for f in report.findings)]
    said += [f.caption for f in report.figures] + [value for run in report.runs for _, value in run.facts]
    for sentence in said:
        assert re.sub(r"\s+", " ", sentence.replace("`", "")) in words.replace("  ", " ").replace("` ", " ") or all(
            part.strip() in words for part in sentence.split("`")
        ), sentence
    for figure in report.figures:
        assert " ".join(figure.sql.split()) in words


def test_sections_links_and_figures_agree(outline):
    report = made_up(**SMALL)
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for a in outline.all("a")]
    assert targets
    assert set(targets) <= set(ids)
    assert set(ids) >= {figure.id for figure in report.figures}
    assert [int(f["data-figure"]) for f in outline.all("figure")] != []
    order = [report.figures[int(f["data-figure"])].section for f in outline.all("figure")]
    assert [s for i, s in enumerate(order) if s not in order[:i]] == list(
        dict.fromkeys(f.section for f in report.figures)
    )
    assert sum(a != b for a, b in pairwise(order)) + 1 == len(set(order))


def test_every_picture_says_what_it_shows(outline):
    plots = [attributes for attributes in outline.all("div") if "plot" in attributes.get("class", "").split()]
    assert len(plots) == len(made_up(**SMALL).figures)
    labels = [plot["aria-label"] for plot in plots]
    assert (
        "Loss. Line chart of loss over step 1 to 100: each step; smoothed over 50 steps. Arrow keys read it." in labels
    )
    assert all(plot["role"] == "group" or plot["tabindex"] == "0" for plot in plots)


def test_a_row_is_never_half_empty():
    kinds = {f.id: f for f in made_up(**SMALL).figures}
    loss, rate, ways = kinds["loss"], kinds["learning_rate"], kinds["pathways"]
    for row, wide in (
        ((loss, rate, rate), [True, False, False]),
        ((loss, rate), [True, True]),
        ((rate, rate, rate), [False, False, True]),
        ((rate, ways, rate, rate), [True, True, False, False]),
    ):
        assert (
            markup._wide(
                [replace(figure, id=figure.id if figure is loss else f"{figure.id}{i}") for i, figure in enumerate(row)]
            )
            == wide
        ), row
    maps = [replace(kinds["rms"], id=f"rms-{i}") for i in range(3)]
    assert markup._wide(maps) == [False, False, False]


@pytest.mark.parametrize(("worst", "word"), [("critical", "Critical"), ("note", "Note"), ("ok", "OK")])
def test_the_verdict_has_the_level_of_the_worst_finding(worst, word):
    report = made_up(**SMALL)
    order = list(markup.LEVELS)
    kept = [finding for finding in report.findings if order.index(finding.level) >= order.index(worst)]
    head = page(replace(report, findings=tuple(kept))).partition("<nav")[0].rpartition("<header>")[2]
    assert f"</svg>{word}</span>" in head
    assert "</svg>" not in page(replace(report, findings=())).partition("<nav")[0].rpartition("<header>")[2]


def test_of_a_long_verdict_the_first_sentence_leads():
    report = made_up(**SMALL)
    long = "1 of 2 runs is healthy. " + "The other is not; " * 20
    head = page(replace(report, verdict=long)).partition("<nav")[0]
    assert '<p class="verdict">1 of 2 runs is healthy.</p><p class="more-verdict">The other' in head
    assert "more-verdict" not in page(report).partition("<body>")[2]


def test_the_name_of_a_run_stands_beside_the_title():
    html = page(made_up(runs=("a", "b"), **SMALL))
    assert re.search(r'id="rms-2".*?<h3>Root mean square of the residual stream</h3><p class="of">.*?>b</span>', html)


def test_facts_that_differ_stand_out():
    html = page(made_up(runs=("a", "b"), **SMALL))
    assert '<tr class="differs"><th scope="row">learning rate</th><td>0.003, cosine</td><td>0.0015, cosine</td>' in html
    assert '<tr><th scope="row">model</th>' in html


def test_a_name_keeps_its_end():
    assert markup.text_of_name("x" * 50, 50) == "x" * 50
    short = markup.text_of_name("begin" + "x" * 500 + "end", 40)
    assert (len(short), short[:5], short[-3:]) == (40, "begin", "end")


def test_code_in_a_sentence_is_code():
    assert markup.prose("see `lmt sql` & <b>`x`") == "see <code>lmt sql</code> &amp; &lt;b&gt;<code>x</code>"
    assert markup.prose("one ` alone") == "one ` alone"


def test_a_report_is_known_by_its_mark():
    assert is_page(page(made_up(**SMALL))[:1024])
    assert not is_page("<!DOCTYPE html><html>")
    assert not is_page("x" * 1024 + MARK)


def test_every_asset_is_used_once_and_the_scripts_are_small():
    folder = files("lm_telemetry.exporters.report") / "assets"
    names = {entry.name for entry in folder.iterdir()}
    assert names == {*SCRIPTS, "page.css", "page.html"}
    assert sum(len((folder / name).read_bytes()) for name in SCRIPTS) < 60_000
    assert all(b"\r" not in (folder / name).read_bytes() for name in names)


def test_the_same_report_is_the_same_file():
    assert page(made_up(**SMALL)) == page(made_up(**SMALL))
    assert np.isnan(made_up(**SMALL).figures[0].body.lines[0].y).any()
