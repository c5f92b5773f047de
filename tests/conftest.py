"""Shared by all tests: quiet, deterministic, offline, and nothing of a developer's own settings."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
for name in [n for n in os.environ if n.startswith("LM_TELEMETRY_")]:
    del os.environ[name]

import pytest  # noqa: E402 after the environment is set


@pytest.fixture
def store(tmp_path):
    return str(tmp_path / "store")
