"""A report as one HTML file: offline, whole, and safe to open whatever the names in it are.

Decisions:

- Words are HTML (`markup`), numbers a JSON block (`encode`), drawing is plain scripts and one style sheet (`assets/`),
  all in the file: it works from a disk, a mail or a bucket, and in ten years.
- No charting library: what keeps well as a Python package is megabytes, and none draws heatmaps, head maps and
  pathways alike. Ours are a few small files without a build step, put into one script here.
- A Content-Security-Policy lets run exactly this script and this style sheet, by their hashes, and nothing be fetched:
  should markup slip in through a name after all, it stays inert.
- A mark in the head says that the file is a report, so that one may be written over another, and over nothing else.

Left out: servers, updates while a run is on (write the report again), and more than eight runs.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from lm_telemetry.exporters.report.encode import document
from lm_telemetry.exporters.report.markup import content, title

if TYPE_CHECKING:
    from lm_telemetry.exporters.report.model import Report

SCRIPTS = (
    "data.js",
    "format.js",
    "colours.js",
    "axes.js",
    "steer.js",
    "lines.js",
    "heatmap.js",
    "headmap.js",
    "pathways.js",
    "bars.js",
    "page.js",
)
"""In the order in which they build on each other."""

MARK = '<meta name="generator" content="lm-telemetry report">'
"""Stands in the first kilobyte of every report."""


def page(report: Report) -> str:
    """The whole HTML of a report.

    Args:
        report: findings and figures; names in it may hold anything.
    """
    script = '"use strict";\n(() => {\n' + "\n".join(map(_asset, SCRIPTS)) + "\n})();\n"
    style = "\n" + _asset("page.css")
    return Template(_asset("page.html")).substitute(
        policy=f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)};"
        " img-src data:; base-uri 'none'; form-action 'none'",
        title=title(report),
        style=style,
        content=content(report),
        data=document(report),
        script=script,
    )


def is_page(beginning: str) -> bool:
    """Whether a file that begins so is a report."""
    return MARK in beginning[:1024]


def _asset(name: str) -> str:
    return (files("lm_telemetry.exporters.report") / "assets" / name).read_text(encoding="utf-8")


def _hash(inline: str) -> str:
    """The source expression of CSP for an inline element with this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"
