"""Which rank this is, and one name of the run for all of them.

Rank 0 makes the name and claims the attempt; the others read them from the key-value store that torch.distributed has
open anyway. That is no collective operation: a rank without telemetry, or one that comes late, cannot make the others
hang. Who gets no answer in time names a run of its own, and an event says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from lm_telemetry.run import Placement, placement

if TYPE_CHECKING:
    from collections.abc import Callable

ANSWER_SECONDS = 60.0
"""How long a rank waits for the name that rank 0 makes."""

_launches = count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One rank of one attempt of one run."""

    run_id: str
    attempt: int
    place: Placement
    problem: str | None = None
    """Why the name is not shared by all ranks; None if it is."""


def here() -> Placement:
    """Rank, local rank and world size of this process, from torch.distributed if it is up, else the environment."""
    found = placement()
    if dist.is_available() and dist.is_initialized():
        return Placement(rank=dist.get_rank(), local_rank=found.local_rank, world_size=dist.get_world_size())
    return found


def identify(name: Callable[[], str], claim: Callable[[str], int]) -> Identity:
    """The run's identity: `name` makes its name, `claim` takes the number of the attempt; on rank 0 only."""
    place = here()
    problem = None
    if place.world_size > 1:
        key = f"lm_telemetry/identity/{next(_launches)}"
        store = _shared_store()
        if store is None:
            problem = "torch.distributed was not initialised when telemetry was attached"
        elif place.rank == 0:
            run_id = name()
            attempt = claim(run_id)
            store.set(key, json.dumps([run_id, attempt]))
            return Identity(run_id=run_id, attempt=attempt, place=place)
        else:
            try:
                store.wait([key], timedelta(seconds=ANSWER_SECONDS))
                run_id, attempt = json.loads(store.get(key))
                return Identity(run_id=run_id, attempt=attempt, place=place)
            except (RuntimeError, ValueError) as error:  # DistStoreError is a RuntimeError
                problem = f"rank 0 did not name the run within {ANSWER_SECONDS:.0f} s: {error}"
    run_id = name()
    return Identity(run_id=run_id, attempt=claim(run_id), place=place, problem=problem)


def _shared_store() -> Any:
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.distributed_c10d._get_default_store()
