"""Thresholds against real optimizers on a quadratic, and Adam's preconditioner against its definition."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lm_telemetry.hooks.optimizer import preconditioner, read_optimizer, unwrap_optimizer


def growth(optimizer, x, curvature):
    """Largest |x| in steps 80 to 100 on curvature x²/2, relative to steps 10 to 30."""
    sizes = []
    for _ in range(100):
        x.grad = curvature * x.detach().clone()
        optimizer.step()
        sizes.append(abs(x.item()))
    return max(sizes[80:]) / max(sizes[10:30])


SGD = {
    "plain": {},
    "heavy ball": {"momentum": 0.9},
    "light ball": {"momentum": 0.3},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "dampened": {"momentum": 0.9, "dampening": 0.5},
    "dampening without momentum": {"dampening": 0.5},
}


@pytest.mark.parametrize("name", SGD)
def test_sgd_is_stable_below_its_threshold_and_not_above(name):
    def run(share):
        x = nn.Parameter(torch.tensor(1e-3, dtype=torch.float64))
        optimizer = torch.optim.SGD([x], lr=0.05, **SGD[name])
        return growth(optimizer, x, share * read_optimizer(optimizer).threshold("hessian"))

    assert run(0.98) < 1
    assert run(1.02) > 1


@pytest.mark.parametrize("beta", [0.9, 0.5])
def test_adam_is_stable_below_its_threshold_and_not_above(beta):
    """A real AdamW whose second moment, 1, hardly moves: P = 1, so the eigenvalue is the curvature, 1."""

    def run(share):
        x = nn.Parameter(torch.tensor(1e-12, dtype=torch.float64))
        optimizer = torch.optim.AdamW([x], lr=1.0, betas=(beta, 1 - 1e-7), eps=1e-8, weight_decay=0.0)
        state = {"step": torch.tensor(1e9), "exp_avg": torch.zeros_like(x), "exp_avg_sq": torch.ones_like(x)}
        optimizer.state[x] = state
        assert preconditioner(optimizer, [x]).item() == pytest.approx(1.0, rel=1e-6)
        optimizer.param_groups[0]["lr"] = share * read_optimizer(optimizer).threshold("preconditioned")
        # threshold(lr) = 1 at lr = threshold(1), since it goes as 1/lr.
        assert read_optimizer(optimizer).threshold("preconditioned") == pytest.approx(1 / share)
        return growth(optimizer, x, 1.0)

    assert run(0.98) < 1
    assert run(1.02) > 1


def test_adam_threshold_by_the_formula():
    reading = read_optimizer(torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1e-3))
    assert reading.kind == "adam"
    assert reading.threshold("preconditioned") == pytest.approx(38 / 1e-3)
    assert reading.threshold("hessian") is None  # raw curvature is never compared under Adam
    assert reading.threshold("critical") == pytest.approx(2 / 1e-3)


def test_no_threshold_where_none_is_known():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    sgd, adam = torch.optim.SGD, torch.optim.Adam
    assert read_optimizer(sgd([a], lr=0.1)).threshold("preconditioned") is None
    assert read_optimizer(sgd([a], lr=0.0)).threshold("hessian") is None
    assert read_optimizer(sgd([a], lr=0.1, maximize=True)).threshold("hessian") is None
    assert read_optimizer(sgd([a], lr=0.1, momentum=0.9, dampening=1.0)).threshold("hessian") is None
    groups = [{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.2}]
    assert read_optimizer(sgd(groups)).threshold("hessian") is None
    assert not read_optimizer(sgd(groups)).uniform
    assert read_optimizer(sgd(groups)).learning_rate == 0.1
    betas = [{"params": [a], "betas": (0.9, 0.99)}, {"params": [b], "betas": (0.8, 0.99)}]
    assert read_optimizer(adam(betas)).threshold("preconditioned") is None
    for other in (torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam):
        reading = read_optimizer(other([a], lr=0.1))
        assert reading.kind == "unknown"
        assert reading.name == other.__name__
        assert reading.threshold("hessian") is None
        assert reading.threshold("preconditioned") is None
        assert reading.threshold("critical") == pytest.approx(20)


def test_groups_that_differ_in_weight_decay_alone_agree():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    groups = [{"params": [a], "weight_decay": 0.1}, {"params": [b], "weight_decay": 0.0}, {"params": [], "lr": 7.0}]
    assert read_optimizer(torch.optim.AdamW(groups, lr=0.1)).threshold("preconditioned") == pytest.approx(380)


def test_wrappers_are_seen_through(accelerator):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5, momentum=0.1)
    wrapped = accelerator().prepare_optimizer(optimizer)
    assert wrapped is not optimizer
    assert unwrap_optimizer(wrapped) is optimizer
    assert unwrap_optimizer(optimizer) is optimizer
    assert unwrap_optimizer(None) is None
    assert unwrap_optimizer(object()) is None
    assert read_optimizer(wrapped) == read_optimizer(optimizer)
    assert read_optimizer(wrapped).momentum == 0.1


VARIANTS = [{}, {"amsgrad": True}, {"foreach": True}, {"fused": True}, {"foreach": False, "lr": torch.tensor(0.01)}]


@pytest.mark.parametrize("options", VARIANTS, ids=["plain", "amsgrad", "foreach", "fused", "tensor lr"])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_preconditioner_by_its_definition(kind, options):
    """v by its recurrence from the gradients, in numbers of this test's own."""
    torch.manual_seed(0)
    shapes = [(3, 2), (4,), (1,)]
    parameters = [nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes]
    beta1, beta2, eps = 0.8, 0.95, 1e-3
    optimizer = kind(parameters, betas=(beta1, beta2), eps=eps, **({"lr": 0.01} | options))
    assert preconditioner(optimizer, parameters) is None
    second = [torch.zeros(s, dtype=torch.float64) for s in shapes]
    largest = [s.clone() for s in second]
    steps = [0, 0, 0]
    for t in range(3):
        for i, p in enumerate(parameters):
            # The second one is left out of the first step, so that its own count differs; the third always.
            p.grad = None if i == 2 or (i == 1 and t == 0) else torch.randn_like(p) / (t + 1)
            if p.grad is not None:
                steps[i] += 1
                second[i] = beta2 * second[i] + (1 - beta2) * p.grad**2
                largest[i] = torch.maximum(largest[i], second[i])
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    moment = largest if options.get("amsgrad") else second
    expected = [
        (1 - beta1**t) * ((v / (1 - beta2**t)).sqrt() + eps) for v, t in zip(moment[:2], steps[:2], strict=True)
    ]
    found = preconditioner(optimizer, parameters)
    assert torch.allclose(found[:10], torch.cat([e.reshape(-1) for e in expected]), rtol=1e-12)
    assert found[10].item() == torch.inf  # never stepped
    after = optimizer.state_dict()
    assert str(after) == str(before)


def test_preconditioner_of_bfloat16_is_float32():
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    diagonal = preconditioner(optimizer, [p])
    assert diagonal.dtype == torch.float32
    # One step with gradient 1: v/(1 - β2) = 1, and 1 - β1 = 0.1.
    assert diagonal.tolist() == pytest.approx([0.1] * 3, rel=1e-2)


def test_other_optimizers_have_no_preconditioner():
    p = nn.Parameter(torch.ones(3))
    assert preconditioner(torch.optim.SGD([p], lr=0.1), [p]) is None
