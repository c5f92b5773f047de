"""The page of tables and views is the one that the catalogue and the headers make."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lm_telemetry.catalogue import CATALOGUE, TABLES
from lm_telemetry.queries import list_views
from lm_telemetry.queries.document import COMMAND, page

PAGE = Path(__file__).parents[2] / "docs" / "views.md"


def sections():
    """The text under each heading of the third level."""
    _, *found = re.split(r"^### (.+)$", page(), flags=re.MULTILINE)
    return dict(zip(found[::2], found[1::2], strict=True))


def cells(row):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def test_the_page_is_current():
    assert PAGE.is_file(), f"run: {COMMAND}"
    assert PAGE.read_text(encoding="utf-8") == page() + "\n", f"{PAGE.name} is out of date; run: {COMMAND}"


def test_the_command_writes_the_page():
    words = COMMAND.partition(" > ")[0].split()[1:]
    assert subprocess.run([sys.executable, *words], capture_output=True, text=True).stdout == page() + "\n"


@pytest.mark.parametrize("view", list_views(), ids=lambda view: view.name)
def test_a_view_is_there_with_question_columns_source_and_sql(view):
    section = sections()[view.name]
    assert view.question in section
    assert f"Source: {view.source}" in section
    assert f"```sql\n{view.sql}\n```" in section
    assert {f"`{c.name}`" for c in view.columns} <= {cells(row)[0] for row in section.splitlines() if row[:1] == "|"}


def test_every_column_of_the_catalogue_is_there_once():
    found = sections()
    for table in TABLES:
        rows = [cells(row) for row in found[f"Table `{table}`"].splitlines() if row.startswith("| `")]
        expected = [("`run_id`", ""), ("`rank`", "")]
        expected += [(f"`{m.name}`", m.unit) for m in CATALOGUE if m.table == table]
        assert [(name, unit) for name, _, unit, _ in rows] == expected


def test_links_lead_somewhere():
    text = page()
    targets = re.findall(r"\]\(#([\w-]+)\)", text)
    assert len(targets) == len(TABLES) + len(list_views())
    for target in targets:
        assert text.count(f'<a id="{target}">') == 1


def test_no_row_is_broken_by_what_stands_in_it():
    rows = [line for line in page().splitlines() if line.startswith("| ")]
    assert rows
    for row in rows:
        assert len(cells(row)) in {2, 3, 4}
        outside_of_code = "".join(row.split("`")[::2])
        assert "<" not in outside_of_code
