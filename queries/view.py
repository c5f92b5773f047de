"""The library of questions: every `.sql` file in `views/`, with the header that says what it answers.

A file begins with comment lines and goes on with a single SELECT:

    -- question: one question, ending in a question mark
    -- columns:
    --   name [unit]: meaning
    -- source: where its thresholds and definitions come from

A line that is indented more than a column's continues the one before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from lm_telemetry.errors import QueryError

_COLUMN = re.compile(r"  (?P<name>\w+) \[(?P<unit>[^\]]*)\]: (?P<meaning>.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewColumn:
    """A column of a view."""

    name: str
    unit: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A question and the SELECT that answers it."""

    name: str
    question: str
    columns: tuple[ViewColumn, ...]
    source: str
    header: str
    """the comment lines as they stand in the file"""
    sql: str
    """the SELECT alone"""


@cache
def list_views() -> tuple[View, ...]:
    """All views, by name.

    Raises:
        QueryError: a file has no proper header.
    """
    folder = files("lm_telemetry.queries") / "views"
    found = sorted((f for f in folder.iterdir() if f.name.endswith(".sql")), key=lambda f: f.name)
    return tuple(parse_view(f.name.removesuffix(".sql"), f.read_text(encoding="utf-8")) for f in found)


def parse_view(name: str, text: str) -> View:
    """The view in the text of a `.sql` file.

    Raises:
        QueryError: it does not begin with question, columns and source, or no SELECT follows.
    """
    lines = text.splitlines()
    height = next((i for i, line in enumerate(lines) if not line.startswith("--")), len(lines))
    sections: dict[str, list[str]] = {}
    current = ""
    for line in (line[2:].removeprefix(" ") for line in lines[:height]):
        label, colon, rest = line.partition(":")
        if colon and label in {"question", "columns", "source"}:
            current = label
            sections[current] = [rest.strip()] if rest.strip() else []
        elif current == "columns" and line.startswith("    ") and sections[current]:
            sections[current][-1] += " " + line.strip()
        elif current:
            sections[current].append(line if current == "columns" else line.strip())
    matches = [_COLUMN.fullmatch(line) for line in sections.get("columns", [])]
    question, source = (" ".join(sections.get(label, [])) for label in ("question", "source"))
    sql = "\n".join(lines[height:]).strip().removesuffix(";").strip()
    if not question or not source or not matches or not all(matches) or not sql:
        raise QueryError(
            f"views/{name}.sql must begin with `-- question:`, `-- columns:` (lines `--   name [unit]: meaning`) and"
            f" `-- source:`, then hold one SELECT; found {', '.join(sections) or 'no header'}"
        )
    return View(
        name=name,
        question=question,
        columns=tuple(ViewColumn(name=m["name"], unit=m["unit"], meaning=m["meaning"]) for m in matches if m),
        source=source,
        header="\n".join(lines[:height]),
        sql=sql,
    )
