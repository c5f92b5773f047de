"""An event can be made of anything, also of objects that fight back."""

import json
import math
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_telemetry.columns import to_table
from lm_telemetry.events import TEXT_LIMIT, Event, describe, encode_fields

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers()
    | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5) | st.integers() | st.none(), inner, max_size=3)
        | st.tuples(inner)
    ),
    max_leaves=8,
)


def no_constants(name):
    raise AssertionError(f"{name} is not JSON")


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=5), ANYTHING, max_size=3))
def test_anything_becomes_json_that_utf8_can_hold(fields):
    document = json.loads(encode_fields(fields), parse_constant=no_constants)
    json.dumps(document, ensure_ascii=False).encode("utf-8")


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"])),
    )
)
def test_plain_values_come_back_as_they_were(fields):
    assert json.loads(encode_fields(fields)) == fields


class Colour(Enum):
    RED = 1


class Hostile:
    def __repr__(self):
        raise RuntimeError("no")

    __str__ = __repr__


class Device:
    shape = (3, 4)

    def __repr__(self):
        raise AssertionError("reading this would wait for a device")


class Mute(Exception):
    def __str__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, "NaN"),
        (math.inf, "Infinity"),
        (-math.inf, "-Infinity"),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (Path("a/b"), "a/b"),
        (Colour.RED, "Colour.RED"),
        (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02 00:00:00+00:00"),
        (ValueError("bad"), "ValueError: bad"),
        (np.zeros((2, 3)), "ndarray of shape (2, 3)"),
        (Device(), "Device of shape (3, 4)"),
        ({1: {2}}, {"1": [2]}),
        (2**64, "0x10000000000000000"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_known_kinds_are_written_for_a_reader(value, expected):
    assert json.loads(encode_fields({"value": value})) == {"value": expected}


def test_hostile_objects_are_named():
    circle = []
    circle.append(circle)
    document = json.loads(encode_fields({"hostile": Hostile(), "circle": circle, "mute": Mute()}))
    assert "Hostile instance" in document["hostile"]
    assert "Mute" in document["mute"]
    assert "Mute" in describe(Mute())


def test_long_things_are_cut():
    document = json.loads(encode_fields({"text": "x" * 10**6, "many": range(3), "list": list(range(10**5))}))
    assert len(document["text"]) == TEXT_LIMIT
    assert len(document["list"]) == 1000


def test_an_event_is_a_row():
    event = Event.now("error", "kind", "message \ud800", 3, {"a": 1})
    rows = to_table("events", event.columns, attempt=0, step=event.step, time_us=event.time_us).to_pylist()
    assert rows[0]["message"] == "message ?"
    assert (rows[0]["severity"], rows[0]["kind"], rows[0]["fields"], rows[0]["step"]) == (
        "error",
        "kind",
        '{"a": 1}',
        3,
    )
