"""Frames of planted stores, as text."""

import io
from datetime import UTC, datetime

import pytest
from planted import START
from rich.console import Console

from lm_telemetry.exporters.watch.frame import Frame
from lm_telemetry.exporters.watch.reading import Watcher
from lm_telemetry.queries import connect
from lm_telemetry.store import Store


@pytest.fixture
def store(tmp_path):
    return Store.open_for_writing(tmp_path / "store")


@pytest.fixture
def watch(store):
    """`watch(run_id)` gives a function that looks, again and again."""
    connections = []

    def start(run_id="r", *, is_live=False):
        connection = connect(store.path)
        connections.append(connection)
        return Watcher(connection, run_id, rank=0, is_live=lambda last: is_live).look

    yield start
    for connection in connections:
        connection.__exit__()


@pytest.fixture
def frame():
    """The lines of a reading's frame, as a terminal of that size shows them."""

    def draw(reading, width=100, height=40, *, now=START, ascii_only=False, **about):
        assert now <= datetime.now(UTC)
        console = Console(width=width, height=height, file=io.StringIO(), color_system=None)
        console.print(Frame(width, height, ascii_only=ascii_only).draw(reading, now, **about))
        return console.file.getvalue().splitlines()

    return draw
