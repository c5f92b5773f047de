"""The page server as scrapers meet it, and what it gives them."""

import http.client
import os
import ssl
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lm_telemetry.errors import SettingsError
from lm_telemetry.exporters.access import Access, Credentials
from lm_telemetry.exporters.exposition import Exposition
from lm_telemetry.exporters.server import PageServer

HELLO = Exposition(text=b"hello\n", openmetrics=b"hello\n# EOF\n")


@pytest.fixture
def page():
    server = PageServer(0)
    server.publish(HELLO)
    yield server
    server.close()


def ask(page, path="/metrics", *, method="GET", tls=None, **headers):
    kind = http.client.HTTPConnection if tls is None else http.client.HTTPSConnection
    connection = kind("127.0.0.1", page.port, timeout=10, **({} if tls is None else {"context": tls}))
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def test_the_page(page):
    status, body, headers = ask(page)
    assert (status, body) == (200, b"hello\n")
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    page.publish(Exposition(text=b"newer\n"))
    assert ask(page, "/metrics?debug=1")[:2] == (200, b"newer\n")
    assert ask(page, Accept="application/openmetrics-text")[1] == b"# EOF\n"
    assert ask(page, method="POST")[0] == 405
    assert ask(page, "/nowhere")[0] == 404


def test_by_default_it_listens_on_this_machine_alone(page):
    assert page.address == f"http://127.0.0.1:{page.port}/metrics"
    assert page._listener.getsockname()[0] == "127.0.0.1"
    assert page.is_loopback


def test_elsewhere_it_is_reached_by_the_machine_s_name():
    server = PageServer(0, host="0.0.0.0")
    assert not server.is_loopback
    assert server.netloc == f"{os.uname().nodename}:{server.port}"
    server.close()


def test_it_speaks_ipv6_where_there_is_some():
    try:
        server = PageServer(0, host="::1")
    except SettingsError:
        pytest.skip("this machine has no IPv6")
    server.publish(HELLO)
    assert server.address == f"http://[::1]:{server.port}/metrics"
    assert server.is_loopback
    connection = http.client.HTTPConnection("::1", server.port, timeout=10)
    connection.request("GET", "/metrics")
    assert connection.getresponse().read() == b"hello\n"
    connection.close()
    server.close()


def test_an_address_that_cannot_be_had_is_named(page):
    with pytest.raises(SettingsError, match="in use; choose another, port 0 for any free one") as caught:
        PageServer(page.port)
    assert (caught.value.setting, caught.value.value) == ("prometheus_port", page.port)
    for host in ("192.0.2.1", "no.such.host.invalid", "x" * 80):
        with pytest.raises(SettingsError) as caught:
            PageServer(0, host=host)
        assert (caught.value.setting, caught.value.value) == ("prometheus_host", host)
    with pytest.raises(SettingsError) as caught:
        PageServer(70_000)
    assert caught.value.setting == "prometheus_port"


def test_a_closed_port_is_free_again(page):
    page.close()
    page.close()
    again = PageServer(page.port)
    again.close()
    assert not page._thread.is_alive()
    assert not again._thread.is_alive()


def test_a_forked_child_does_not_keep_the_port_nor_a_connection(page):
    kept = http.client.HTTPConnection("127.0.0.1", page.port, timeout=10)
    kept.request("GET", "/metrics")
    kept.getresponse().read()
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
        assert kept.sock.recv(1) == b""
        again = PageServer(page.port)
        again.publish(HELLO)
        assert ask(again)[0] == 200
        again.close()
    finally:
        kept.close()
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


def test_a_connection_is_kept_for_the_next_scrape(page):
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=10)
    sockets = set()
    for number in range(5):
        page.publish(Exposition(text=b"%d\n" % number))
        connection.request("GET", "/metrics")
        assert connection.getresponse().read() == b"%d\n" % number
        sockets.add(connection.sock.getsockname())
    assert len(sockets) == 1
    connection.close()


def test_a_hundred_scrapers_at_once_are_all_answered(page):
    body = b"x" * 300_000
    page.publish(Exposition(text=body))
    together = threading.Barrier(100)

    def scrape(_):
        connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=30)
        connection.connect()
        together.wait(30)
        found = []
        for _ in range(3):
            connection.request("GET", "/metrics")
            found.append(connection.getresponse().read() == body)
        connection.close()
        return all(found)

    with ThreadPoolExecutor(100) as pool:
        assert all(pool.map(scrape, range(100)))


def test_a_scrape_takes_no_memory_that_stays(page):
    page.publish(Exposition(text=b"x" * 200_000))
    for _ in range(20):
        ask(page)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(300):
        ask(page, Connection="close")
        ask(page, "/nowhere")
    deadline = time.monotonic() + 10
    while page._connections and time.monotonic() < deadline:
        time.sleep(0.01)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert not page._connections
    assert grown < 100_000, "less than one page, after 600 requests"


@pytest.fixture
def guarded(certificates, tmp_path):
    """A server with TLS that asks for a client's certificate and for a password."""
    auth = tmp_path / "auth"
    auth.write_text("bearer sesame\n")
    access = Access.load(
        certificate=certificates["server"],
        key=certificates["server_key"],
        client_ca=certificates["ca"],
        auth=str(auth),
    )
    server = PageServer(0, access=access)
    server.publish(Exposition(text=b"x" * 500_000))
    yield server
    server.close()


def client(certificates, name=None):
    context = ssl.create_default_context(cafile=certificates["ca"])
    if name is not None:
        context.load_cert_chain(certificates[name], certificates[f"{name}_key"])
    return context


def test_tls_with_certificates_of_clients_and_a_token(guarded, certificates):
    assert guarded.address.startswith("https://")
    known = client(certificates, "client")
    status, body, _ = ask(guarded, tls=known, Authorization="Bearer sesame")
    assert (status, body) == (200, b"x" * 500_000)
    assert ask(guarded, tls=known)[0] == 401
    for name in (None, "stranger"):
        with pytest.raises(OSError):  # TLS 1.3: the alert comes with the first read
            ask(guarded, tls=client(certificates, name), Authorization="Bearer sesame")
    with pytest.raises((OSError, http.client.HTTPException)):
        ask(guarded, Authorization="Bearer sesame")


def test_a_connection_is_kept_over_tls_too(guarded, certificates):
    connection = http.client.HTTPSConnection("127.0.0.1", guarded.port, context=client(certificates, "client"))
    for _ in range(3):
        connection.request("GET", "/metrics", headers={"Authorization": "Bearer sesame"})
        assert len(connection.getresponse().read()) == 500_000
    connection.close()


def test_a_certificate_and_a_token_are_renewed_while_it_serves(certificates, tmp_path):
    shown, auth = tmp_path / "both.pem", tmp_path / "auth"

    def issue(name, token):
        pem = "".join(Path(certificates[part]).read_text() for part in (name, f"{name}_key"))
        for path, text in ((shown, pem), (auth, f"bearer {token}\n")):
            path.with_suffix(".new").write_text(text)
            path.with_suffix(".new").replace(path)

    issue("server", "old")
    server = PageServer(0, access=Access.load(certificate=str(shown), auth=str(auth)))
    server.publish(HELLO)
    kept = http.client.HTTPSConnection("127.0.0.1", server.port, context=client(certificates))

    def ask_again(token):
        kept.request("GET", "/metrics", headers={"Authorization": f"Bearer {token}"})
        response = kept.getresponse()
        response.read()
        return response.status

    assert [ask_again("old"), ask_again("new")] == [200, 401]
    first = ssl.get_server_certificate(("127.0.0.1", server.port))
    issue("client", "new")
    assert [ask_again("old"), ask_again("new")] == [401, 200], "a connection that is kept"
    second = ssl.get_server_certificate(("127.0.0.1", server.port))
    assert ssl.PEM_cert_to_DER_cert(first) != ssl.PEM_cert_to_DER_cert(second)
    assert ask(server, tls=client(certificates), Authorization="Bearer new")[0] == 200
    kept.close()
    server.close()


def test_old_tls_is_refused(certificates):
    server = PageServer(0, access=Access.load(certificate=certificates["server"], key=certificates["server_key"]))
    old = client(certificates)
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(OSError):
        ask(server, tls=old)
    server.close()


def test_a_password_is_asked_for_without_tls_too(tmp_path):
    auth = tmp_path / "auth"
    auth.write_text("basic me:secret\n")
    server = PageServer(0, access=Access(credentials=Credentials.read(str(auth))))
    server.publish(HELLO)
    status, _, headers = ask(server)
    assert (status, headers["WWW-Authenticate"]) == (401, 'Basic realm="lm-telemetry", charset="UTF-8"')
    assert ask(server, Authorization="Basic bWU6c2VjcmV0")[:2] == (200, b"hello\n")
    server.close()
