"""The view of what telemetry costs, on planted rows whose answers are known."""

from __future__ import annotations

from functools import partial

import planted
import pytest
from planted import by

approx = pytest.approx
LANCZOS = {"operator": "hessian", "estimator": "lanczos"}


@pytest.fixture
def plant(store):
    return partial(planted.plant, store)


@pytest.fixture
def ask(store):
    return partial(planted.ask, store)


def chosen(rows, *columns):
    return {part: tuple(row[c] for c in columns) for part, row in rows.items()}


def took(step, instrument, seconds, captures=None, every=None):
    return {"step": step, "instrument": instrument, "seconds": seconds, "captures": captures, "every": every}


def test_cost_by_instrument_against_the_budget(plant, ask):
    plant("runs", [{"step": 0, "max_overhead": 0.01}])
    plant("steps", [{"step": s, "seconds": 2.0, "telemetry_seconds": 0.015} for s in range(1, 6)])
    plant("overhead", [took(1, "attention", 0.01, 1, 10), took(1, "agent", 0.005)])
    plant("overhead", [took(4, "attention", 0.002, 1, 10), took(4, "sharpness", 0.033, 0, 4), took(4, "agent", 0.01)])
    plant("curvature", [{"step": 4, "seconds": 0.5} | LANCZOS])  # within `sharpness`, and not told twice
    plant("head_effects", [{"step": 4, "seconds": 0.5}])
    found = by(ask("FROM cost"), "part")
    assert list(found) == ["all", "sharpness", "agent", "attention"]
    assert chosen(found, "steps", "captures", "every", "first_step", "last_step") == {
        "all": (5, None, None, 1, 5),
        "attention": (2, 2, 10, 1, 4),
        "sharpness": (1, 0, 4, 4, 4),
        "agent": (2, None, None, 1, 4),
    }
    assert chosen(found, "telemetry_seconds", "share", "worst_seconds", "budget_share", "is_over") == {
        "all": (approx(0.075), approx(0.0075), 0.015, approx(0.75), False),
        "attention": (approx(0.012), approx(0.0012), 0.01, approx(0.12), False),
        "sharpness": (0.033, approx(0.0033), 0.033, approx(0.33), False),
        "agent": (approx(0.015), approx(0.0015), 0.01, approx(0.15), False),
    }
    assert chosen(found, "run_seconds", "max_overhead") == dict.fromkeys(found, (10.0, 0.01))


def test_an_instrument_may_exceed_the_budget_alone(plant, ask):
    plant("runs", [{"step": 0, "max_overhead": 0.01}])
    plant("steps", [{"step": 1, "seconds": 1.0, "telemetry_seconds": 0.03}])
    plant("overhead", [took(1, "attention", 0.005, 1, 1), took(1, "sharpness", 0.025, 1, 1)])
    found = by(ask("FROM cost"), "part")
    assert chosen(found, "is_over") == {"all": (True,), "sharpness": (True,), "attention": (False,)}


def test_a_launch_without_these_rows_is_told_by_what_times_itself(plant, ask):
    """A run that was resumed by a version that has them: each launch has its own parts, and what was overtaken none."""
    plant("steps", [{"step": s, "seconds": 2.0, "telemetry_seconds": 0.5} for s in (1, 2, 3)])
    plant("curvature", [{"step": s, "seconds": 0.25} | LANCZOS for s in (1, 3)])
    plant("steps", [{"step": s, "seconds": 2.0, "telemetry_seconds": 0.5} for s in (3, 4)], attempt=1)
    plant("overhead", [took(s, "sharpness", 0.125, 1, 5) for s in (3, 4)], attempt=1)
    plant("curvature", [{"step": 3, "seconds": 0.1} | LANCZOS], attempt=1)
    plant("steps", [{"step": 4, "seconds": 2.0, "telemetry_seconds": 0.5}], attempt=2)
    plant("overhead", [took(4, "sharpness", 0.5, 1, 7)], attempt=2)
    plant("curvature", [{"step": 3, "seconds": 0.25} | LANCZOS], rank=1, attempt=1)  # of a rank that has none
    found = by(ask("FROM cost"), "rank", "part")
    assert chosen(found, "steps", "captures", "every", "telemetry_seconds", "worst_seconds") == {
        (0, "all"): (4, None, None, 2.0, 0.5),
        (0, "sharpness"): (2, 2, 7, 0.625, 0.5),
        (0, "hessian lanczos"): (1, 1, None, 0.25, 0.25),
        (1, "hessian lanczos"): (1, 1, None, 0.25, 0.25),
    }


def test_cost_by_part_against_the_budget(plant, ask):
    plant("runs", [{"step": 0, "max_overhead": 0.5}])
    plant("runs", [{"step": 2, "max_overhead": 0.01}], attempt=1)
    for rank, seconds in ((0, 0.04), (1, 0.02)):
        plant("steps", [{"step": s, "seconds": 2.0, "telemetry_seconds": seconds} for s in (1, 2)], rank=rank)
        plant("steps", [{"step": 2, "seconds": 2.0, "telemetry_seconds": seconds / 4}], rank=rank, attempt=1)
    plant(
        "curvature", [{"step": 1, "index": i, "seconds": s} | LANCZOS for i, s in ((0, 0.01), (1, None), (-1, 0.005))]
    )
    plant("curvature", [{"step": 2, "index": 0, "seconds": 9.0} | LANCZOS])  # taken again
    plant("spectra", [{"step": 1, "operator": "hessian", "estimator": "slq", "seconds": 0.003}])
    plant("head_effects", [{"step": 1, "head": h, "seconds": 0.002} for h in range(4)])
    found = by(ask("FROM cost"), "rank", "part")
    assert list(found) == [(0, "all"), (0, "hessian lanczos"), (0, "hessian slq"), (0, "knock_out"), (1, "all")]
    columns = ("steps", "captures", "first_step", "last_step", "telemetry_seconds", "run_seconds", "share")
    assert chosen(found, *columns, "worst_seconds", "is_over") == {
        (0, "all"): (2, None, 1, 2, approx(0.05), 4.0, approx(0.0125), 0.04, True),
        (0, "hessian lanczos"): (1, 1, 1, 1, approx(0.015), 4.0, approx(0.00375), approx(0.015), False),
        (0, "hessian slq"): (1, 1, 1, 1, 0.003, 4.0, approx(0.00075), 0.003, False),
        (0, "knock_out"): (1, 1, 1, 1, 0.002, 4.0, approx(0.0005), 0.002, False),
        (1, "all"): (2, None, 1, 2, approx(0.025), 4.0, approx(0.00625), 0.02, False),
    }
    assert {row["max_overhead"] for row in found.values()} == {0.01}


def test_cost_of_steps_without_times(plant, ask):
    plant("steps", [{"step": 1, "loss": 1.0}], run_id="untimed")
    plant("steps", [{"step": 1, "seconds": 0.0, "telemetry_seconds": 0.0}], run_id="instant")
    for row in ask("FROM cost"):
        assert (row["part"], row["steps"], row["share"], row["is_over"]) == ("all", 1, None, None)
