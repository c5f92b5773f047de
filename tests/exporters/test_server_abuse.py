"""The page server as ill-behaved clients meet it: they cost a place for a while, and hold up nobody."""

import contextlib
import errno
import socket
import threading
import time

import pytest

from lm_telemetry.exporters import server as server_module
from lm_telemetry.exporters.access import Access
from lm_telemetry.exporters.exposition import Exposition
from lm_telemetry.exporters.server import MAX_CONNECTIONS, PageServer

BIG = b"x" * 8_000_000
"""More than the system takes off our hands at once."""
REQUEST = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def impatient(monkeypatch):
    for name in ("IDLE_SECONDS", "KEPT_SECONDS", "TAKE_SECONDS"):
        monkeypatch.setattr(server_module, name, 0.2)


@pytest.fixture
def page():
    server = PageServer(0)
    server.publish(Exposition(text=b"hello\n"))
    yield server
    server.close()


@pytest.fixture
def connect(page):
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(socket.create_connection(("127.0.0.1", page.port), timeout=10))


def answered(connection):
    connection.sendall(REQUEST)
    found = b""
    while not found.endswith(b"hello\n"):
        more = connection.recv(65536)
        if not more:
            return False
        found += more
    return found.startswith(b"HTTP/1.1 200 OK\r\n")


def wait(holds):
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.005)
    return holds()


@pytest.mark.parametrize("words", [b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\nX: ", REQUEST])
def test_clients_that_fall_silent_are_let_go(page, connect, impatient, words):
    silent = connect()
    silent.sendall(words)
    assert wait(lambda: page._connections)
    while silent.recv(4096):  # the server closes; the client itself would wait for 10 s and raise
        pass
    assert wait(lambda: not page._connections)


def test_a_client_that_asks_a_byte_at_a_time_is_let_go(page, connect, impatient):
    slow = connect()
    with pytest.raises(OSError):
        for _ in range(10_000):
            slow.sendall(b"G")
            time.sleep(0.01)


def test_clients_that_do_not_take_their_answer_hold_up_nobody(page, connect, impatient):
    page.publish(Exposition(text=BIG))
    for _ in range(20):
        connect().sendall(REQUEST)
    assert wait(lambda: len(page._connections) == 20)
    page.publish(Exposition(text=b"hello\n"))
    assert answered(connect())
    assert wait(lambda: not page._connections)


def test_a_slow_client_gets_the_page_it_asked_for(page, connect):
    page.publish(Exposition(text=BIG))
    slow = connect()
    slow.sendall(REQUEST)
    assert wait(lambda: page._connections)
    time.sleep(0.05)
    page.publish(Exposition(text=b"hello\n"))
    assert answered(connect())
    length = 0
    while length < len(BIG):
        more = slow.recv(1_000_000)
        assert more
        length += len(more)


def test_handshakes_that_never_end_hold_up_nobody(certificates, impatient):
    access = Access.load(certificate=certificates["server"], key=certificates["server_key"])
    server = PageServer(0, access=access)
    with contextlib.ExitStack() as stack:
        for words in (b"", b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\n\r\n") * 5:
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10)).sendall(words)
        assert wait(lambda: server._connections)
        assert wait(lambda: not server._connections)
    server.close()


def test_connections_are_bounded_and_idle_ones_give_way(page, connect):
    threads = set(threading.enumerate())
    silent = [connect() for _ in range(10)]
    assert wait(lambda: len(page._connections) == 10)
    kept = [connect() for _ in range(5)]
    assert all(answered(each) for each in kept)
    silent += [connect() for _ in range(MAX_CONNECTIONS - 15)]
    assert wait(lambda: len(page._connections) == MAX_CONNECTIONS)
    assert set(threading.enumerate()) == threads, "no thread of its own for a connection"
    for _ in range(5):
        assert answered(connect())
    assert [each.recv(1) for each in kept] == [b""] * 5, "those that were idle went first"
    silent += [connect() for _ in range(8)]
    assert [each.recv(1) for each in silent[:3]] == [b""] * 3, "then, after the five of before, those longest at it"
    assert wait(lambda: len(page._connections) == MAX_CONNECTIONS)
    silent[3].sendall(REQUEST)
    assert silent[3].recv(15) == b"HTTP/1.1 200 OK"


def test_a_refusal_arrives_although_more_was_sent(page, connect):
    client = connect()
    client.sendall(b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n")
    client.sendall(b"y" * 3_000_000)  # it is read, so that nothing is reset
    client.shutdown(socket.SHUT_WR)
    assert client.recv(4096).startswith(b"HTTP/1.1 405 ")


def test_a_stream_without_end_is_cut_off(page, connect, impatient):
    client = connect()
    client.sendall(b"GET /nowhere HTTP/1.0\r\n\r\n")
    with pytest.raises(OSError):
        for _ in range(100_000):
            client.sendall(b"z" * 10_000)
            assert wait(lambda: len(page._connections) <= 1)
    assert wait(lambda: not page._connections)


def test_rubbish_is_answered_or_dropped_in_silence(page, connect, capfd):
    for words in (b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET\r\n\r\n", b"A" * 70_000 + b"\r\n\r\n", b"\0" * 100):
        client = connect()
        with contextlib.suppress(OSError):
            client.sendall(words)
        client.close()
    assert answered(connect())
    assert capfd.readouterr() == ("", "")


def test_without_descriptors_it_waits_for_better_times(page, connect, monkeypatch):
    monkeypatch.setattr(server_module, "_PAUSE_SECONDS", 0.01)
    accept, failures = socket.socket.accept, []

    def flaky(self):
        if len(failures) < 3:
            failures.append(1)
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(self)

    monkeypatch.setattr(socket.socket, "accept", flaky)
    assert answered(connect())
    assert len(failures) == 3
