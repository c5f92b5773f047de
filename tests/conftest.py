"""Shared by all tests: quiet, deterministic, offline, and nothing of a developer's own settings."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores; a tiny model has no use for more than one
    os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [n for n in os.environ if n.startswith("LM_TELEMETRY_")]:
    del os.environ[name]
for name in ("COLUMNS", "LINES"):  # a box is as wide as its table where there is no terminal; workers of xdist have 80
    os.environ.pop(name, None)

import pytest  # noqa: E402 after the environment is set


@pytest.fixture
def store(tmp_path):
    return str(tmp_path / "store")
