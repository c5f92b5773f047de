"""A real browser, and reports opened in it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from made_up_report import made_up
from real_parts import missing

from lm_telemetry.exporters.report.page import page


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium, headless."""
    chromium = shutil.which("chromium")
    if chromium is None:
        missing("chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass(slots=True)
class Opened:
    """A report in a tab, and all that the tab complained of or asked the network for."""

    tab: object
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def figure(self, name):
        """Bring a figure into view, and give its plot once it is drawn."""
        self.tab.evaluate("id => document.getElementById(id).scrollIntoView({block: 'center'})", name)
        plot = self.tab.locator(f"#{name} .plot")
        plot.locator("canvas, .bars, path.route").first.wait_for(state="attached")
        self.tab.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return plot

    def told(self, name):
        """What the tip of a figure says, line by line."""
        return self.tab.locator(f"#{name} .tip").inner_text().split("\n")

    def range(self, name):
        """[lowest, highest] x of what is shown."""
        return [float(end) for end in self.tab.locator(f"#{name} .plot").get_attribute("data-range").split()]


@pytest.fixture
def opening(browser, tmp_path):
    """`opening(report, width=..., theme=...)` opens a report as a file."""
    contexts = []

    def opened(report=None, *, width=1440, height=900, theme="light", **options):
        path = Path(tmp_path, f"report-{len(contexts)}.html")
        path.write_text(page(report or made_up(steps=2_000, layers=8, heads=8)), encoding="utf-8", newline="")
        viewport = {"width": width, "height": height}
        context = browser.new_context(viewport=viewport, color_scheme=theme, reduced_motion="reduce", **options)
        contexts.append(context)
        shown = Opened(context.new_page())
        shown.tab.on("console", lambda said: shown.errors.append(said.text) if said.type != "log" else None)
        shown.tab.on("pageerror", lambda error: shown.errors.append(str(error)))
        shown.tab.on("request", lambda request: shown.requests.append(request.url))
        shown.tab.goto(path.as_uri())
        return shown

    yield opened
    for context in contexts:
        context.close()
