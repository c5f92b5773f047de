"""Who a run is: its name, its rank, and what it ran on. No torch here.

A run's name is made by one rank and told to the others (`ranks`): what launchers put into the environment
(`TORCHELASTIC_RUN_ID`, `MASTER_PORT`) repeats from launch to launch, so no rank could derive a unique one by itself.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import socket
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lm_telemetry.errors import SettingsError

PACKAGES = ("lm-telemetry", "torch", "transformers", "accelerate", "triton", "numpy", "pyarrow", "peft", "trl")
"""Distributions whose versions are recorded with a run."""

_HEADS = re.compile(r"(For[A-Z]|Model$|LMHead|PreTrained)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where this process stands among those of its job."""

    rank: int
    local_rank: int
    world_size: int


def new_run_id(model_class: str | None = None) -> str:
    """A readable unique name: `llama-20261124-063012-9f3c`, with the model's family, UTC time and 16 random bits.

    >>> new_run_id("LlamaForCausalLM")  # doctest: +SKIP
    'llama-20261124-063012-9f3c'
    """
    family = _HEADS.split(model_class or "", maxsplit=1)[0]
    word = re.sub(r"[^a-z0-9]+", "", family.lower())[:40] or "run"
    return f"{word}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def placement() -> Placement:
    """Rank, local rank and world size as torchrun, accelerate and DeepSpeed set them; alone without them.

    Raises:
        SettingsError: a variable is set and is not a number that makes sense.
    """
    rank = _number("RANK", 0)
    found = Placement(
        rank=rank, local_rank=_number("LOCAL_RANK", rank), world_size=_number("WORLD_SIZE", max(1, rank + 1))
    )
    if found.rank >= found.world_size:
        raise SettingsError(
            f"RANK must be below WORLD_SIZE; got {found.rank} of {found.world_size}; unset both or use torchrun",
            setting="RANK",
            value=found.rank,
        )
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of those of `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The host: name, operating system, architecture, cores (of the machine, and open to this process), memory."""
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory(),
    }


def code_sha256() -> str | None:
    """SHA-256 of the script that was started; None in a notebook, a REPL, or where it cannot be read."""
    script = Path(sys.argv[0]) if sys.argv and sys.argv[0] else None
    try:
        return hashlib.sha256(script.read_bytes()).hexdigest() if script and script.is_file() else None
    except OSError:
        return None


def _number(variable: str, default: int) -> int:
    given = os.environ.get(variable, "")
    if not given:
        return default
    if not given.isdecimal():
        raise SettingsError(
            f"the environment variable {variable} must be a whole number, 0 or more; got {given!r}",
            setting=variable,
            value=given,
        )
    return int(given)


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
