"""Which form of the page a request gets, and that forms are made once."""

import gzip

import pytest
from prometheus_client.exposition import choose_encoder

from lm_telemetry.exporters import page as page_module
from lm_telemetry.exporters.exposition import OPENMETRICS, TEXT, Exposition
from lm_telemetry.exporters.page import Page, takes_gzip, wants_openmetrics


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        ("", False),
        ("*/*", False),
        ("text/html,application/xhtml+xml,*/*;q=0.8", False),
        ("text/plain;version=0.0.4", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text; version=1.0.0", True),
        ('Application/OpenMetrics-Text; Version="1.0.0"; charset=utf-8', True),
        ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", True),
        ("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;q=0.3,*/*;q=0.2", True),
    ],
)
def test_negotiation_agrees_with_prometheus_client(accept, openmetrics):
    assert wants_openmetrics(accept) == openmetrics
    assert choose_encoder(accept.lower().replace('"', ""))[1].startswith("application/openmetrics") == openmetrics


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text;q=0",
        "application/openmetrics-text;q=0.3,text/plain;q=0.9",
        "application/openmetrics-text;version=0.0.1",
        "application/openmetrics-text;version=2.0.0",
        "application/openmetrics-text;q=often",
        ";;,,==",
    ],
)
def test_who_cannot_take_openmetrics_gets_text(accept):
    assert not wants_openmetrics(accept)


@pytest.mark.parametrize(
    ("encoding", "compressed"),
    [("", False), ("gzip", True), ("br, GZIP;q=0.5", True), ("gzip;q=0, *", False), ("*", True), ("identity", False)],
)
def test_compression(encoding, compressed):
    assert takes_gzip(encoding) == compressed


def test_each_form_is_compressed_once_and_then_with_each_page(monkeypatch):
    made = []
    monkeypatch.setattr(page_module.gzip, "compress", lambda body, **_: made.append(body) or b"small")
    first = Page(Exposition(text=b"1", openmetrics=b"1o"))
    assert first.form("", "").body == b"1"
    assert made == []
    assert [first.form("", "gzip").body for _ in range(3)] == [b"small"] * 3
    assert made == [b"1"]
    second = Page(Exposition(text=b"2", openmetrics=b"2o"), before=first)
    assert made == [b"1", b"2"]
    second.form("", "gzip")
    second.form("application/openmetrics-text", "gzip")
    assert made == [b"1", b"2", b"2o"]


def test_the_forms():
    page = Page(Exposition(text=b"t" * 1000, openmetrics=b"o" * 1000))
    plain, small = page.form("", ""), page.form("application/openmetrics-text", "gzip")
    assert (plain.body, plain.headers["Content_Type"]) == (b"t" * 1000, TEXT)
    assert (gzip.decompress(small.body), small.headers["Content_Type"]) == (b"o" * 1000, OPENMETRICS)
    assert len(small.body) < 100
    assert "Content_Encoding" not in plain.headers
