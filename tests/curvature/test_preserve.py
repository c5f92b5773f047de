"""Whatever happens inside `preserved`, nothing outside can tell."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lm_telemetry.errors import ModelError
from lm_telemetry.hooks.preserve import COPIED_BUFFER_BYTES, evaluating, preserved


class Restless(nn.Module):
    """Everything a forward should not do, and some do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("average", torch.tensor([0.0, -0.0, torch.nan, 1.0]))
        self.register_buffer("replaced", torch.ones(2), persistent=False)
        self.register_buffer("empty", None)
        self.register_buffer("expanded", torch.ones(1).expand(5))

    def forward(self, x):
        self.calls.add_(1)
        self.average.copy_(torch.tensor([-0.0, 0.0, 2.0, torch.nan]))
        self.replaced = self.replaced * 2
        if "scratch" not in self._buffers:
            self.register_buffer("scratch", torch.ones(1))
        random.random()
        np.random.rand()
        return SimpleNamespace(loss=self.drop(self.norm(self.linear(x))).square().sum())


def bits(tensor):
    return None if tensor is None else tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def picture(model):
    """All that must not change: contents, identities, modes, random states."""
    return {
        "random": random.getstate(),
        "numpy": [str(part) for part in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
        "modes": [(name, m.training) for name, m in model.named_modules()],
        "parameters": [(n, id(p), bits(p), p.requires_grad) for n, p in model.named_parameters()],
        "gradients": [(n, id(p.grad), bits(p.grad)) for n, p in model.named_parameters()],
        "buffers": [(n, k, id(b), bits(b)) for n, m in model.named_modules() for k, b in m._buffers.items()],
    }


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Restless()
    model.linear.weight.grad = torch.full((4, 4), 3.0)  # others have none
    model.norm.eval()  # kept in eval mode inside a model that trains, as fine-tuning does
    return model


def havoc(model):
    """Train a little, break everything."""
    model(torch.randn(8, 4)).loss.backward()
    model.train(not model.training)
    model(torch.randn(8, 4)).loss.backward()
    model.zero_grad(set_to_none=False)
    torch.set_grad_enabled(False)


@pytest.mark.parametrize("frame", [preserved, evaluating])
def test_nothing_is_changed(model, frame):
    before = picture(model)
    with frame(model):
        havoc(model)
        assert picture(model) != before
    assert picture(model) == before


@pytest.mark.parametrize("frame", [preserved, evaluating])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()])
def test_nothing_is_changed_by_an_exception(model, frame, error):
    before = picture(model)

    def fail():
        havoc(model)
        raise error

    with pytest.raises(type(error)), frame(model):
        fail()
    assert picture(model) == before


def test_the_random_stream_goes_on_where_it_was(model):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first, second = draw(), draw()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert draw() == first
    with preserved(model):
        draw()
    assert draw() == second


def test_gradients_inside_are_others(model):
    gradient = model.linear.weight.grad
    with preserved(model):
        assert model.linear.weight.grad is None
        model(torch.randn(8, 4)).loss.backward()
    assert model.linear.weight.grad is gradient
    assert bits(gradient) == bits(torch.full((4, 4), 3.0))


def test_a_graph_that_saved_a_buffer_stays_valid(model):
    """Restoring must not raise a version counter, or a backward pass under way would fail."""
    x = torch.ones(4, requires_grad=True)
    loss = (x * model.average).sum()
    with preserved(model):
        pass
    loss.backward()
    assert bits(x.grad) == bits(model.average)


def test_evaluating_sets_flags_and_calls_no_method():
    class Merging(nn.Module):
        def train(self, mode=True):
            raise AssertionError("adapters would be merged here")

    model = nn.Sequential(nn.Dropout(0.5), Merging())
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert all(m.training for m in model.modules())


def test_a_write_to_a_large_buffer_is_refused_aloud():
    model = nn.Linear(2, 2)
    model.register_buffer("codebook", torch.zeros(COPIED_BUFFER_BYTES // 4 + 1))
    with preserved(model):
        model.codebook.sum()
    model.weight.grad = torch.ones(2, 2)
    with pytest.raises(ModelError, match=r"large buffers \(codebook\)"), preserved(model):
        model.codebook.add_(1)
    assert bits(model.weight.grad) == bits(torch.ones(2, 2))  # the rest was restored all the same


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_random_state():
    model = nn.Dropout(0.5).cuda()
    model.register_buffer("b", torch.zeros(1, device="cuda"))
    before = torch.cuda.get_rng_state()
    with preserved(model):
        model(torch.ones(100, device="cuda"))
        assert not torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.equal(torch.cuda.get_rng_state(), before)
