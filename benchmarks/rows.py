"""Benchmark rows: one CSV a benchmark, each row with the hardware, versions and commit it came from."""

from __future__ import annotations

import csv
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def append(benchmark: str, row: dict[str, Any]) -> None:
    """Add a row to `results/<benchmark>.csv`."""
    path = RESULTS / f"{benchmark}.csv"
    full = {**row, **where()}
    RESULTS.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(full), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(full)


def where() -> dict[str, str]:
    """Date, commit, hardware and versions."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit.stdout.strip() or "unknown",
        "hardware": _hardware(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def _hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
