"""The page server as a browser, a scraper and an ill-behaved client meet it."""

import http.client
import os
import socket
import threading
import time

import pytest

from lm_telemetry.errors import SettingsError
from lm_telemetry.exporters import server as server_module
from lm_telemetry.exporters.server import PageServer


@pytest.fixture
def page():
    server = PageServer(0, "text/plain; version=0.0.4")
    server.publish(b"hello\n")
    yield server
    server.close()


def port_of(page):
    return int(page.address.split(":")[2].split("/")[0])


def ask(page, method="GET", path="/metrics"):
    connection = http.client.HTTPConnection("127.0.0.1", port_of(page), timeout=10)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def test_the_page(page):
    status, body, headers = ask(page)
    assert (status, body) == (200, b"hello\n")
    assert headers["Content-Type"] == "text/plain; version=0.0.4"
    page.publish(b"newer\n")
    assert ask(page, path="/metrics?debug=1")[:2] == (200, b"newer\n")


@pytest.mark.parametrize("path", ["/", "/metrics/", "/../etc/passwd", "/favicon.ico", "*"])
def test_other_paths_are_not_found(page, path):
    assert ask(page, path=path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW"])
def test_other_methods_are_refused(page, method):
    status, body, headers = ask(page, method)
    assert (status, headers["Allow"]) == (405, "GET")
    assert body == (b"" if method == "HEAD" else b"only GET\n")


def test_it_listens_on_this_machine_alone(page):
    assert page.address.startswith("http://127.0.0.1:")
    assert page._server.socket.getsockname()[0] == "127.0.0.1"


def test_a_taken_port_is_refused_with_advice(page):
    with pytest.raises(SettingsError, match="in use; choose another, 0 for any free one") as caught:
        PageServer(port_of(page), "text/plain")
    assert (caught.value.setting, caught.value.value) == ("prometheus_port", port_of(page))


def test_a_closed_port_is_free_again(page):
    page.close()
    page.close()
    again = PageServer(port_of(page), "text/plain")
    again.close()


def test_a_forked_child_does_not_keep_the_port(page):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        page.close()  # nothing: it belongs to the parent
        os.read(read, 1)
        os._exit(0)
    try:
        assert ask(page)[0] == 200
        page.close()
        again = PageServer(port_of(page), "text/plain")
        assert ask(again)[0] == 200
        again.close()
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


@pytest.mark.parametrize("words", [b"", b"GET /metr", b"GET /metrics HTTP/1.1\r\nX: "])
def test_half_open_clients_are_let_go(page, monkeypatch, words):
    monkeypatch.setattr(server_module._Handler, "timeout", 0.1)
    with socket.create_connection(("127.0.0.1", port_of(page)), timeout=10) as client:
        client.sendall(words)
        assert client.recv(100) == b""  # closed by the server; the client itself would wait for 10 s and raise


def test_connections_are_bounded_and_the_page_comes_back(page):
    clients = [socket.create_connection(("127.0.0.1", port_of(page)), timeout=10) for _ in range(40)]
    deadline = time.monotonic() + 10
    while page._server._places._value and time.monotonic() < deadline:
        time.sleep(0.01)
    assert page._server._places._value == 0
    threads = [t for t in threading.enumerate() if "process_request_thread" in t.name]
    assert len(threads) <= server_module.MAX_CONNECTIONS
    for client in clients:
        client.close()
    deadline = time.monotonic() + 10
    while page._server._places._value < server_module.MAX_CONNECTIONS and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ask(page)[:2] == (200, b"hello\n")


def test_rubbish_is_answered_or_dropped_in_silence(page, capfd):
    for words in (b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET\r\n\r\n", b"A" * 70_000 + b"\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port_of(page)), timeout=10) as client:
            client.sendall(words)
    assert ask(page)[0] == 200
    assert capfd.readouterr() == ("", "")
