"""Real parts that a test needs: a browser, a Prometheus, a compiler."""

from __future__ import annotations

import os

import pytest


def missing(what: str) -> None:
    """A real part is not there: a failure under CI, elsewhere a skip that says so."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing, and CI must not skip")
    pytest.skip(f"{what} is missing")
