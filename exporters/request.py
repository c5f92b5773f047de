"""One HTTP request, from bytes to the bytes of its answer; who may ask is `access`'s to say, what is shown `page`'s.

Just enough of HTTP/1.1 (RFC 9112) for what scrapers and browsers send: GET and HEAD without a body, kept-alive
connections. Everything else is refused with the status that fits, and then the connection ends, so that what follows a
request we did not understand is never taken for another.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from lm_telemetry.exporters.access import Credentials
    from lm_telemetry.exporters.page import Page

PATH = "/metrics"
LINE_LIMIT = 2048
"""Bytes of the request line."""
HEAD_LIMIT = 8192
"""Bytes of the request line and all headers."""

_HOME = f'<!doctype html><title>lm-telemetry</title><h1>lm-telemetry</h1><p><a href="{PATH}">Metrics</a>\n'.encode()
_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([!-~]+) HTTP/(\d)\.(\d)")
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What goes back: the head, the body, and whether the connection goes on."""

    head: bytes
    body: bytes
    keep: bool


class _Refusal(Exception):  # noqa: N818 it is an answer, not an error of ours
    def __init__(self, status: HTTPStatus, advice: str, **headers: str) -> None:
        super().__init__(advice)
        self.status, self.advice, self.headers = status, advice, headers


def answer(received: bytes, page: Page, credentials: Credentials | None) -> Answer | None:
    """The answer to what a client has sent so far; None if more has to come.

    Args:
        received: bytes of one request, at most `HEAD_LIMIT` and one read more.
        page: what is shown at `/metrics`.
        credentials: who may ask; None for anybody.
    """
    method = b""
    try:
        head = _head(received)
        if head is None:
            return None
        method = head.partition(b" ")[0]
        return _answer(head, page, credentials, alone=len(head) == len(received))
    except _Refusal as refusal:
        return _compose(
            refusal.status, f"{refusal.advice}\n".encode(), with_body=method != b"HEAD", keep=False, **refusal.headers
        )


def _head(received: bytes) -> bytes | None:
    """The request's head with the empty line at its end; None if that has not come yet."""
    end = re.search(rb"\r?\n\r?\n", received)
    if b"\n" not in received[: LINE_LIMIT + 2] and len(received) > LINE_LIMIT:
        raise _Refusal(HTTPStatus.REQUEST_URI_TOO_LONG, f"the request line may have {LINE_LIMIT} bytes")
    if (end.end() if end else len(received)) > HEAD_LIMIT:
        raise _Refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the headers may have {HEAD_LIMIT} bytes")
    first = received.split(b"\n", 1)[0].rstrip(b"\r").decode("latin-1")
    if b"\n" in received and not _LINE.fullmatch(first):
        raise _Refusal(HTTPStatus.BAD_REQUEST, "a request line of HTTP/1.1 was expected")
    return received[: end.end()] if end else None


def _answer(head: bytes, page: Page, credentials: Credentials | None, *, alone: bool) -> Answer:
    lines = [line.rstrip("\r") for line in head.decode("latin-1").split("\n")]
    line = _LINE.fullmatch(lines[0])
    assert line is not None, "see _head"
    method, target, major, minor = line.groups()
    if major != "1":
        raise _Refusal(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "HTTP/1.1 is spoken here")
    headers = _headers(lines[1:-2])
    if minor != "0" and "host" not in headers:
        raise _Refusal(HTTPStatus.BAD_REQUEST, "a Host header was expected")
    if credentials is not None and not credentials.admit(headers.get("authorization", "")):
        challenge = {"WWW_Authenticate": credentials.challenge}
        raise _Refusal(HTTPStatus.UNAUTHORIZED, "credentials were expected", **challenge)
    if method not in {"GET", "HEAD"}:
        raise _Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "there are only GET and HEAD", Allow="GET, HEAD")
    keep = (
        alone
        and minor != "0"
        and "close" not in headers.get("connection", "").lower()
        and headers.get("content-length", "0") == "0"
        and "transfer-encoding" not in headers
    )
    with_body = method == "GET"
    path = urlsplit(target).path if target.startswith(("http://", "https://")) else target.partition("?")[0]
    if path == PATH:
        form = page.form(headers.get("accept", ""), headers.get("accept-encoding", ""))
        return _compose(HTTPStatus.OK, form.body, with_body=with_body, keep=keep, **form.headers)
    if path == "/":
        return _compose(HTTPStatus.OK, _HOME, with_body=with_body, keep=keep, Content_Type="text/html; charset=utf-8")
    return _compose(HTTPStatus.NOT_FOUND, f"there is only {PATH}\n".encode(), with_body=with_body, keep=keep)


def _headers(lines: list[str]) -> dict[str, str]:
    """Header values by name in lower case; of one that comes twice, both, as a list."""
    headers: dict[str, str] = {}
    for line in lines:
        found = _HEADER.fullmatch(line)
        if found is None:
            raise _Refusal(HTTPStatus.BAD_REQUEST, "a header of the form `Name: value` was expected")
        name, value = found[1].lower(), found[2].strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _compose(status: HTTPStatus, body: bytes, *, with_body: bool, keep: bool, **headers: str) -> Answer:
    headers = {
        "Content_Type": "text/plain; charset=utf-8",
        **headers,
        "Content_Length": str(len(body)),
        "Date": formatdate(usegmt=True),
        "Server": "lm-telemetry",
        "X_Content_Type_Options": "nosniff",
        **({} if keep else {"Connection": "close"}),
    }
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\n{lines}\r\n".encode("latin-1")
    return Answer(head=head, body=body if with_body else b"", keep=keep)
