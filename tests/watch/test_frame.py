"""What a frame says of a store, and that it fits."""

import math
import random
from datetime import timedelta
from itertools import product

import pytest
from planted import START, plant

from lm_telemetry.exporters.watch.reading import Reading
from lm_telemetry.terminal import one_line

STEPS = 200


def steps(course=lambda step: 2.0 + math.exp(-step / 50), **columns):
    draw = random.Random(0)
    noise = [draw.gauss(0, 0.01) for _ in range(STEPS)]
    usual = {"seconds": 0.5, "telemetry_seconds": 0.001, "grad_norm": 1.0, "learning_rate": 0.1}
    return [usual | {"step": step, "loss": course(step) + noise[step - 1]} | columns for step in range(1, STEPS + 1)]


def head(step, head_, **columns):
    place = {"stack": "decoder", "layer": 1, "kind": "self", "head": head_, "n_queries": 64}
    return place | {"step": step, "entropy": 2.0, "normalized_entropy": 0.5, "max_logit": 9.0, "nonfinite": 0} | columns


def layer(step, index, rms, **columns):
    place = {"stack": "decoder", "layer": index, "site": "resid", "zero_fraction": 0.0, "nonfinite": 0}
    return place | {"step": step, "rms": rms} | columns


def tensor(step, index, ratio):
    place = {"name": f"h.{index}", "stack": "decoder", "layer": index}
    return place | {"step": step, "norm": 10.0, "update_norm": 10.0 * ratio}


def estimate(step, value, **columns):
    kind = {"operator": "hessian", "scope": "all", "estimator": "critical", "index": None}
    return kind | {"step": step, "value": value, "threshold": 20.0, "converged": True} | columns


@pytest.fixture
def healthy(store):
    plant(store, "runs", [{"step": 0, "model_class": "Llama", "n_parameters": 10**9, "optimizer": "AdamW",
                           "max_overhead": 0.01}])  # fmt: skip
    plant(store, "steps", steps())
    plant(store, "layers", [layer(step, i, 1.0 + i) for step in (1, 100, 200) for i in range(3)])
    plant(store, "heads", [head(step, h) for step in (1, 200) for h in range(4)])
    plant(store, "params", [tensor(200, i, 1e-3) for i in range(3)])
    plant(store, "curvature", [estimate(step, 0.05 * step) for step in range(10, 201, 10)])
    plant(store, "events", [{"step": 7, "severity": "info", "kind": "probe_frozen", "message": "a batch"}])
    return store


def levels(lines):
    """The level of each thing that is judged."""
    names = ("loss", "spikes", "not finite", "sharpness", "entropy", "logits", "layers", "updates", "telemetry")
    words = ("ok", "note", "WARN", "ALARM", "-")
    found = {}
    for line in lines:
        level, _, rest = line.partition(" ")
        name = next((name for name in names if rest.strip().startswith(name)), None)
        if level in words and name:
            found[name] = level
    return found


def line(lines, name):
    return next(text for text in lines if text[6:].startswith(name))


def test_a_healthy_run(healthy, watch, frame):
    now = START + timedelta(seconds=STEPS + 90)
    lines = frame(watch(is_live=True)(), now=now, max_steps=400)
    assert set(levels(lines).values()) == {"ok"}
    assert lines[0].startswith("r  LIVE")
    assert lines[0].endswith("step 200 of 400")
    assert lines[1].startswith("Llama, 1 B parameters, AdamW")
    assert lines[1].endswith("2 steps/s, 1 min 40 s to go, last row 1 min 30 s ago")
    assert "0.5 (critical) of the threshold" in line(lines, "sharpness")
    assert "0.2 % of the time in the last 1,000 steps; the budget is 1 %" in line(lines, "telemetry")
    assert "0.001 of the weights a step" in line(lines, "updates")
    assert any(text.startswith("info    step 7  probe_frozen  a batch") for text in lines)
    assert any(text.startswith("rms     ▁▁▁▁") and text.endswith("1 to 3") for text in lines)
    assert frame(watch(is_live=False)())[0].startswith("r  over")


def test_the_time_to_go_is_what_the_run_told_unless_it_is_given(healthy, watch, frame):
    plant(healthy, "runs", [{"step": 1, "model_class": "Llama", "max_steps": 300}])
    told = watch(is_live=True)()
    assert frame(told)[0].endswith("step 200 of 300")
    assert "50 s to go" in frame(told)[1]
    assert frame(told, max_steps=400)[0].endswith("step 200 of 400")


SPIKE = lambda step: 9.0 if step == 150 else 2.0 + math.exp(-step / 50)
LOST = lambda step: math.nan if step > 190 else 2.0


@pytest.mark.parametrize(
    "case",
    [
        ("steps", steps(LOST), "loss", "ALARM", "NaN at step 200"),
        ("steps", steps(LOST), "not finite", "WARN", "the loss at 10 steps, last at 200"),
        ("steps", steps(lambda step: 2 + step / 100), "loss", "WARN", "rising by 1 per 100 steps"),
        ("steps", steps(SPIKE), "spikes", "note", "1 in the last 1,000 steps; 9"),
        ("steps", steps(lambda s: 2 + 9 * (s > 195)), "spikes", "WARN", "not recovered"),
        ("steps", steps(telemetry_seconds=0.02), "telemetry", "WARN", "4 % of the time"),
        ("curvature", [estimate(210, 19.0)], "sharpness", "note", "at the edge of stability: 0.95 (critical)"),
        ("heads", [head(200, 9, normalized_entropy=0.01)], "entropy", "WARN", "collapsed in 1 of 5 heads; lowest 0.01"),
        ("heads", [head(200, 9, max_logit=60.0)], "logits", "WARN", "largest 60 (layer 1 head 9); above 50 in 1 head"),
        (
            "heads",
            [head(s, 9, max_logit=m) for s, m in ((1, 20.0), (100, 28.0), (200, 40.0))],
            "logits",
            "note",
            "is above 50 in",
        ),
        ("heads", [head(200, 9, nonfinite=3)], "not finite", "ALARM", "logits of 1 head"),
        ("layers", [layer(1, 9, 1.0), layer(200, 9, 1e-9)], "layers", "WARN", "1 dead (first layer 9, step 200)"),
        ("layers", [layer(200, 9, 1.0, nonfinite=2)], "not finite", "ALARM", "activations at 1 site"),
        ("params", [tensor(200, 9, 0.1)], "updates", "WARN", "fast in 1 of 4 places (layer 9: 0.1)"),
        ("params", [tensor(200, 9, 1e-6)], "updates", "note", "slow in 1 of 4 places"),
        ("params", [tensor(200, 9, 0.0)], "updates", "WARN", "no change in 1 of 4 places"),
    ],
)
def test_what_is_wrong_has_its_line(healthy, watch, frame, case):
    table, rows, thing, level, words = case
    plant(healthy, table, rows, attempt=int(table == "steps"))  # a launch that takes the same steps again
    lines = frame(watch()())
    assert levels(lines)[thing] == level, "\n".join(lines)
    assert words in line(lines, thing)


def test_what_is_not_captured_is_said(store, watch, frame):
    plant(store, "steps", [{"step": 1, "loss": 2.0}])
    found = levels(frame(watch()()))
    assert {thing for thing, level in found.items() if level == "-"} == {
        "sharpness", "entropy", "logits", "layers", "updates", "telemetry",
    }  # fmt: skip
    assert found["loss"] == "ok"


def test_a_frame_fits(healthy, watch, frame):
    reading = watch()()
    for width, height, ascii_only in product((20, 40, 59, 60, 80, 133, 250), (4, 12, 16, 24, 60), (True, False)):
        lines = frame(reading, width, height, ascii_only=ascii_only)
        assert len(lines) <= height
        assert max(map(len, lines)) <= width
        assert not ascii_only or "".join(lines).isascii()


def test_at_80_by_24_there_is_everything(healthy, watch, frame):
    lines = frame(watch()(), 80, 24)
    assert len(levels(lines)) == 9
    for title in ("── loss  nats, steps 1 to 200", "── critical sharpness", "── layers  3 layers", "── events"):
        assert any(title in text for text in lines)


EVIL = "\x1b[31mred\x1b]0;title\x07[bold]\nnext\r\x9b2J\u202e:smile:"


def test_what_others_have_named_does_nothing_to_a_terminal(store, watch, frame):
    told = {"severity": EVIL, "kind": EVIL, "message": f"[red]{EVIL}", "step": 1}
    plant(store, "steps", [{"step": 1, "loss": 1.0}], run_id="\x1b[2J[red]")
    plant(store, "events", [told], run_id="\x1b[2J[red]")
    plant(store, "runs", [{"step": 1, "model_class": EVIL, "optimizer": EVIL}], run_id="\x1b[2J[red]")
    lines = frame(watch("\x1b[2J[red]")(), 400)
    assert all(text.isprintable() for text in lines)
    assert lines[0].startswith("\\x1b[2J[red]  over")
    (event,) = (text for text in lines if "step 1  " in text and "next" in text)
    assert "[red]\\x1b[31mred\\x1b]0;title\\x07[bold]\\nnext\\r\\x9b2J\\u202e:smile:" in event
    assert one_line(EVIL).isprintable()


def test_no_run_yet(frame):
    assert frame(Reading(run_id=None, answers={}))[-1] == "waiting for a run to begin"
