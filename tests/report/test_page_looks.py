"""What the report looks like: contrasts, colours that can be told apart, even ramps; and screenshots for people."""

from __future__ import annotations

import re
from importlib.resources import files
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from made_up_report import made_up

STYLE = (files("lm_telemetry.exporters.report") / "assets" / "page.css").read_text()
PAIRS = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", STYLE)
THEMES = {
    "light": {name: light for name, light, _ in PAIRS},
    "dark": {name: dark for name, _, dark in PAIRS},
}
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"

# Linear sRGB to LMS and to OKLab (Ottosson 2020).
TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
# What is left of linear sRGB without one kind of cones (Machado, Oliveira, Fernandes 2009, severity 1).
EYES = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def linear(srgb):
    srgb = np.asarray(srgb, dtype=float)
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def of_hex(text):
    return linear([int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def contrast(a, b):
    """WCAG 2.2."""
    light, dark = sorted((of_hex(x) @ [0.2126, 0.7152, 0.0722] + 0.05 for x in (a, b)), reverse=True)
    return light / dark


def oklab(rgb):
    return np.cbrt(np.clip(rgb, 0, 1) @ TO_LMS.T) @ TO_LAB.T


@pytest.mark.parametrize("theme", THEMES)
def test_text_and_marks_have_contrast(theme):
    colours = THEMES[theme]
    texts = ("ink", "muted", "link", "ok", "note", "warning", "critical")
    low = {(text, on): contrast(colours[text], colours[on]) for text in texts for on in ("ground", "card", "empty")}
    assert min(low.values()) >= 4.5, min(low, key=low.get)
    series = [name for name in colours if name.startswith("series")]
    assert len(series) == 8
    assert min(contrast(colours[name], colours["card"]) for name in series) >= 3


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("theme", THEMES)
def test_runs_can_be_told_apart(theme, eyes):
    seen = [oklab(of_hex(THEMES[theme][f"series-{i}"]) @ np.transpose(EYES[eyes])) for i in range(8)]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 0.08


@pytest.mark.parametrize("theme", THEMES)
def test_ramps_grow_evenly(opening, theme):
    shown = opening(theme=theme)
    read = "c => Array.from(c.getContext('2d').getImageData(0, 0, 256, 1).data)"
    lightness = {}
    for name in ("rms", "update_ratio"):
        shown.figure(name)
        pixels = np.array(shown.tab.locator(f"#{name} .range canvas").evaluate(read)).reshape(256, 4)[:, :3]
        lightness[name] = oklab(linear(pixels / 255))[:, 0]
    steps = np.diff(lightness["rms"][::8])
    assert steps.min() > 0.6 * steps.mean() > 0
    both = lightness["update_ratio"]
    np.testing.assert_allclose(both, both[::-1], atol=0.01)
    middle = both[128] if theme == "light" else 1 - both[128]
    assert middle > 0.65
    assert (np.diff(both[:128:8]) > 0).all() == (theme == "light")


@pytest.mark.parametrize(
    ("runs", "width", "theme"),
    [(1, 390, "light"), (1, 390, "dark"), (1, 1440, "light"), (1, 1440, "dark"), (3, 1440, "light")],
)
def test_screenshots_for_people(opening, runs, width, theme):
    names = ("smollm-135m-lr3e-3", "smollm-135m-lr1e-3", "smollm-135m-mup")[:runs]
    report = made_up(runs=names)
    shown = opening(report, width=width, theme=theme)
    for figure in report.figures:
        shown.figure(figure.id)
    shown.tab.evaluate("scrollTo(0, 0)")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    target = SCREENSHOTS / f"report-{runs}-{width}-{theme}.png"
    shown.tab.screenshot(path=target, full_page=True)
    assert target.stat().st_size > 50_000
    assert shown.errors == []
