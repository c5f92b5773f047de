"""What the curvature tests share: a tiny Llama, its dense Hessian by another route, and a stand-in for the agent."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lm_telemetry.hooks.parameter_tap import ParameterTap
from lm_telemetry.hooks.probe import Probe
from lm_telemetry.instruments.base import Attachment

torch.set_num_threads(1)


def _tiny_llama(seed=0, *, dtype=torch.float64, **config):
    """A Llama of about 1,400 parameters and a batch (2, 8) with labels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
    }
    model = LlamaForCausalLM(LlamaConfig(**(sizes | config))).to(dtype)
    ids = torch.randint(0, 16, (2, 8))
    return model, {"input_ids": ids, "labels": ids.clone()}


def _dense_hessian(loss, parameters):
    """The Hessian by forward-over-reverse through `torch.func`, another route than double backward; (P, P)."""
    shapes = [p.shape for p in parameters.values()]

    def flat(vector):
        pieces = vector.split([s.numel() for s in shapes])
        return loss({n: x.view(s) for n, x, s in zip(parameters, pieces, shapes, strict=True)})

    hessian = torch.func.hessian(flat)(torch.cat([p.detach().reshape(-1) for p in parameters.values()]))
    return (hessian + hessian.T) / 2


def _dense_llama_hessian(model, batch):
    """Of a model's trainable parameters, with eager attention, so that no fused kernel is shared with the subject."""
    used, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("eager")
    model.eval()
    arguments = dict(batch) | {"use_cache": False}
    try:
        return _dense_hessian(
            lambda values: torch.func.functional_call(model, values, (), arguments).loss,
            {n: p for n, p in model.named_parameters() if p.requires_grad},
        )
    finally:
        model.set_attn_implementation(used)
        model.train(training)


class Quadratic(nn.Module):
    """L(w) = (w - c)'H(w - c)/2 + offset, whatever the batch says."""

    def __init__(self, hessian, start, offset=1.0):
        super().__init__()
        self.w = nn.Parameter(start.clone())
        self.register_buffer("hessian", hessian)
        self.offset = offset

    def forward(self, x):
        return SimpleNamespace(loss=self.w @ self.hessian @ self.w / 2 + self.offset + 0 * x.sum())


@dataclass
class Bench:
    """A model with what the agent would give an instrument, and the events it was told."""

    model: nn.Module
    batch: dict | None
    optimizer: torch.optim.Optimizer | None
    events: list = field(default_factory=list)
    requests: list = field(default_factory=list)
    grad_norm: torch.Tensor | float | None = None

    def __post_init__(self):
        self.parameters = ParameterTap(self.model)
        self.probe = Probe()
        if self.batch is not None:
            self.probe.freeze(self.batch, model=self.model)

    def attach(self, instrument):
        instrument.attach(
            Attachment(
                model=self.model,
                topology=None,
                probe=self.probe,
                parameters=self.parameters,
                optimizer=lambda: self.optimizer,
                event=lambda severity, kind, message, **fields: self.events.append((severity, kind, message)),
                request=self.requests.append,
                grad_norm=lambda: self.grad_norm,
                world_size=1,
            )
        )
        return instrument

    def step(self, instrument, number, *, scheduler=None):
        """One optimizer step as the agent runs it; the rows of `curvature` it leaves, as dictionaries."""
        instrument.begin(number)
        self.optimizer.zero_grad()
        self.model(**self.batch).loss.backward()
        self.parameters.snapshot(keep=True)
        instrument.before_update()
        self.optimizer.step()
        instrument.after_update()
        if scheduler is not None:
            scheduler.step()
        instrument.measure(number)
        harvest = instrument.harvest()
        self.parameters.release()
        if harvest is None:
            return []
        columns = instrument.rows({}, harvest.note)["curvature"]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@pytest.fixture
def accelerator():
    """A maker of Accelerators, whose process-wide state is forgotten before and after."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda **options: Accelerator(cpu=True, **options)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def tiny_llama():
    return _tiny_llama


@pytest.fixture
def dense_hessian():
    return _dense_hessian


@pytest.fixture
def dense_llama_hessian():
    return _dense_llama_hessian


@pytest.fixture
def quadratic():
    return Quadratic


@pytest.fixture
def bench():
    return Bench
