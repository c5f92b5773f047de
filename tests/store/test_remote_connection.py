"""Filesystems that connect when they are opened, as SFTP does, and whose connection does not outlive an outage."""

import threading

import pytest
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem
from remote_stores import Parts, clear

from lm_telemetry.errors import StoreError
from lm_telemetry.queries import connect
from lm_telemetry.remote import Remote
from lm_telemetry.spool import Spool

URL = "tethered://host/store"


class Tethered(MemoryFileSystem):
    """Memory behind a line: `line` numbers the connections, and is None while there is none to be had."""

    protocol = "tethered"
    line: int | None = 0
    hanging = threading.Event()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.hanging.wait(30)
        if self.line is None:
            raise ConnectionRefusedError("nobody listens")
        self._mine = self.line

    def _open(self, *args, **kwargs):
        if self._mine != self.line:
            raise OSError("Socket is closed")
        return super()._open(*args, **kwargs)


register_implementation("tethered", Tethered)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("lm_telemetry.uploader.FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr("lm_telemetry.spool.REACH_SECONDS", 0.2)
    Tethered.line = 0
    Tethered.hanging.set()
    clear()
    yield
    Tethered.hanging.set()
    clear()


def losses():
    with connect(URL) as con:
        return [loss for (loss,) in con.execute("SELECT loss FROM steps ORDER BY step").fetchall()]


def test_after_an_outage_there_is_a_new_connection(tmp_path):
    spool = Spool(URL, str(tmp_path), 2**30)
    parts = Parts(spool.store)
    uploader = spool.uploader("r", 0, 0)
    uploader.start(lambda *_, **__: None)
    parts.write(1)
    assert uploader.drain(10)
    Tethered.line = None
    parts.write(1)
    assert not uploader.drain(0.1)
    assert "nobody listens" in uploader.trouble
    Tethered.line = 1
    assert uploader.drain(10)
    assert uploader.trouble is None
    assert uploader.close(10)
    assert losses() == [1.0, 2.0]


@pytest.mark.parametrize("is_silent", [True, False])
def test_who_cannot_connect_begins_all_the_same(tmp_path, caplog, is_silent):
    Tethered.line = None
    if is_silent:
        Tethered.hanging.clear()
    spool = Spool(URL, str(tmp_path), 2**30)
    assert spool.claim_attempt("r") == 0
    Parts(spool.store).write(1)
    uploader = spool.uploader("r", 0, 0)
    uploader.start(lambda *_, **__: None)
    assert not uploader.close(0.1)
    assert "rows will wait" in caplog.text


def test_a_reader_who_cannot_connect_is_told(tmp_path):
    Tethered.line = None
    with pytest.raises(StoreError, match="cannot read tethered://host/store: ConnectionRefusedError"):
        connect(URL)


def test_what_is_no_filesystem_is_told_without_connecting():
    Tethered.line = None
    assert Remote(URL).protocol == "tethered"
    with pytest.raises(StoreError, match="pip install"):
        Remote("nosuchthing://host/store")
