"""The report in a real browser: that it draws, tells its numbers, and asks nothing of the network."""

from __future__ import annotations

import re
import zlib
from dataclasses import replace

import numpy as np
import pytest
from made_up_report import made_up

MINUS = "\u2212"
COLOURFUL = """canvas => {
    const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let n = 0;
    for (let i = 0; i < data.length; i += 4) {
        const [r, g, b, a] = data.slice(i, i + 4);
        if (a > 100 && Math.max(r, g, b) - Math.min(r, g, b) > 60) n++;
    }
    return n;
}"""


@pytest.fixture(scope="module")
def report():
    return made_up(steps=2_000, layers=8, heads=6)


def body(report, name):
    return next(figure.body for figure in report.figures if figure.id == name)


def number(text):
    """The value of a text such as `1.2k` or `3.2M nats`."""
    value, kind = re.match(f"([{MINUS}\\d.,e]+)([kM]?)", text).groups()
    return float(value.replace(MINUS, "-").replace(",", "")) * {"": 1, "k": 1e3, "M": 1e6}[kind]


def point(shown, name, across, down=0.5):
    """Move the pointer to shares of a figure's canvas; the x there."""
    box = shown.figure(name).locator("canvas").bounding_box()
    shown.tab.mouse.move(box["x"] + across * box["width"], box["y"] + down * box["height"])
    low, high = shown.range(name)
    return low + across * (high - low)


def test_every_figure_is_drawn_and_nothing_else_is_asked_for(opening, report):
    shown = opening(report)
    for figure in report.figures:
        plot = shown.figure(figure.id)
        kind = type(figure.body).__name__
        if kind == "Bars":
            assert plot.locator(".bar").count() == figure.body.values.size
        elif kind == "Pathways":
            assert plot.locator("path.route").count() == len(figure.body.edges)
        else:
            # Of a line some hundreds of pixels, of a map most of them.
            assert plot.locator("canvas").evaluate(COLOURFUL) > (300 if kind == "Lines" else 20_000), figure.id
        assert plot.get_attribute("aria-label").startswith(figure.title)
    assert shown.errors == []
    assert [url for url in shown.requests if not url.startswith("file:")] == []
    assert len(shown.requests) == 1


def test_a_fetch_is_blocked_by_the_policy_of_the_page(opening):
    shown = opening()
    tried = shown.tab.evaluate("fetch('http://127.0.0.1:9/').then(() => 'went', (error) => String(error))")
    assert "Failed to fetch" in tried
    assert "Content Security Policy" in shown.errors[0]
    shown.tab.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))"
    )
    assert shown.tab.evaluate("window.ran") is None


@pytest.mark.parametrize("across", [0.2, 0.5, 0.93])
def test_hovering_a_line_tells_the_value_that_is_there(opening, report, across):
    shown = opening(report)
    at = point(shown, "loss", across)
    where, *_ = shown.told("loss")
    line = body(report, "loss").lines[0]
    i = int(np.argmin(np.abs(line.x - at)))
    assert where == f"step {line.x[i]:,.0f}"
    tip = shown.tab.locator("#loss .tip")
    told = [number(value) for value in tip.locator(".entry b").all_inner_texts()]
    assert told == [pytest.approx(one.y[i], rel=5e-4) for one in body(report, "loss").lines]
    (regime,) = [band.label for band in body(report, "loss").bands if band.start <= line.x[i] < band.end]
    assert regime in tip.inner_text()


def test_a_figure_of_the_same_steps_has_the_cursor_too(opening, report):
    shown = opening(report)
    shown.figure("grad_norm")
    point(shown, "learning_rate", 0.4)
    x = float(shown.tab.locator("#grad_norm line.cursor").get_attribute("x1"))
    canvas = shown.tab.locator("#grad_norm canvas").bounding_box()
    host = shown.tab.locator("#grad_norm .plot").bounding_box()
    assert (x - (canvas["x"] - host["x"])) / canvas["width"] == pytest.approx(0.4, abs=0.01)
    shown.tab.mouse.move(5, 5)
    assert shown.tab.locator("line.cursor").count() == 0


def test_hovering_a_cell_tells_its_value(opening, report):
    shown = opening(report)
    heatmap = body(report, "kurtosis")
    for across, down in ((0.35, 0.1), (0.8, 0.95)):
        at = point(shown, "kurtosis", across, down)
        column = int(np.argmin(np.abs(heatmap.columns - at)))
        row = len(heatmap.rows) - 1 - int(down * len(heatmap.rows))
        assert f"step {heatmap.columns[column]:,.0f} · layer {row}" in shown.told("kurtosis")[0]
        told = number(shown.tab.locator("#kurtosis .tip b").inner_text())
        assert told == pytest.approx(heatmap.values[row, column], rel=5e-4)


def test_the_head_map_shows_the_statistic_that_is_chosen(opening, report):
    shown = opening(report)
    heads = body(report, "heads")
    shown.figure("heads")
    for i, statistic in enumerate(heads.statistics):
        shown.tab.locator("#heads select").select_option(str(i))
        point_at = shown.tab.locator("#heads .plot canvas").bounding_box()
        shown.tab.mouse.move(point_at["x"] + 0.4 * point_at["width"], point_at["y"] + 0.9 * point_at["height"])
        value = statistic.values[0, int(0.4 * 6)]
        assert number(shown.tab.locator("#heads .tip b").inner_text()) == pytest.approx(value, rel=5e-4)
        assert statistic.meaning in shown.tab.locator("#heads .controls").inner_text()


def test_dragging_zooms_all_figures_of_the_steps_and_a_double_click_goes_back(opening, report):
    shown = opening(report)
    whole = shown.figure("learning_rate") and shown.range("learning_rate")
    box = shown.figure("loss").locator("canvas").bounding_box()
    y = box["y"] + box["height"] / 2
    shown.tab.mouse.move(box["x"] + 0.25 * box["width"], y)
    shown.tab.mouse.down()
    shown.tab.mouse.move(box["x"] + 0.5 * box["width"], y, steps=4)
    shown.tab.mouse.up()
    narrow = [whole[0] + share * (whole[1] - whole[0]) for share in (0.25, 0.5)]
    assert shown.range("loss") == pytest.approx(narrow, rel=0.01)
    shown.figure("kurtosis")
    assert shown.range("kurtosis") == shown.range("loss")
    assert "show all" in shown.tab.locator("#page-zoom").inner_text()
    at = point(shown, "loss", 0.5)
    assert abs(number(shown.told("loss")[0].removeprefix("step ")) - at) < 5
    shown.tab.mouse.dblclick(box["x"] + 100, y)
    shown.figure("loss")
    assert shown.range("loss") == whole
    assert shown.tab.locator("#page-zoom").is_hidden()


def test_the_keyboard_reads_and_zooms(opening, report):
    shown = opening(report)
    line = body(report, "grad_norm").lines[0]
    plot = shown.figure("grad_norm")
    plot.focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowLeft"):
        shown.tab.keyboard.press(key)
    assert shown.told("grad_norm")[0] == f"step {line.x[1]:,.0f}"
    assert f"step {line.x[1]:,.0f}" in shown.tab.locator("#page-live").inner_text()
    shown.tab.keyboard.press("End")
    assert shown.told("grad_norm")[0] == f"step {line.x[-1]:,.0f}"
    before = shown.range("grad_norm")
    shown.tab.keyboard.press("+")
    after = shown.range("grad_norm")
    assert (after[1] - after[0]) / (before[1] - before[0]) == pytest.approx(0.5)
    shown.tab.keyboard.press("0")
    assert shown.range("grad_norm") == before
    shown.figure("kurtosis").focus()
    shown.tab.keyboard.press("Home")
    shown.tab.keyboard.press("ArrowUp")
    first = shown.told("kurtosis")[0]
    shown.tab.keyboard.press("ArrowUp")
    assert shown.told("kurtosis")[0] != first
    shown.figure("pathways").focus()
    shown.tab.keyboard.press("ArrowRight")
    heaviest = max(body(report, "pathways").edges, key=lambda edge: edge.share)
    assert f"layer {heaviest.layer}" in shown.told("pathways")[0]
    assert shown.tab.locator("#pathways .tip b").inner_text() == f"{100 * heaviest.share:.3g} %"
    shown.tab.keyboard.press("Escape")
    assert shown.tab.locator("#pathways .tip").is_hidden()


def test_a_legend_hides_its_line(opening, report):
    shown = opening(report)
    canvas = shown.figure("sharpness").locator("canvas")
    before = canvas.evaluate(COLOURFUL)
    button = shown.tab.locator("#sharpness .controls button").first
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert canvas.evaluate(COLOURFUL) < before / 10
    button.click()
    assert canvas.evaluate(COLOURFUL) == before


def test_the_wheel_scrolls_the_page(opening, report):
    shown = opening(report)
    point(shown, "loss", 0.5)
    before = shown.tab.evaluate("scrollY")
    shown.tab.mouse.wheel(0, 300)
    # The policy of the page lets nothing wait inside of it.
    moved = (shown.tab.wait_for_timeout(20) or shown.tab.evaluate("scrollY") - before for _ in range(100))
    assert any(distance > 100 for distance in moved)


def test_the_theme_switches_and_stays_for_the_session(opening, report):
    shown = opening(report)
    ground = "getComputedStyle(document.body).backgroundColor"
    corner = "c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).join()"
    light, drawn = shown.tab.evaluate(ground), shown.figure("learning_rate").locator("canvas").evaluate(corner)
    shown.tab.locator("#page-theme").click()
    assert shown.tab.evaluate(ground) != light
    assert shown.figure("learning_rate").locator("canvas").evaluate(corner) != drawn
    shown.tab.reload()
    assert shown.tab.locator("#page-theme").inner_text() == "Light"
    assert shown.tab.evaluate(ground) != light
    shown.tab.locator("#page-theme").click()
    assert shown.tab.evaluate(ground) == light


def test_tables_and_queries_unfold(opening, report):
    shown = opening(report)
    shown.figure("loss")
    shown.tab.locator("#loss details.data summary").click()
    rows = shown.tab.locator("#loss table tr").all_inner_texts()
    smooth = body(report, "loss").lines[1]
    assert "smoothed over 50 steps" in rows[2]
    assert f"{smooth.y[-1]:.4g} at {smooth.x[-1]:,.0f}" in rows[2]
    shown.tab.locator("#loss details.sql summary").click()
    sql = next(figure.sql for figure in report.figures if figure.id == "loss")
    assert shown.tab.locator("#loss pre").inner_text() == sql
    shown.tab.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    shown.tab.locator("#loss button.copy").click()
    assert shown.tab.evaluate("String(getSelection())") == sql
    assert shown.errors == []
    for figure in report.figures:
        shown.figure(figure.id)
        shown.tab.locator(f"#{figure.id} details.data summary").click() if figure.id != "loss" else None
        shown.tab.locator(f"#{figure.id} tbody tr").first.wait_for()


def test_a_phone_scrolls_one_way_and_a_finger_reads(opening, report):
    shown = opening(report, width=390, height=844, has_touch=True, is_mobile=True)
    for figure in report.figures:
        shown.figure(figure.id)
    assert shown.tab.evaluate("document.documentElement.scrollWidth") == 390
    box = shown.figure("loss").locator("canvas").bounding_box()
    shown.tab.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert shown.told("loss")[0].startswith("step ")
    tip = shown.tab.locator("#loss .tip").bounding_box()
    assert tip["x"] >= 0
    assert tip["x"] + tip["width"] <= 390


def test_two_fingers_zoom_and_move_on_a_phone(opening, report):
    shown = opening(report, width=390, height=844, has_touch=True, is_mobile=True)
    whole = shown.figure("learning_rate") and shown.range("learning_rate")
    box = shown.figure("loss").locator("canvas").bounding_box()
    hand = shown.tab.context.new_cdp_session(shown.tab)

    def touch(kind, *shares):
        y = box["y"] + box["height"] / 2
        points = [{"x": box["x"] + share * box["width"], "y": y, "id": i} for i, share in enumerate(shares)]
        hand.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    def spread(start, end):
        touch("touchStart", start[0])
        touch("touchStart", *start)
        for part in (0.25, 0.5, 0.75, 1.0):
            touch("touchMove", *(a + part * (b - a) for a, b in zip(start, end, strict=True)))
        touch("touchEnd")

    def at(share, ends):
        return ends[0] + share * (ends[1] - ends[0])

    spread((0.4, 0.6), (0.2, 0.8))
    # What was at 0.4 and 0.6 is at 0.2 and 0.8 now: a third of the whole, about its middle.
    narrow = [at(1 / 3, whole), at(2 / 3, whole)]
    assert shown.range("loss") == pytest.approx(narrow, rel=0.02)
    assert "show all" in shown.tab.locator("#page-zoom").inner_text()
    spread((0.3, 0.7), (0.5, 0.9))
    moved = [end - 0.2 * (narrow[1] - narrow[0]) for end in narrow]
    assert shown.range("loss") == pytest.approx(moved, rel=0.02)
    shown.figure("kurtosis")
    assert shown.range("kurtosis") == shown.range("loss")
    shown.figure("loss")
    spread((0.1, 0.9), (0.45, 0.55))
    assert shown.range("loss") == whole
    assert shown.tab.evaluate("visualViewport.scale") == 1
    assert shown.errors == []


def test_paper_is_light_and_has_all_figures_sharp(opening, report, tmp_path):
    shown = opening(report)
    shown.tab.locator("#page-theme").click()
    shown.tab.pdf(path=tmp_path / "report.pdf", format="A4")
    printed = (tmp_path / "report.pdf").read_bytes()
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 12
    streams = [zlib.decompress(found) for found in re.findall(rb"stream\r?\n(x.*?)\r?\nendstream", printed, re.DOTALL)]
    inked = b"".join(streams)
    # Chromium prints a canvas as the strokes it was drawn with: lines in the first colour of the light theme, and a
    # path through all points of the loss; cells of all maps.
    assert inked.count(b".0784 .3686 .8157 RG") >= 4
    assert inked.count(b" l\n") > len(body(report, "loss").lines[1].x)
    assert inked.count(b" re\n") + inked.count(b" h\n") > 5 * 8 * 200
    assert shown.tab.evaluate("document.documentElement.dataset.theme") == "dark"
    # Other browsers ask before they lay out for paper: the canvases must be light by then.
    shown.tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert shown.tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(250, 250, 248)"
    shown.tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert shown.tab.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(250, 250, 248)"


def test_figures_without_values_and_of_one_step_are_drawn(opening):
    report = made_up(steps=1, points=1, columns=1, layers=1, heads=1)
    empty = []
    for figure in report.figures:
        if figure.id == "loss":
            gone = replace(figure.body, lines=tuple(replace(one, y=one.y * np.nan) for one in figure.body.lines))
            empty.append(replace(figure, id="nothing", body=gone))
            empty.append(replace(figure, id="no_lines", body=replace(figure.body, lines=())))
        if figure.id == "rms":
            empty.append(replace(figure, id="no_cells", body=replace(figure.body, values=figure.body.values * np.nan)))
    report = replace(report, figures=(*report.figures, *empty), findings=(), missing=())
    shown = opening(report)
    for figure in report.figures:
        plot = shown.figure(figure.id)
        plot.hover()
    assert shown.errors == []
    assert "No values" in shown.tab.locator("#nothing .plot").inner_text()


def test_runs_are_laid_over_each_other(opening):
    runs = tuple(f"run-{i}" for i in range(8))
    report = made_up(runs=runs, steps=500, points=100, columns=20, layers=2, heads=2)
    shown = opening(report)
    point(shown, "learning_rate", 0.5)
    assert [name for name in runs if name in shown.tab.locator("#learning_rate .tip").inner_text()] == list(runs)
    colours = shown.tab.locator("#learning_rate .tip .swatch").evaluate_all(
        "all => all.map(one => getComputedStyle(one).borderTopColor)"
    )
    assert len(set(colours)) == 8
    shown.figure("rms")
    keys = [shown.figure(name) and shown.tab.locator(f"#{name} .range").inner_text() for name in ("rms", "rms-2")]
    assert keys[0] == keys[1]
    every = np.concatenate([body(report, name).values.ravel() for name in ("rms", *(f"rms-{i}" for i in range(2, 9)))])
    assert [number(end) for end in keys[0].split()] == pytest.approx([np.nanmin(every), np.nanmax(every)], rel=5e-3)
    assert shown.errors == []
