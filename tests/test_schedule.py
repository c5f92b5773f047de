"""The schedule, what it is charged, and what a step says of itself."""

from __future__ import annotations

import time

import pytest
import torch

from lm_telemetry.cost import Meter
from lm_telemetry.guard import Guard
from lm_telemetry.packet import Packet
from lm_telemetry.schedule import Schedule
from lm_telemetry.step_clock import StepClock


def test_an_instrument_is_due_on_step_1_and_on_multiples_of_its_cadence():
    schedule = Schedule({"a": 1, "b": 5})
    assert [step for step in range(1, 12) if "b" in schedule.due(step)] == [1, 5, 10]
    assert all("a" in schedule.due(step) for step in range(1, 12))


def test_nested_work_is_charged_once():
    schedule = Schedule({})
    meter = Meter(schedule)
    start = time.perf_counter()
    with meter("outer"):
        time.sleep(0.02)
        with meter("inner"):
            time.sleep(0.03)
    elapsed = time.perf_counter() - start
    assert schedule.spent["inner"] >= 0.03
    assert 0.02 <= schedule.spent["outer"] < elapsed - 0.03 + 1e-4
    assert meter.seconds == pytest.approx(schedule.spent["outer"] + schedule.spent["inner"], abs=1e-6)
    assert meter.seconds <= elapsed


def test_an_error_inside_is_charged_and_goes_on():
    schedule = Schedule({})
    meter = Meter(schedule)
    with pytest.raises(KeyError), meter("outer"), meter("inner"):
        raise KeyError
    assert set(schedule.spent) == {"outer", "inner"}
    with meter("outer"):
        pass
    assert schedule.spent["outer"] >= 0


def test_a_packet_opens_as_it_was_packed():
    tensors = {
        ("a", "x"): torch.randn(3, 4),
        ("a", "n"): torch.tensor([2**40, -1]),
        ("b", "flag"): torch.tensor(True),
        ("b", "none"): torch.empty(0, 5),
        ("b", "half"): torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
    }
    packet = Packet(tensors)
    for tensor in tensors.values():
        tensor.zero_()  # what happens to the tensors later is not in the packet
    opened = packet.open()
    assert opened.keys() == tensors.keys()
    assert opened["a", "x"].shape == (3, 4)
    assert opened["a", "x"].any()
    assert opened["a", "n"].tolist() == [2**40, -1]
    assert opened["b", "flag"] == 1
    assert opened["b", "none"].shape == (0, 5)
    assert opened["b", "half"][0] == 1.5
    assert Packet({}).open() == {}


def test_losses_of_micro_batches_are_averaged_or_summed_as_the_model_scaled_them():
    clock = StepClock()
    for batch, expected in (({"input_ids": torch.ones(2, 3)}, 2.0), ({"num_items_in_batch": 6}, 4.0)):
        clock.begin()
        for loss in (1.0, 3.0):
            clock.saw_batch(batch)
            clock.saw_output({"loss": torch.tensor(loss)})
        device, _ = clock.end()
        assert device["loss"].item() == expected


def test_tokens_are_counted_by_the_mask_where_there_is_one():
    clock = StepClock()
    clock.begin()
    clock.saw_batch({"input_ids": torch.ones(2, 3)})
    clock.saw_batch({"input_ids": torch.ones(2, 3), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])})
    device, _ = clock.end()
    assert device["tokens"].item() == 9


def test_a_learning_rate_that_is_a_tensor_is_the_one_of_the_step():
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.Adam([parameter], lr=torch.tensor(0.5))
    clock = StepClock()
    clock.begin()
    clock.saw_learning_rate(optimizer)
    optimizer.param_groups[0]["lr"].fill_(0.25)  # as a scheduler does
    device, _ = clock.end()
    assert device["learning_rate"].item() == 0.5


def test_a_step_without_anything_known_invents_nothing():
    clock = StepClock()
    clock.begin()
    device, host = clock.end()
    assert device == {}
    assert set(host) == {"seconds"}


def test_the_guard_stops_errors_but_not_interrupts():
    told = []
    guard = Guard(lambda *what, **fields: told.append((what, fields)))
    with guard("somewhere"):
        raise ValueError("no")
    with guard("somewhere"):
        raise ValueError("again")
    assert len(told) == 1
    assert told[0][0][1] == "telemetry_error"
    assert "Traceback" in told[0][1]["traceback"]
    with pytest.raises(KeyboardInterrupt), guard("somewhere"):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="strict"), Guard(lambda *_, **__: None, strict=True)("somewhere"):
        raise ValueError("strict")


def test_an_instrument_that_is_asked_for_fires_on_the_next_step_but_not_without_end():
    schedule = Schedule({"cheap": 1, "dear": 100})
    fired = []
    for step in range(1, 101):
        if "dear" in schedule.due(step):
            fired.append(step)
        schedule.request("dear")
        schedule.request("not there")
    assert fired == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]
    assert "dear" not in Schedule({"dear": 100}).due(2)


def test_what_is_settled_is_counted_anew():
    schedule = Schedule({"a": 2, "b": 5})
    for seconds in (0.25, 0.5):
        schedule.charge("a", seconds)
        schedule.captured("a")
    schedule.charge("agent", 1.0)
    assert schedule.settle() == {
        "instrument": ["a", "agent"], "seconds": [0.75, 1.0], "captures": [2, None], "every": [2, None],
    }  # fmt: skip
    schedule.charge("b", 2.0)
    assert schedule.settle() == {"instrument": ["b"], "seconds": [2.0], "captures": [0], "every": [5]}
    assert not schedule.settle()["instrument"]
