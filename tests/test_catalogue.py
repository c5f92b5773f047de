"""The catalogue is the contract: schema, comments, HELP lines and the README are held to it."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest
from tiny_models import batch, build

from lm_telemetry import observe
from lm_telemetry.catalogue import CATALOGUE, TABLES, columns, metric
from lm_telemetry.instruments.base import Instrument
from lm_telemetry.queries import connect
from lm_telemetry.schema import FORMAT_VERSION, empty, float_columns, schema
from lm_telemetry.settings import Settings, installed_instruments

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("table", TABLES)
def test_a_schema_holds_every_column_with_unit_and_meaning(table):
    found = schema(table)
    assert found.names == [m.name for m in columns(table)]
    assert found.names[:3] == ["attempt", "step", "time"]
    assert found.metadata[b"lm_telemetry.format"] == FORMAT_VERSION.encode()
    for field, entry in zip(found, columns(table), strict=True):
        assert field.metadata[b"meaning"].decode() == entry.meaning
        assert field.metadata[b"unit"].decode() == entry.unit
        assert pa.types.is_floating(field.type) == (entry.name in float_columns(table))
    assert empty(table).num_rows == 0


def test_every_entry_says_what_it_is():
    seen = set()
    for entry in CATALOGUE:
        assert (entry.table, entry.name) not in seen, "a column is described once"
        seen.add((entry.table, entry.name))
        assert re.fullmatch(r"[a-z][a-z0-9_]*", entry.name)
        assert len(entry.meaning) > 8
        assert not entry.meaning.endswith(".")
        if entry.type in {"float32", "float64"}:
            assert entry.unit, f"{entry.table}.{entry.name} has no unit"


def test_names_that_are_not_there_are_refused():
    with pytest.raises(KeyError, match="no table 'layer'"):
        columns("layer")
    with pytest.raises(KeyError, match="'rsm'"):
        metric("layers", "rsm")


def test_sql_comments_are_the_catalogues(store):
    with observe(build("llama"), store=store) as session:
        session.step()
    comments = connect(store).execute(
        "SELECT table_name, column_name, comment FROM duckdb_columns() WHERE comment IS NOT NULL"
    )
    found = {(table, column): comment for table, column, comment in comments.fetchall()}
    for entry in CATALOGUE:
        assert entry.meaning in found[entry.table, entry.name]


def test_instruments_fill_columns_of_the_catalogue(store):
    """What an instrument hands over must fit, or the writer tells; here nothing is told, and keys are never NULL."""
    from stored import events, rows

    model = build("t5").eval()
    with observe(model, store=store, every=1, strict=True) as session:
        model(**batch())
        session.step()
    assert not events(store, "capture_failed")
    for table in ("layers", "heads"):
        for row in rows(store, table):
            assert all(row[m.name] is not None for m in columns(table) if m.key)


@pytest.mark.parametrize("name", sorted(installed_instruments()))
def test_an_instrument_says_what_it_needs_and_costs(name):
    instrument = installed_instruments()[name].load()
    assert issubclass(instrument, Instrument)
    assert instrument.name == name
    assert set(instrument.tables) <= set(TABLES)
    assert instrument.taps or "on_batch" in vars(instrument)
    assert instrument.__doc__


def test_the_readme_names_every_setting_and_its_default():
    readme = (ROOT / "README.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", readme.partition("## Settings")[2], re.MULTILINE))
    defaults = Settings()
    assert set(table) == set(Settings.__slots__)
    for name in ("store", "mode"):
        assert table[name] == f"`{getattr(defaults, name)}`"
    for name in ("every", "flush_seconds", "max_overhead"):
        assert float(table[name]) == getattr(defaults, name)
