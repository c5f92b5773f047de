"""Shared by all tests: quiet, deterministic, offline, and nothing of a developer's own settings."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["WANDB_MODE"] = "offline"
for name in [n for n in os.environ if n.startswith("LM_TELEMETRY_")]:
    del os.environ[name]

import pytest


def missing(what: str) -> None:
    """A real part is not there: a failure under CI, elsewhere a skip that says so."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing, and CI must not skip")
    pytest.skip(f"{what} is missing")


@pytest.fixture
def store(tmp_path):
    return str(tmp_path / "store")
