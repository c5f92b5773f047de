"""The `directional_sharpness` instrument: closed forms, critical sharpness beside it, and that it leaves no trace."""

from __future__ import annotations

import pytest
import torch

from lm_telemetry.catalogue import columns
from lm_telemetry.errors import ProbeError, SettingsError
from lm_telemetry.instruments.critical_sharpness import CriticalSharpness
from lm_telemetry.instruments.directional_sharpness import DirectionalSharpness

HESSIAN = torch.diag(torch.tensor([4.0, 2.5, 1.0, 0.3], dtype=torch.float64))
START = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)


def on_quadratic(quadratic, bench, optimizer, start=START, hessian=HESSIAN):
    model = quadratic(hessian, start)
    return bench(model, {"x": torch.zeros(3)}, optimizer(model.parameters()))


def by_scope(rows):
    return {row["scope"]: row for row in rows}


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


@pytest.mark.parametrize("derivative", ["double_backward", "finite_difference"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_quadratic(quadratic, bench, name, derivative):
    """Both closed forms at the point before the step, over several steps."""
    subject = on_quadratic(quadratic, bench, OPTIMIZERS[name])
    instrument = subject.attach(DirectionalSharpness(derivative=derivative))
    rate = subject.optimizer.param_groups[0]["lr"]
    for step in range(1, 4):
        before = subject.model.w.detach().clone()
        rows = by_scope(subject.step(instrument, step))
        g, u = HESSIAN @ before, (before - subject.model.w.detach()) / rate
        exact = {"gradient": g @ HESSIAN @ g / (g @ g), "update": u @ HESSIAN @ u / (g @ u)}
        assert set(rows) == {"gradient", "update"}
        for scope, row in rows.items():
            # A difference of gradients of a quadratic has rounding error only, about 1e-9 in float64.
            assert row["value"] == pytest.approx(float(exact[scope]), rel=1e-7)
            assert set(row) <= {m.name for m in columns("curvature")}
            assert row["loss"] == pytest.approx(float(before @ HESSIAN @ before / 2) + 1)
            assert (row["operator"], row["estimator"], row["derivative"]) == ("hessian", "directional", derivative)
            assert row["hvps"] == 1
        assert rows["update"]["threshold"] == pytest.approx(2 / rate)
        is_sgd = isinstance(subject.optimizer, torch.optim.SGD)
        assert rows["gradient"]["threshold"] == (pytest.approx(2 / rate) if is_sgd else None)
    assert subject.events == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_of_a_quadratic_the_updates_is_the_critical_one(quadratic, bench, name):
    """Two runs alike, one looked at by each instrument."""
    one, other = (on_quadratic(quadratic, bench, OPTIMIZERS[name]) for _ in range(2))
    directional = one.attach(DirectionalSharpness())
    critical = other.attach(CriticalSharpness(tolerance=1e-3, max_forwards=60))
    for step in range(1, 4):
        value = by_scope(one.step(directional, step))["update"]["value"]
        (row,) = other.step(critical, step)
        assert abs(row["value"] - value) <= row["residual"] * (1 + 1e-6)


def test_of_gradient_descent_both_are_one(quadratic, bench):
    subject = on_quadratic(quadratic, bench, OPTIMIZERS["sgd"])
    rows = by_scope(subject.step(subject.attach(DirectionalSharpness()), 1))
    assert rows["gradient"]["value"] == pytest.approx(rows["update"]["value"], rel=1e-10)


def test_a_llama_against_its_dense_hessian(tiny_llama, bench, dense_llama_hessian):
    model, batch = tiny_llama(1, tie_word_embeddings=True, initializer_range=0.2)
    subject = bench(model, batch, torch.optim.AdamW(model.parameters(), lr=1e-3))
    hessian = dense_llama_hessian(model, batch)
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    loss = model(**batch).loss
    g = torch.cat([x.reshape(-1) for x in torch.autograd.grad(loss, list(model.parameters()))])
    rows = by_scope(subject.step(subject.attach(DirectionalSharpness()), 1))
    u = (before - torch.cat([p.detach().reshape(-1) for p in model.parameters()])) / 1e-3
    # Llama's norms compute in float32: 1e-5, as for a single product.
    assert rows["gradient"]["value"] == pytest.approx(float(g @ hessian @ g / (g @ g)), rel=1e-5)
    assert rows["update"]["value"] == pytest.approx(float(u @ hessian @ u / (g @ u)), rel=1e-5)
    assert rows["update"]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert rows["update"]["n_tokens"] == 16
    top = float(torch.linalg.eigvalsh(hessian)[-1])
    assert rows["gradient"]["value"] <= top


def test_a_step_uphill_has_no_value(quadratic, bench):
    subject = on_quadratic(quadratic, bench, lambda p: torch.optim.SGD(p, lr=0.1, maximize=True))
    rows = by_scope(subject.step(subject.attach(DirectionalSharpness()), 1))
    assert rows["update"]["value"] is None
    assert rows["update"]["hvps"] is None
    assert rows["gradient"]["value"] > 0


def test_at_a_minimum_there_is_no_direction(quadratic, bench):
    subject = on_quadratic(quadratic, bench, OPTIMIZERS["sgd"], start=torch.zeros(4, dtype=torch.float64))
    assert [row["value"] for row in subject.step(subject.attach(DirectionalSharpness()), 1)] == [None, None]


def test_a_negative_curvature_is_a_number(quadratic, bench):
    subject = on_quadratic(quadratic, bench, OPTIMIZERS["sgd"], hessian=-torch.eye(4, dtype=torch.float64))
    assert [row["value"] for row in subject.step(subject.attach(DirectionalSharpness()), 1)] == pytest.approx([-1, -1])


def test_without_an_optimizer_the_gradient_is_left(quadratic, bench):
    subject = on_quadratic(quadratic, bench, OPTIMIZERS["sgd"])
    subject.optimizer = None
    instrument = subject.attach(DirectionalSharpness())
    instrument.begin(1)
    instrument.measure(1)
    (row,) = instrument.harvest().note
    g = HESSIAN @ START
    assert row["scope"] == "gradient"
    assert row["value"] == pytest.approx(float(g @ HESSIAN @ g / (g @ g)))
    assert row["threshold"] is None
    assert [(severity, kind) for severity, kind, _ in subject.events] == [("warning", "update_not_looked_along")]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("derivative", ["double_backward", "finite_difference"])
def test_parameters_optimizer_and_copies_are_as_before(tiny_llama, bench, derivative, fails):
    """Bit by bit, also when the probe fails half-way; the model and the copies have changed places meanwhile."""
    model, batch = tiny_llama(0, dtype=torch.float32, attention_dropout=0.3)
    model.train()
    subject = bench(model, batch, torch.optim.AdamW(model.parameters(), lr=1e-2))
    instrument = subject.attach(DirectionalSharpness(derivative=derivative))
    seen, probe_loss, measure = {}, subject.probe.loss, instrument.measure

    def state():
        tensors = [t for p in model.parameters() for t in (p, p.grad)] + subject.parameters.previous
        tensors += [v for s in subject.optimizer.state.values() for v in s.values()]
        return [t.detach().clone() for t in tensors], [t.data_ptr() for t in tensors], torch.get_rng_state()

    def loss(*args, **kwargs):
        seen["at"] = [p.detach().clone() for p in model.parameters()]
        if fails and len(seen) > 1:
            raise ProbeError("no second forward")
        return probe_loss(*args, **kwargs)

    def watched(number):
        before = state()
        held = [p.clone() for p in subject.parameters.previous]
        subject.probe.loss = loss
        measure(number)
        after = state()
        assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
        assert before[1] == after[1]
        assert torch.equal(before[2], after[2])
        assert all(m.training for m in model.modules())
        seen["held"] = held

    instrument.measure = watched
    if fails:
        seen["failing"] = True
    rows = subject.step(instrument, 1)
    assert (rows == []) == fails
    assert len(subject.events) == (1 if fails else 0)
    if derivative == "double_backward":
        assert all(torch.equal(a, b) for a, b in zip(seen["at"], seen["held"], strict=True))


def test_settings_are_checked():
    for setting in ({"micro_batch": 0}, {"derivative": "exact"}, {"tolerance": 1}):
        with pytest.raises(SettingsError, match=r"instruments\.directional_sharpness"):
            DirectionalSharpness.build(**setting)
