"""Requests and their answers, as bytes, without a socket."""

import gzip
import http.client
import io
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm_telemetry.exporters.access import Credentials
from lm_telemetry.exporters.exposition import Exposition
from lm_telemetry.exporters.page import Page
from lm_telemetry.exporters.request import HEAD_LIMIT, LINE_LIMIT, answer

PAGE = Page(Exposition(text=b"up 1\n", openmetrics=b"up 1\n# EOF\n"))


def ask(text, page=PAGE, credentials=None):
    return answer(text if isinstance(text, bytes) else text.replace("\n", "\r\n").encode(), page, credentials)


def read(found, method="GET"):
    """The answer as http.client reads it."""

    class Wire:
        def makefile(self, *_):
            return io.BytesIO(found.head + found.body)

    response = http.client.HTTPResponse(Wire(), method=method)
    response.begin()
    return response.status, response.read(), response.headers


def test_the_page():
    found = ask("GET /metrics HTTP/1.1\nHost: x\n\n")
    status, body, headers = read(found)
    assert (status, body, found.keep) == (200, b"up 1\n", True)
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert headers["Vary"] == "Accept, Accept-Encoding"
    assert "Connection" not in headers
    assert abs(time.time() - time.mktime(time.strptime(headers["Date"], "%a, %d %b %Y %H:%M:%S GMT"))) < 86400


def test_what_prometheus_sends_gets_openmetrics_compressed():
    found = ask(
        "GET /metrics HTTP/1.1\nHost: x\nUser-Agent: Prometheus/2.42.0\nAccept-Encoding: gzip\nAccept:"
        " application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
        "text/plain;version=0.0.4;q=0.5,*/*;q=0.1\nX-Prometheus-Scrape-Timeout-Seconds: 10\n\n"
    )
    _, body, headers = read(found)
    assert gzip.decompress(body) == b"up 1\n# EOF\n"
    assert headers["Content-Encoding"] == "gzip"
    assert headers["Content-Type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"


def test_head_is_get_without_the_body():
    whole = read(ask("GET /metrics HTTP/1.1\nHost: x\n\n"))
    head = ask("HEAD /metrics HTTP/1.1\nHost: x\n\n")
    assert head.body == b""
    assert head.keep
    assert read(head, "HEAD")[2]["Content-Length"] == whole[2]["Content-Length"] == "5"


def test_the_front_page_leads_to_the_metrics():
    status, body, headers = read(ask("GET / HTTP/1.1\nHost: x\n\n"))
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b'<a href="/metrics">' in body


@pytest.mark.parametrize("target", ["/metrics?debug=1", "http://127.0.0.1:9108/metrics", "http://x/metrics?a#b"])
def test_other_ways_to_name_the_page(target):
    assert read(ask(f"GET {target} HTTP/1.1\nHost: x\n\n"))[0] == 200


@pytest.mark.parametrize("target", ["/metrics/", "/../etc/passwd", "/favicon.ico", "*", "metrics", "/%6detrics"])
def test_other_paths_are_not_found(target):
    found = ask(f"GET {target} HTTP/1.1\nHost: x\n\n")
    assert (read(found)[0], found.keep) == (404, True)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW"])
def test_other_methods_are_refused(method):
    status, body, headers = read(ask(f"{method} /metrics HTTP/1.1\nHost: x\n\n"))
    assert (status, headers["Allow"], headers["Connection"]) == (405, "GET, HEAD", "close")
    assert body == b"there are only GET and HEAD\n"


@pytest.mark.parametrize(
    "text",
    [
        "GET\n\n",
        "GET /metrics\n\n",
        "GET  /metrics HTTP/1.1\nHost: x\n\n",
        "GET /met rics HTTP/1.1\nHost: x\n\n",
        "GET /metrics HTTP/1.1\n\n",
        "GET /metrics HTTP/1.1\nHost x\n\n",
        "GET /metrics HTTP/1.1\nHost : x\n\n",
        "GET /metrics HTTP/1.1\nHost: x\n folded: y\n\n",
        "GET /metrics HTTP/1.1\nHost: x\nX: a\rb\n\n",
        "GET /metrics HTTP/1.1\nHost: x\nX: a\0b\n\n",
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"\r\n\r\n",
        "GET /m\u00e9trics HTTP/1.1\nHost: x\n\n",
        f"{'G' * 33} /metrics HTTP/1.1\nHost: x\n\n",
    ],
    ids=repr,
)
def test_what_is_malformed_is_refused(text):
    found = ask(text)
    assert (read(found)[0], found.keep) == (400, False)


@pytest.mark.parametrize("version", ["0.9", "2.0", "3.0"])
def test_other_versions_are_refused(version):
    assert read(ask(f"GET /metrics HTTP/{version}\nHost: x\n\n"))[0] == 505


def test_limits():
    long = "x" * LINE_LIMIT
    assert ask("GET /" + long[:100]) is None
    assert read(ask(f"GET /{long}"))[0] == 414
    assert read(ask(f"GET /{long} HTTP/1.1\nHost: x\n\n"))[0] == 414
    assert ask("GET /metrics HTTP/1.1\nHost: x\nX: " + "y" * 100) is None
    assert read(ask("GET /metrics HTTP/1.1\nHost: x\nX: " + "y" * HEAD_LIMIT))[0] == 431
    assert read(ask("GET /metrics HTTP/1.1\n" + "X: y\n" * (HEAD_LIMIT // 5)))[0] == 431
    began = time.perf_counter()
    assert read(ask("GET /metrics HTTP/1.1\nHost: x\nX:" + " " * 8000 + "\0\n\n"))[0] == 400
    assert time.perf_counter() - began < 1, "no backtracking"


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("GET /metrics HTTP/1.1\nHost: x\nConnection: keep-alive\n\n", True),
        ("GET /metrics HTTP/1.1\nHost: x\nConnection: Close\n\n", False),
        ("GET /metrics HTTP/1.0\n\n", False),
        # What follows is not understood, so it is not taken for a request.
        ("GET /metrics HTTP/1.1\nHost: x\nContent-Length: 3\n\n", False),
        ("GET /metrics HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\n\n", False),
        ("GET /metrics HTTP/1.1\nHost: x\n\nGET /metrics HTTP/1.1\nHost: x\n\n", False),
    ],
)
def test_when_a_connection_goes_on(text, keep):
    found = ask(text)
    status, body, headers = read(found)
    assert (status, body, found.keep) == (200, b"up 1\n", keep)
    assert headers.get("Connection") == (None if keep else "close")


def test_a_line_may_end_in_a_line_feed_alone():
    assert read(ask(b"GET /metrics HTTP/1.1\nHost: x\n\n"))[0] == 200


@pytest.mark.parametrize("target", ["/metrics", "/", "/nothing"])
def test_nothing_is_told_to_strangers(tmp_path, target):
    path = tmp_path / "auth"
    path.write_text("bearer sesame\nbasic me:pw\n")
    credentials = Credentials.read(str(path))
    for line in ("", "Authorization: Bearer sesam\n", "Authorization: Bearer sesame\nAuthorization: x\n"):
        found = ask(f"GET {target} HTTP/1.1\nHost: x\n{line}\n", credentials=credentials)
        status, body, headers = read(found)
        assert (status, body) == (401, b"credentials were expected\n")
        assert headers["WWW-Authenticate"].startswith("Basic realm=")
    found = ask(f"GET {target} HTTP/1.1\nHost: x\nAuthorization: Bearer sesame\n\n", credentials=credentials)
    assert read(found)[0] in {200, 404}


REQUEST = b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: */*;q=x\r\n\r\n"


@given(st.one_of(st.binary(max_size=300), st.tuples(st.integers(0, len(REQUEST)), st.binary(max_size=20))))
def test_whatever_is_sent_is_answered_refused_or_waited_for(sent):
    if isinstance(sent, tuple):
        sent = REQUEST[: sent[0]] + sent[1] + REQUEST[sent[0] :]
    found = answer(sent, PAGE, None)
    if found is not None:
        assert read(found)[0] in {200, 400, 404, 405, 505}


@given(st.integers(1, len(REQUEST) - 1))
def test_a_request_may_come_in_pieces(cut):
    assert answer(REQUEST[:cut], PAGE, None) is None
    assert answer(REQUEST, PAGE, None).keep
