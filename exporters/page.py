"""The page in every form a scraper may ask for: text or OpenMetrics, as it is or compressed.

Which one is said by the request's headers (RFC 9110, section 12.5). OpenMetrics goes to those who name it, in the
version that is served; a browser, `*/*` and who says nothing get the text format. A form is compressed once, and when
somebody has asked for it, at once with each page that follows: the compression then is the publisher's work, and a
scrape copies bytes.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from lm_telemetry.exporters.exposition import OPENMETRICS, TEXT, Exposition

if TYPE_CHECKING:
    from collections.abc import Iterator

_OPENMETRICS_TYPE = "application/openmetrics-text"
_OPENMETRICS_VERSIONS = ("1.0.0", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One form of the page."""

    body: bytes
    headers: dict[str, str]


class Page:
    """An exposition in its forms; `before` is the page that it takes the place of."""

    def __init__(self, exposition: Exposition, before: Page | None = None) -> None:
        self._exposition = exposition
        self._compressed: dict[bool, bytes] = {}
        for openmetrics in [] if before is None else list(before._compressed):
            self._compress(openmetrics=openmetrics)

    def form(self, accept: str, accept_encoding: str) -> Form:
        """The form that a request with these headers gets."""
        openmetrics = wants_openmetrics(accept)
        headers = {"Content_Type": OPENMETRICS if openmetrics else TEXT, "Vary": "Accept, Accept-Encoding"}
        if not takes_gzip(accept_encoding):
            return Form(body=self._plain(openmetrics=openmetrics), headers=headers)
        if openmetrics not in self._compressed:
            self._compress(openmetrics=openmetrics)
        return Form(body=self._compressed[openmetrics], headers={**headers, "Content_Encoding": "gzip"})

    def _plain(self, *, openmetrics: bool) -> bytes:
        return self._exposition.openmetrics if openmetrics else self._exposition.text

    def _compress(self, *, openmetrics: bool) -> None:
        self._compressed[openmetrics] = gzip.compress(self._plain(openmetrics=openmetrics), mtime=0)


@lru_cache(maxsize=64)
def wants_openmetrics(accept: str) -> bool:
    """Whether OpenMetrics is named, and not liked less than the text format."""
    openmetrics = text = 0.0
    for name, parameters in _items(accept):
        if name == _OPENMETRICS_TYPE and parameters.get("version", "") in _OPENMETRICS_VERSIONS:
            openmetrics = max(openmetrics, _weight(parameters))
        elif name == "text/plain":
            text = max(text, _weight(parameters))
    return openmetrics > 0 and openmetrics >= text


@lru_cache(maxsize=64)
def takes_gzip(accept_encoding: str) -> bool:
    """Whether gzip is named, or everything, and not ruled out."""
    weights = {name: _weight(parameters) for name, parameters in _items(accept_encoding)}
    return weights.get("gzip", weights.get("*", 0.0)) > 0


def _items(header: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Names of a list and their parameters, in lower case."""
    for item in header.lower().split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        pairs = (parameter.partition("=") for parameter in parameters)
        yield name, {key.strip(): value.strip(' "') for key, _, value in pairs}


def _weight(parameters: dict[str, str]) -> float:
    try:
        return float(parameters.get("q", "1"))
    except ValueError:
        return 0.0
