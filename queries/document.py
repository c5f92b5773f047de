"""The page of all tables and views, from the catalogue and the headers of the views.

    python -m lm_telemetry.queries.document > docs/views.md

Left out: what a view answers on real data (`lmt demo` shows some).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_telemetry.catalogue import PARTITIONS, TABLES, columns
from lm_telemetry.queries.view import list_views

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lm_telemetry.queries.view import View

COMMAND = "python -m lm_telemetry.queries.document > docs/views.md"

_BEGINNING = f"""\
# Tables and views

Written by `{COMMAND}`.

A table is what was measured; a view is a question about it. Ask either with `lmt sql "FROM overview"`, or in Python:

```python
from lm_telemetry.queries import connect

with connect("telemetry-store") as con:
    print(con.sql("SELECT step, smoothed_loss FROM training"))
```

Every table has the columns `run_id` and `rank`, of the process that captured the row. A run that was resumed from a
checkpoint takes some steps again: a table shows the last time each was taken, `raw.<table>` every time.

What could not be measured is NULL; NaN is what was measured. A unit of 1 is a pure number.

## On Spark and Trino

`lmt views --dialect spark --location s3a://bucket/telemetry-store` writes the statements that make the tables and all
views there; with the name of a view, only that view and what it reads. `--dialect trino` does so for Trino.

- Every view is run on Spark in the tests, and compared with DuckDB row by row; the SQL for Trino is only parsed there.
- `raw.<table>` is `raw_<table>` there.
- These engines see every row once, also after a compaction: what it has merged stays in `_merged/` until what
  it replaces is deleted. While that happens, for milliseconds, rows may be there twice.
- `time` reads UTC. The order of rows is that of your ORDER BY, whatever the view's own says.
- SQL of yours is translated by `lm_telemetry.queries.dialect.translate(sql, "spark")`, if it keeps to the part of SQL
  that all three agree on (`lm_telemetry.queries.portable`); it is refused with the reason otherwise.
"""  # noqa: S608 Markdown


def page() -> str:
    """The page, in Markdown."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield _BEGINNING
    yield "## Views\n"
    yield from _rows(("view", "question"), ((f"[`{v.name}`](#{v.name})", v.question) for v in list_views()))
    yield "\n## Tables\n"
    yield from _rows(("table", "rows"), ((f"[`{name}`](#table-{name})", rows) for name, rows in TABLES.items()))
    for view in list_views():
        yield from _view(view)
    for table in TABLES:
        yield from _table(table)


def _view(view: View) -> Iterator[str]:
    yield f'\n<a id="{view.name}"></a>\n\n### {view.name}\n\n{view.question}\n'
    yield from _rows(("column", "unit", "meaning"), ((f"`{c.name}`", c.unit, c.meaning) for c in view.columns))
    yield f"\nSource: {view.source}\n"
    yield f"<details><summary>SQL</summary>\n\n```sql\n{view.sql}\n```\n\n</details>"


def _table(table: str) -> Iterator[str]:
    yield f'\n<a id="table-{table}"></a>\n\n### Table `{table}`\n\nHas {TABLES[table]}.\n'
    rows: list[tuple[str, ...]] = [(f"`{name}`", "", "", "from the path") for name in PARTITIONS]
    rows += [(f"`{m.name}`", m.type, m.unit, _meaning(m.meaning, m.source)) for m in columns(table)]
    yield from _rows(("column", "type", "unit", "meaning"), rows)


def _meaning(meaning: str, source: str) -> str:
    return f"{meaning} ({source})" if source else meaning


def _rows(names: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(names)} |"
    yield f"| {' | '.join('---' for _ in names)} |"
    for row in rows:
        yield f"| {' | '.join(_cell(text) for text in row)} |"


def _cell(text: str) -> str:
    """Text in a table's cell: `|` would end it, `<` begin a tag, outside of code."""
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("*", "\\*") for part in parts[::2]]
    return "`".join(parts).replace("|", "\\|")


if __name__ == "__main__":
    print(page())
