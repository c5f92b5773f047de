"""The `critical_sharpness` instrument against closed forms on quadratics, and that it leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lm_telemetry.catalogue import columns
from lm_telemetry.errors import SettingsError
from lm_telemetry.instruments.critical_sharpness import CriticalSharpness

HESSIAN = torch.diag(torch.tensor([4.0, 2.5, 1.0, 0.3], dtype=torch.float64))
START = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)


def quadratic_bench(quadratic, bench, optimizer, start=START, hessian=HESSIAN):
    model = quadratic(hessian, start)
    return bench(model, {"x": torch.zeros(3)}, optimizer(model.parameters()))


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.01),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.05),
        lambda p: torch.optim.RMSprop(p, lr=1e-3),
    ],
    ids=["sgd", "momentum", "adamw", "rmsprop"],
)
def test_a_quadratic(quadratic, bench, optimizer):
    """λ_c = u'Hu / g'u for the direction each optimizer took, over several steps."""
    subject = quadratic_bench(quadratic, bench, optimizer)
    instrument = subject.attach(CriticalSharpness(tolerance=1e-3, max_forwards=60))
    rate = subject.optimizer.param_groups[0]["lr"]
    for step in range(1, 5):
        before = subject.model.w.detach().clone()
        (row,) = subject.step(instrument, step)
        direction = (before - subject.model.w.detach()) / rate
        exact = float(direction @ HESSIAN @ direction / (HESSIAN @ before @ direction))
        assert abs(row["value"] - exact) <= row["residual"] * (1 + 1e-6)
        assert row["value"] == pytest.approx(exact, rel=1e-3)
        assert row["converged"] is True
        assert row["threshold"] == pytest.approx(2 / rate)
        assert row["loss"] == pytest.approx(float(before @ HESSIAN @ before / 2) + 1)
        assert set(row) <= {m.name for m in columns("curvature")}
        assert (row["operator"], row["estimator"], row["derivative"]) == ("hessian", "critical", "forward")
    assert subject.events == []


def test_the_last_answer_is_where_the_next_search_starts(quadratic, bench):
    subject = quadratic_bench(quadratic, bench, lambda p: torch.optim.SGD(p, lr=1e-5))
    instrument = subject.attach(CriticalSharpness())
    first, second = (subject.step(instrument, step)[0] for step in (1, 2))
    assert first["forwards"] > 15  # seventeen doublings from 1e-5
    assert second["forwards"] <= 6  # L(0), two for the bracket, three bisections
    assert first["value"] == pytest.approx(second["value"], rel=0.1)


def test_beyond_the_critical_step_the_value_exceeds_the_threshold(quadratic, bench):
    """A step that raises the loss is longer than the critical one, and the other way round."""
    for rate, raises in ((0.4, False), (0.6, True)):
        subject = quadratic_bench(
            quadratic, bench, lambda p, rate=rate: torch.optim.SGD(p, lr=rate), start=torch.eye(4)[0].double()
        )
        (row,) = subject.step(subject.attach(CriticalSharpness()), 1)
        after = subject.model(torch.zeros(1)).loss.item()
        assert (after > row["loss"]) == raises
        assert (row["value"] > row["threshold"]) == raises
        assert subject.requests == (["sharpness"] if raises else [])


@pytest.mark.parametrize(
    ("hessian", "optimizer"),
    [
        (-torch.eye(2), lambda p: torch.optim.SGD(p, lr=0.1)),  # down for ever
        (torch.eye(2), lambda p: torch.optim.SGD(p, lr=0.1, maximize=True)),  # up from the start
    ],
    ids=["never raised", "no descent"],
)
def test_no_critical_step_is_null_and_not_a_number(quadratic, bench, hessian, optimizer):
    subject = quadratic_bench(quadratic, bench, optimizer, start=torch.ones(2), hessian=hessian)
    (row,) = subject.step(subject.attach(CriticalSharpness()), 1)
    assert row["value"] is None
    assert row["residual"] is None
    assert row["converged"] is False
    assert row["forwards"] <= 24
    assert row["threshold"] == pytest.approx(20)


def test_the_learning_rate_is_that_of_the_step(quadratic, bench):
    subject = quadratic_bench(quadratic, bench, lambda p: torch.optim.SGD(p, lr=0.01))
    scheduler = torch.optim.lr_scheduler.StepLR(subject.optimizer, 1, gamma=0.1)
    (row,) = subject.step(subject.attach(CriticalSharpness(tolerance=1e-3)), 1, scheduler=scheduler)
    gradient = HESSIAN @ START
    assert row["threshold"] == pytest.approx(2 / 0.01)
    assert row["value"] == pytest.approx(float(gradient @ HESSIAN @ gradient / (gradient @ gradient)), rel=1e-3)


def test_several_learning_rates_are_scaled_by_the_first(quadratic, bench):
    """Then λ_c times half the first rate is right: above 1 exactly when the step raised the loss."""
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    model.forward = lambda x: (2 * model.a**2 + 3 * model.b**2).sum() / 2 + 0 * x.sum()
    optimizer = torch.optim.SGD([{"params": [model.a], "lr": 0.1}, {"params": [model.b], "lr": 0.2}])
    subject = bench(model, {"x": torch.zeros(1)}, optimizer)
    instrument = subject.attach(CriticalSharpness(tolerance=1e-3, max_forwards=60))
    instrument.begin(1)
    model.forward(torch.zeros(1)).backward()
    subject.parameters.snapshot(keep=True)
    optimizer.step()
    instrument.after_update()
    instrument.measure(1)
    (row,) = instrument.harvest().note
    # g = (2, 3), the step is (0.2, 0.6), so u = (2, 6): u'Hu / g'u = (8 + 108)/(4 + 18).
    assert row["value"] == pytest.approx(116 / 22, rel=1e-3)
    assert row["threshold"] == pytest.approx(20)


def test_a_llama(tiny_llama, bench):
    """Tied weights, dropout and float32: the loss at the value's step is the loss before it."""
    model, batch = tiny_llama(1, dtype=torch.float32, tie_word_embeddings=True, attention_dropout=0.2)
    model.train()
    subject = bench(model, batch, torch.optim.AdamW(model.parameters(), lr=1e-3))
    instrument = subject.attach(CriticalSharpness(tolerance=1e-3, max_forwards=60))
    before = [p.detach().clone() for p in model.parameters()]
    (row,) = subject.step(instrument, 1)
    model.eval()
    with torch.no_grad():

        def loss(eta):
            for p, old, new in zip(model.parameters(), before, after, strict=True):
                p.copy_(old + (new - old) * (eta / 1e-3))
            return model(**batch).loss.item()

        after = [p.clone() for p in model.parameters()]
        eta = 2 / row["value"]
        assert row["loss"] == pytest.approx(loss(0), rel=1e-6)
        assert loss(0.9 * eta) < row["loss"] < loss(1.1 * eta)
    assert row["n_tokens"] == 16


@pytest.mark.parametrize("seed", range(4))
def test_rounding_of_bfloat16_is_no_descent(tiny_llama, bench, accelerator, seed):
    """An optimizer that climbs has no critical step; under autocast the loss wavers, and must not seem to give one."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    model, _ = tiny_llama(seed, dtype=torch.float32, num_key_value_heads=2, **sizes)
    ids = torch.randint(64, (4, 32))
    batch = {"input_ids": ids, "labels": ids}
    model = accelerator(mixed_precision="bf16").prepare_model(model)
    subject = bench(model, batch, torch.optim.AdamW(model.parameters(), lr=1e-3, maximize=True))
    instrument = subject.attach(CriticalSharpness())
    for step in range(1, 6):
        (row,) = subject.step(instrument, step)
        assert row["value"] is None
        assert row["converged"] is False


def state(subject):
    model, optimizer = subject.model, subject.optimizer
    tensors = [t for p in model.parameters() for t in (p, p.grad)] + list(model.buffers())
    tensors += [t for s in optimizer.state.values() for t in s.values()]
    bits = [(id(t), t.detach().reshape(-1).view(torch.uint8).tolist()) for t in tensors]
    return bits, [m.training for m in model.modules()], torch.get_rng_state().tolist(), torch.is_grad_enabled()


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_changed(tiny_llama, bench, monkeypatch, fails):
    model, batch = tiny_llama(0, dtype=torch.float32, attention_dropout=0.3)
    model.train()
    model.model.layers[0].eval()
    subject = bench(model, batch, torch.optim.AdamW(model.parameters(), lr=1e-2))
    instrument = subject.attach(CriticalSharpness())
    subject.step(instrument, 1)
    instrument.begin(2)
    subject.parameters.snapshot(keep=True)
    subject.optimizer.step()
    instrument.after_update()
    before = state(subject)
    if fails:

        def fail(*args, **kwargs):
            torch.rand(1)
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(model.model.layers[1].mlp, "forward", fail)
        with pytest.raises(torch.OutOfMemoryError):
            instrument.measure(2)
        assert instrument.harvest() is None
    else:
        instrument.measure(2)
        assert instrument.harvest().note[0]["value"] is not None
    assert state(subject) == before


def test_one_event_and_no_row(quadratic, bench):
    def subject(**options):
        return quadratic_bench(quadratic, bench, lambda p: torch.optim.SGD(p, **({"lr": 0.1} | options)))

    def events(subject, *, snapshot=True):
        instrument = subject.attach(CriticalSharpness())
        instrument.begin(1)
        if snapshot:
            subject.parameters.snapshot(keep=True)
        instrument.after_update()
        instrument.measure(1)
        assert instrument.harvest() is None
        assert [kind for _, kind, _ in subject.events] == ["critical_sharpness_not_measured"]
        return subject.events[0][2]

    assert "before the update are not held" in events(subject(), snapshot=False)
    assert "learning rate 0.0" in events(subject(lr=0.0))
    without = subject()
    without.optimizer = None
    assert "known optimizer" in events(without)
    broken = subject()
    broken.model.offset = torch.nan
    assert "loss on the probe is nan" in events(broken)


@pytest.mark.parametrize("setting", [{"tolerance": 0}, {"tolerance": 1}, {"max_forwards": 2}, {"every": -1}, {"k": 1}])
def test_settings_are_checked(setting):
    with pytest.raises(SettingsError, match=r"instruments\.critical_sharpness"):
        CriticalSharpness.build(**setting)
