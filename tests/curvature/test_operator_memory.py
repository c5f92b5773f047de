"""Peaks of memory of the operators beside that of one gradient: the allocator's bytes, from torch's profiler."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lm_telemetry.hooks.curvature_operator import curvature_operator
from lm_telemetry.hooks.probe import Probe

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}


def peak(work):
    """Largest number of bytes allocated during `work` beyond those before it."""
    work()  # what is made once only: lazily built tables, workspaces
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    total = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest


@pytest.fixture(scope="module")
def subject():
    """A Llama of 0.22 M parameters and 4x64 tokens: a gradient's peak is seven times the parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    ids = torch.randint(0, 256, (4, 64))
    probe = Probe()
    probe.freeze({"input_ids": ids, "labels": ids.clone()}, model=model)
    return model, probe, list(model.parameters())


def gradient(model, probe, parameters):
    return lambda: torch.autograd.grad(probe.loss(model), parameters)


def product(model, probe, parameters, **options):
    vector = torch.randn(sum(p.numel() for p in parameters), generator=torch.Generator().manual_seed(0))

    def work():
        with curvature_operator(model, probe, parameters, **options) as hessian:
            hessian.matvec(vector)

    return work


def test_finite_differences_beside_one_gradient(subject):
    """Twice the parameters more, a sample of 16,384 coordinates, and small change: here 1.33 gradients."""
    parameters = subject[2]
    size = sum(p.numel() * p.element_size() for p in parameters)
    one = peak(gradient(*subject))
    assert size < 0.2 * one, "the case is to be one with activations, where the bound of 1.6 means something"
    used = peak(product(*subject, derivative="finite_difference"))
    assert used < 1.6 * one
    assert used < one + 2 * size + 16_384 * (8 + 4 * 4) + 2**17
    assert used > one + 2 * size, "what is counted must be seen"


def test_micro_batches_bound_the_memory(subject):
    one = peak(gradient(*subject))
    whole = {d: peak(product(*subject, derivative=d)) for d in ("finite_difference", "double_backward")}
    pieces = {d: peak(product(*subject, derivative=d, micro_batch=1)) for d in whole}
    # A quarter of the activations; the graph of one sequence instead of four. Measured 0.59 and 1.8 gradients.
    assert pieces["finite_difference"] < 0.7 * one
    assert pieces["double_backward"] < 0.4 * whole["double_backward"]
    # What keeping the graph costs: measured 4.9 gradients.
    assert 3 * one < whole["double_backward"] < 5.5 * one


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_its_saving(subject, reentrant):
    """Within finite differences, though the model is in eval mode there."""
    model, _, parameters = subject
    size = sum(p.numel() * p.element_size() for p in parameters)
    plain = peak(product(*subject, derivative="finite_difference"))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    try:
        saved = peak(product(*subject, derivative="finite_difference"))
    finally:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
    # Measured 0.38 gradients with checkpointing and 1 without; the copies are the same.
    assert saved - 2 * size < 0.6 * (plain - 2 * size)
