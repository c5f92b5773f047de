"""`lmt diff`: settings that differ, losses at equal steps, and where they part."""

import json
import math
import random

import pytest
from planted import plant

from lm_telemetry.cli import diff, main
from lm_telemetry.store import Store

STEPS = 200


@pytest.fixture
def store(tmp_path):
    return Store.open_for_writing(tmp_path / "store")


@pytest.fixture
def compare(store, capsys):
    def run(a="a", b="b"):
        assert main(["diff", a, b, "--format", "json", "--store", str(store.path)]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def train(store, run_id, losses, **described):
    rows = [{"step": s, "loss": loss, "tokens": 10, "seconds": 0.5} for s, loss in enumerate(losses, 1)]
    plant(store, "steps", rows, run_id=run_id)
    plant(store, "runs", [{"step": 0, **described}], run_id=run_id)


def course(seed, noise=0.05):
    noises = random.Random(seed)
    return [2 + 2 / math.sqrt(s) + noises.gauss(0, noise) for s in range(1, STEPS + 1)]


def test_only_settings_that_differ_are_shown_json_by_its_fields(store, compare):
    same = {"optimizer": "AdamW", "n_parameters": 7}
    train(store, "a", [1.0], **same, optimizer_settings='{"lr": 0.1, "betas": [0.9, 0.99]}', config_sha256="a" * 64)
    train(store, "b", [1.0], **same, optimizer_settings='{"lr": 0.2, "betas": [0.9, 0.99], "new": null}', dtype="bf16")
    found = {s["setting"]: (s["a"], s["b"]) for s in compare()["settings"]}
    assert found == {"optimizer_settings.lr": (0.1, 0.2), "config_sha256": ("a" * 64, None), "dtype": (None, "bf16")}


def test_the_last_launch_is_what_is_compared(store, compare):
    train(store, "a", [1.0], optimizer="SGD")
    train(store, "b", [1.0], optimizer="AdamW")
    plant(store, "runs", [{"step": 0, "optimizer": "AdamW"}], run_id="a", attempt=1)
    assert compare()["settings"] == []


def test_equal_runs_are_equal_to_the_last_bit(store, compare):
    for run_id in "ab":
        train(store, run_id, [math.nan, *course(0)])
    assert compare()["departure"] == {
        "matched_steps": STEPS + 1,
        "first_unequal_step": None,
        "departed_by_step": None,
    }


def test_one_bit_is_a_difference_and_no_departure(store, compare):
    losses = course(0)
    train(store, "a", losses)
    train(store, "b", [*losses[:99], math.nextafter(losses[99], 9), *losses[100:]])
    found = compare()["departure"]
    assert (found["first_unequal_step"], found["departed_by_step"]) == (100, None)


def test_noise_alone_is_no_departure():
    for seed in range(200):
        assert depart(course(2 * seed), course(2 * seed + 1)).departed_by_step is None


def test_a_planted_departure_is_found_within_a_window():
    for seed in range(20):
        jump = [loss + (0.3 if s > 100 else 0) for s, loss in enumerate(course(2 * seed), 1)]
        assert 100 < depart(jump, course(2 * seed + 1)).departed_by_step <= 100 + diff.WINDOW


def test_equal_up_to_a_step_and_then_apart():
    losses = course(0)
    found = depart(losses, [loss + (0.01 if s > 100 else 0) for s, loss in enumerate(losses, 1)])
    assert found.first_unequal_step == 101
    assert 101 <= found.departed_by_step <= 100 + diff.WINDOW


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_loss_that_is_not_finite_is_a_departure_at_once(value):
    losses = course(0)
    assert depart(losses, [*losses[:49], value, *losses[50:]]).departed_by_step == 50


def test_a_departure_has_to_last():
    losses = course(0)
    brief = [loss + (0.5 if 100 < s <= 105 else 0) for s, loss in enumerate(losses, 1)]
    assert depart(losses, brief).departed_by_step is None


def depart(a, b):
    """The departure of two courses, their windows computed by the definition."""
    rows = []
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        recent = [p - q for p, q in zip(a, b, strict=True)][max(0, i - diff.WINDOW + 1) : i + 1]
        recent = [d for d in recent if math.isfinite(d)]
        mean = sum(recent) / len(recent) if recent else None
        spread = math.sqrt(sum((d - mean) ** 2 for d in recent) / (len(recent) - 1)) if len(recent) > 1 else None
        stderr = None if spread is None else spread / math.sqrt(len(recent))
        rows.append({"step": i + 1, "loss_a": x, "loss_b": y, "smoothed_difference": mean, "stderr": stderr})
    return diff.departure(rows)


def test_the_windows_in_sql_are_those_of_the_definition(store, compare):
    a, b = course(0), course(1)
    b[30] = math.nan
    train(store, "a", a)
    train(store, "b", b)
    differences = [x - y for x, y in zip(a, b, strict=True)]
    for row in compare()["steps"]:
        i = row["step"] - 1
        recent = [d for d in differences[max(0, i - diff.WINDOW + 1) : i + 1] if math.isfinite(d)]
        assert row["n"] == len(recent)
        assert row["smoothed_difference"] == pytest.approx(sum(recent) / len(recent), abs=1e-12)


def test_ends_are_told(store, compare):
    train(store, "a", [3.0] * 30 + [2.0] * 20)
    train(store, "b", [3.0, 1.0])
    final = compare()["final"]
    a = {"steps": 50, "last_step": 50, "last_loss": 2.0, "mean_of_last_losses": 2.0, "lowest_loss": 2.0}
    assert final["a"] == a | {"tokens": 500, "seconds": 25.0}
    assert (final["b"]["last_step"], final["b"]["mean_of_last_losses"]) == (2, 2.0)


def test_people_get_boxes_and_a_sentence(store, capsys):
    train(store, "a", course(0), optimizer="SGD")
    train(store, "b", [loss + 1 for loss in course(1)], optimizer="AdamW", config_sha256="f" * 64)
    assert main(["diff", "a", "b", "--store", str(store.path)]) == 0
    out = capsys.readouterr().out
    assert "SGD" in out
    assert "f" * diff.HASH_SHOWN in out
    assert "f" * (diff.HASH_SHOWN + 1) not in out
    assert "depart beyond noise by step" in out.splitlines()[-1]


def test_runs_without_a_common_step(store, capsys):
    train(store, "a", [1.0])
    plant(store, "steps", [{"step": 7, "loss": 1.0}], run_id="b")
    assert main(["diff", "a", "b", "--store", str(store.path)]) == 0
    assert "no step has a loss in both runs" in capsys.readouterr().out


def test_a_run_that_is_not_there(store, capsys):
    train(store, "alpha", [1.0])
    assert main(["diff", "alpha", "alpa", "--store", str(store.path)]) == 1
    assert "there is no run alpa; near it: alpha" in capsys.readouterr().err
