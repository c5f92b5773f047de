"""The `sharpness` instrument: rows against dense Hessians, what it says when it cannot, and that it leaves no trace."""

from __future__ import annotations

import copy
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lm_telemetry.catalogue import columns
from lm_telemetry.errors import SettingsError
from lm_telemetry.hooks.gauss_newton import GaussNewton
from lm_telemetry.hooks.optimizer import preconditioner
from lm_telemetry.hooks.preserve import evaluating
from lm_telemetry.instruments.sharpness import Sharpness
from lm_telemetry.kernels.lanczos import lanczos

HESSIAN = torch.diag(torch.tensor([4.0, 2.5, 1.0, -6.0]))


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **({"lr": 0.1} | options))


@pytest.fixture
def on_quadratic(quadratic, bench):
    model = quadratic(HESSIAN, torch.ones(4))
    return bench(model, {"x": torch.zeros(3)}, sgd(model))


def test_a_quadratic(on_quadratic):
    instrument = on_quadratic.attach(Sharpness(k=2, tolerance=1e-4))
    rows = on_quadratic.step(instrument, 1)
    assert [r["value"] for r in rows] == pytest.approx([4.0, 2.5], rel=1e-4)
    assert [r["index"] for r in rows] == [0, 1]
    for row in rows:
        assert set(row) <= {m.name for m in columns("curvature")}
        assert row["operator"] == "hessian"
        assert row["scope"] == "all"
        assert row["estimator"] == "lanczos"
        assert row["derivative"] == "double_backward"
        assert row["converged"] is True
        assert row["threshold"] == pytest.approx(20.0)
        assert row["n_tokens"] is None
        assert row["loss"] == pytest.approx(on_quadratic.model(torch.zeros(1)).loss.item())
    assert rows[0]["hvps"] == 4
    assert rows[0]["seconds"] > 0
    assert rows[1]["hvps"] is None  # of the solve, so that a sum counts it once
    assert on_quadratic.events == []


def test_a_llama_under_adam_against_dense_matrices(tiny_llama, bench, dense_llama_hessian):
    model, batch = tiny_llama(0, initializer_range=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    subject = bench(model, batch, optimizer)
    instrument = subject.attach(Sharpness(tolerance=1e-5, max_hvps=300))
    rows = {r["operator"]: r for r in subject.step(instrument, 1)}
    hessian = dense_llama_hessian(model, batch)
    assert set(rows) == {"hessian", "preconditioned"}
    # Tolerance 1e-5, and Llama's norms in float32.
    assert rows["hessian"]["value"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-4)
    root = preconditioner(optimizer, list(model.parameters())).rsqrt()
    scaled = torch.linalg.eigvalsh(root[:, None] * hessian * root)
    assert rows["preconditioned"]["value"] == pytest.approx(float(scaled[-1]), rel=1e-4)
    assert rows["hessian"]["threshold"] is None
    assert rows["preconditioned"]["threshold"] == pytest.approx(38 / 1e-3)
    assert all(r["converged"] and r["n_tokens"] == 16 for r in rows.values())


def test_both_ends_by_both_derivatives(tiny_llama, bench, dense_llama_hessian):
    """In micro-batches of one sequence, too; the smallest are counted from -1 down and have no threshold."""
    model, batch = tiny_llama(0, dtype=torch.float32, initializer_range=0.2)
    subject = bench(model, batch, sgd(model, lr=0.0))
    exact = torch.linalg.eigvalsh(dense_llama_hessian(copy.deepcopy(model).double(), batch))
    for options in ({}, {"derivative": "finite_difference"}, {"micro_batch": 1}):
        instrument = subject.attach(Sharpness(k=2, smallest=2, tolerance=1e-3, max_hvps=200, **options))
        rows = {r["index"]: r for r in subject.step(instrument, 1)}
        assert list(rows) == [0, 1, -1, -2]
        for index, row in rows.items():
            # The tolerance of the solve, and up to 0.7 % of a product by differences.
            assert row["value"] == pytest.approx(float(exact[-1 - index]), rel=0.01)
            assert row["derivative"] == options.get("derivative", "double_backward")
            assert row["converged"]
            assert row["threshold"] is None
            assert (row["hvps"] is None) is (index in (1, -2))
        assert subject.events == []


def test_the_gauss_newton_matrix(tiny_llama, bench):
    """Against a longer solve of the same operator: what is tested here is the row."""
    model, batch = tiny_llama(0, initializer_range=0.2)
    subject = bench(model, batch, sgd(model, lr=1e-9))
    values = []
    for micro_batch in (None, 1):
        instrument = Sharpness(operators=["gauss_newton", "hessian"], tolerance=1e-4, micro_batch=micro_batch)
        rows = {r["operator"]: r for r in subject.step(subject.attach(instrument), 1)}
        assert rows["gauss_newton"]["threshold"] is None
        assert rows["hessian"]["threshold"] == pytest.approx(2e9)
        values.append(rows["gauss_newton"]["value"])
    with evaluating(model), GaussNewton(model, subject.probe, list(model.parameters())) as matrix:
        exact = lanczos(
            matrix.matvec, dimension=matrix.dimension, tolerance=1e-8, max_steps=200, dtype=torch.float64
        ).value
    assert values == pytest.approx([exact, exact], rel=1e-3)


def test_a_model_without_second_derivative_is_measured_and_told_of_once(bench):
    class Tanh(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            return grad * (1 - ctx.saved_tensors[0].tanh() ** 2)

    model = failing(lambda w: (Tanh.apply(w) ** 2).sum())
    subject = bench(model, {"x": torch.zeros(1)}, sgd(model, lr=0.0))
    instrument = subject.attach(Sharpness())
    for step in (1, 2):
        (row,) = subject.step(instrument, step)
        assert row["derivative"] == "finite_difference"
        # d²/dw² tanh² at 1, three times.
        tanh = math.tanh(1)
        assert row["value"] == pytest.approx(2 * (1 - tanh**2) * (1 - 3 * tanh**2), rel=0.01)
        assert row["residual"] > 0  # at least the error of the differences
    assert [(severity, kind) for severity, kind, _ in subject.events] == [("info", "finite_differences")]
    assert "no second derivative" in subject.events[0][2]
    subject.step(subject.attach(Sharpness(derivative="double_backward")), 3)
    assert subject.events[1][:2] == ("warning", "sharpness_not_measured")


def test_a_warm_start_is_cheaper_and_right(tiny_llama, bench, dense_llama_hessian):
    """After one more AdamW step, beside a cold solve of the same Hessian; over several models."""
    warm = cold = 0
    for seed in range(4):
        model, batch = tiny_llama(seed, initializer_range=0.2)
        subject = bench(model, batch, torch.optim.AdamW(model.parameters(), lr=1e-3))
        kept = subject.attach(Sharpness(every=1, operators="hessian"))
        subject.step(kept, 1)
        (row,) = subject.step(kept, 2)
        fresh = subject.attach(Sharpness(every=1, operators="hessian"))
        fresh.begin(2)
        fresh.measure(2)
        (reference,) = fresh.harvest().note
        exact = float(torch.linalg.eigvalsh(dense_llama_hessian(model, batch))[-1])
        # The residual of a converged pair may be 2 %.
        assert row["value"] == pytest.approx(exact, rel=0.02)
        assert reference["value"] == pytest.approx(exact, rel=0.02)
        warm += row["hvps"]
        cold += reference["hvps"]
    assert warm < cold


def test_vectors_are_kept_for_frequent_captures_only(on_quadratic):
    frequent, rare = Sharpness(every=5), Sharpness(every=500)
    for instrument in (frequent, rare):
        on_quadratic.attach(instrument)
        on_quadratic.step(instrument, 1)
    assert frequent._start("hessian", 6).shape == (3, 4)
    assert frequent._start("hessian", 7) is None  # handed out once
    assert rare._start("hessian", 2) is None
    on_quadratic.step(frequent, 10)
    assert frequent._start("hessian", 100) is None  # too old
    on_quadratic.step(frequent, 110)
    frequent.detach()
    assert frequent._start("hessian", 111) is None


def test_the_learning_rate_is_that_of_the_step(on_quadratic):
    scheduler = torch.optim.lr_scheduler.StepLR(on_quadratic.optimizer, 1, gamma=0.5)
    instrument = on_quadratic.attach(Sharpness())
    assert on_quadratic.step(instrument, 1, scheduler=scheduler)[0]["threshold"] == pytest.approx(2 / 0.1)
    assert on_quadratic.step(instrument, 2, scheduler=scheduler)[0]["threshold"] == pytest.approx(2 / 0.05)


def test_an_unknown_optimizer_has_no_threshold(on_quadratic):
    on_quadratic.optimizer = None
    instrument = on_quadratic.attach(Sharpness())
    instrument.begin(1)
    instrument.measure(1)
    (row,) = instrument.harvest().note
    assert row["threshold"] is None
    assert row["value"] == pytest.approx(4.0, rel=1e-2)


def test_too_few_products_are_said(tiny_llama, bench):
    model, batch = tiny_llama(0, initializer_range=0.2)
    subject = bench(model, batch, sgd(model))
    (row,) = subject.step(subject.attach(Sharpness(max_hvps=2, tolerance=1e-6)), 1)
    assert row["converged"] is False
    assert row["hvps"] == 2
    assert row["residual"] > 0


def test_a_preconditioner_that_is_asked_for_and_missing_is_an_event(on_quadratic):
    rows = on_quadratic.step(on_quadratic.attach(Sharpness(operators=["preconditioned"])), 1)
    assert rows == []
    assert [kind for _, kind, _ in on_quadratic.events] == ["no_preconditioner"]


class FusedSquare(torch.autograd.Function):
    """x² as a fused kernel would do it: its backward computes numbers and leaves no graph."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (2 * x * grad).detach()


class Scaled(nn.Module):
    """L = exp(c)·w²: of its mixed derivatives one half passes through the kernel's backward, the other does not."""

    def __init__(self, square):
        super().__init__()
        self.c, self.w = nn.Parameter(torch.linspace(-1, 1, 6)), nn.Parameter(torch.linspace(0.5, 2, 6))
        self.square = square

    def forward(self, x):
        return SimpleNamespace(loss=self.c.exp() @ self.square(self.w) + 0 * x.sum())


@pytest.mark.parametrize(("square", "events"), [(FusedSquare.apply, ["hessian_not_symmetric"]), (torch.square, [])])
def test_a_second_derivative_that_is_silently_incomplete_is_told(bench, square, events):
    model = Scaled(square)
    subject = bench(model, {"x": torch.zeros(1)}, sgd(model))
    subject.step(subject.attach(Sharpness()), 1)
    assert [kind for _, kind, _ in subject.events] == events


# -- what cannot be measured -----------------------------------------------------------------------------------------


def failing(answer):
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return SimpleNamespace(loss=answer(self.w))

    return Failing()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda w: None, "needs `labels`"),
        (lambda w: w.sum() * torch.nan, "loss on the probe is nan"),
        (lambda w: (w - 1).abs().sqrt().sum(), "gradient on the probe is not finite"),
        (lambda w: ((w - 1) ** 2).pow(0.75).sum() + (w**2).sum(), "not finite"),
        (lambda w: w.detach().sum(), "does not depend on any trainable parameter"),
    ],
)
def test_one_event_and_no_row(bench, answer, message):
    model = failing(answer)
    subject = bench(model, {"x": torch.zeros(1)}, sgd(model))
    instrument = subject.attach(Sharpness())
    instrument.begin(1)
    instrument.measure(1)
    assert instrument.harvest() is None
    ((severity, kind, text),) = subject.events
    assert (severity, kind) == ("warning", "sharpness_not_measured")
    assert message in text


def test_no_probe_and_nothing_trainable(bench, quadratic):
    model = quadratic(HESSIAN, torch.ones(4))
    without = bench(model, None, sgd(model))
    frozen = bench(quadratic(HESSIAN, torch.ones(4)).requires_grad_(False), {"x": torch.zeros(1)}, None)
    small = bench(quadratic(HESSIAN, torch.ones(4)), {"x": torch.zeros(1)}, None)
    for subject, instrument, message in (
        (without, Sharpness(), "no batch yet"),
        (frozen, Sharpness(), "no parameter requires gradients"),
        (small, Sharpness(k=5), "k = 5 eigenvalues were asked for of 4"),
    ):
        subject.attach(instrument)
        instrument.begin(1)
        instrument.measure(1)
        assert instrument.harvest() is None
        assert message in subject.events[0][2]


# -- no observer effect ----------------------------------------------------------------------------------------------


def everything(model, optimizer):
    """Parameters, gradients, buffers, optimizer state, modes and random states, by identity and by content."""
    tensors = [t for p in model.parameters() for t in (p, p.grad)] + list(model.buffers())
    tensors += [t for s in optimizer.state.values() for t in s.values()]
    return (
        [(id(t), t.detach().reshape(-1).view(torch.uint8).tolist()) for t in tensors],
        [m.training for m in model.modules()],
        (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), torch.is_grad_enabled()),
        repr(optimizer.param_groups),
    )


def trained(tiny_llama, bench):
    model, batch = tiny_llama(0, dtype=torch.float32, attention_dropout=0.3)
    model.train()
    model.model.layers[0].eval()
    subject = bench(model, batch, torch.optim.AdamW(model.parameters(), lr=1e-2))
    model(**batch).loss.backward()
    subject.optimizer.step()
    return subject


@pytest.mark.parametrize("derivative", ["double_backward", "finite_difference"])
def test_nothing_is_changed(tiny_llama, bench, derivative):
    subject = trained(tiny_llama, bench)
    instrument = subject.attach(Sharpness(derivative=derivative))
    before = everything(subject.model, subject.optimizer)
    instrument.begin(1)
    instrument.measure(1)
    assert len(instrument.harvest().note) == 2
    assert everything(subject.model, subject.optimizer) == before


@pytest.mark.parametrize(
    "case",
    [
        ("double_backward", "forward", 1),
        ("double_backward", "product", 1),
        ("finite_difference", "forward", 1),
        ("auto", "forward", 2),
    ],
)
def test_nothing_is_changed_when_memory_runs_out(tiny_llama, bench, monkeypatch, case):
    derivative, where, attempts = case
    subject = trained(tiny_llama, bench)
    instrument = subject.attach(Sharpness(derivative=derivative))
    calls = 0

    def fail(*args, **kwargs):
        nonlocal calls
        calls += 1
        torch.rand(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    if where == "forward":
        monkeypatch.setattr(subject.model.model.layers[1].mlp, "forward", fail)
    else:
        monkeypatch.setattr("lm_telemetry.hooks.differentiate.RetainedHessian.matvec", fail)
    before = everything(subject.model, subject.optimizer)
    instrument.begin(1)
    with pytest.raises(torch.OutOfMemoryError):  # the agent's to catch
        instrument.measure(1)
    assert calls == attempts
    assert instrument.harvest() is None
    assert everything(subject.model, subject.optimizer) == before


@pytest.mark.parametrize(
    "setting",
    [
        {"k": 0},
        {"k": True},
        {"tolerance": 0},
        {"tolerance": 1.5},
        {"tolerance": "1"},
        {"max_hvps": 1},
        {"k": 5, "max_hvps": 4},
        {"operators": "fisher"},
        {"smallest": -1},
        {"smallest": 41},
        {"derivative": "forward"},
        {"micro_batch": 0},
        {"micro_batch": True},
        {"operators": ()},
        {"operators": ["hessian", "hessian"]},
        {"every": 0},
        {"depth": 3},
    ],
)
def test_settings_are_checked(setting):
    with pytest.raises(SettingsError, match=r"instruments\.sharpness"):
        Sharpness.build(**setting)
