"""Programs of child processes that a compaction kills: at a chosen one of the changes that it makes to files."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

import pyarrow as pa

from lm_telemetry.compaction import compact
from lm_telemetry.store import Store

if TYPE_CHECKING:
    from pathlib import Path

pa.array([0])  # imported once, in the server that the children are forked from

CHANGES = frozenset({"os.link", "os.mkdir", "os.remove", "os.rename"})
"""Audit events of calls that change a directory, raised before they do."""


def compact_and_die(path: Path, change: int, grace_seconds: float) -> None:
    """Compact rank 0 of run `r`; end by SIGKILL before this change to a directory, or normally if there are fewer."""
    left = change

    def count(event: str, _: tuple[object, ...]) -> None:
        nonlocal left
        if event in CHANGES:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    compact(Store(path), "r", 0, grace_seconds=grace_seconds)
