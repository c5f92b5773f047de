"""Heads' writes against the projection's own output, which is their sum, and against closed forms in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lm_telemetry.hooks import head_writes
from lm_telemetry.hooks.head_writes import head_slices, write_norms

HEADS, DV, WIDTH = 4, 6, 20


class Adapted(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.out = inner

    def forward(self, x):
        return self.out(x)


def lora(inner, **settings):
    """The inner map within LoRA whose B is not zero, as it is after some training."""
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["out"], **settings)
    layer = get_peft_model(Adapted(inner), config).base_model.model.out
    for up in layer.lora_B.values():
        nn.init.normal_(up.weight)
    return layer


def linear():
    return nn.Linear(HEADS * DV, WIDTH)


def conv():
    layer = Conv1D(WIDTH, HEADS * DV)
    nn.init.normal_(layer.bias)
    return layer


PROJECTIONS = {
    "linear": linear,
    "conv1d": conv,
    "lora": lambda: lora(linear()),
    "lora on conv1d": lambda: lora(conv(), fan_in_fan_out=True),
    "merged lora": lambda: merged(lora(linear())),
    "disabled lora": lambda: disabled(lora(linear())),
}


def merged(layer):
    layer.merge()
    return layer


def disabled(layer):
    layer.enable_adapters(enabled=False)
    return layer


def projection(name):
    torch.manual_seed(0)
    return PROJECTIONS[name]().double()


@pytest.mark.parametrize("name", PROJECTIONS)
def test_writes_sum_to_the_output_without_its_bias(name):
    output = projection(name)
    x = torch.randn(3, 5, HEADS * DV, dtype=torch.float64)
    slices = head_slices(output, HEADS)
    assert slices.shape == (HEADS, DV, WIDTH)
    writes = torch.einsum("bshd,hdw->bshw", x.unflatten(-1, (HEADS, DV)), slices)
    bias = output(torch.zeros_like(x))
    torch.testing.assert_close(writes.sum(2), output(x) - bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [2, 500], ids=["product", "gram"])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_norm_is_the_output_with_every_other_head_silent(name, n):
    output = projection(name)
    x = torch.randn(n, HEADS * DV, dtype=torch.float64)
    norms = write_norms(x, output, HEADS, index=None)
    bias = output(torch.zeros_like(x))
    for head in range(HEADS):
        alone = torch.zeros_like(x)
        alone[:, head * DV : (head + 1) * DV] = x[:, head * DV : (head + 1) * DV]
        expected = (output(alone) - bias).norm(dim=-1)
        torch.testing.assert_close(norms[:, head], expected, rtol=1e-9, atol=1e-12)


@given(
    heads=st.integers(1, 5),
    dv=st.integers(1, 7),
    width=st.integers(1, 30),
    n=st.integers(0, 60),
    chunk=st.sampled_from([1, 50, 1 << 24]),
)
@settings(deadline=None, max_examples=60)
def test_any_shape_in_any_chunks(heads, dv, width, n, chunk):
    torch.manual_seed(heads + n)
    output = nn.Linear(heads * dv, width, dtype=torch.float64)
    x = torch.randn(n, heads * dv, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_writes, "_CHUNK", chunk)
        norms = write_norms(x, output, heads, index=None)
    weight = output.weight.detach().T
    for head in range(heads):
        own = slice(head * dv, (head + 1) * dv)
        torch.testing.assert_close(norms[:, head], (x[:, own] @ weight[own]).norm(dim=-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [2, 300], ids=["product", "gram"])
def test_half_precision_is_summed_in_float32(dtype, n):
    torch.manual_seed(1)
    output = nn.Linear(4 * 32, 128, dtype=dtype)
    x = torch.randn(n, 4 * 32).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norms = write_norms(x, output, 4, index=None)
    exact = nn.Linear(4 * 32, 128).double()
    exact.weight.data = output.weight.data.double()
    reference = write_norms(x.double(), exact, 4, index=None)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), reference, rtol=2e-6, atol=0)


def test_index_takes_flattened_tokens():
    output = projection("linear")
    x = torch.randn(3, 5, HEADS * DV, dtype=torch.float64)
    index = torch.tensor([14, 0, 7])
    taken = write_norms(x, output, HEADS, index=index)
    torch.testing.assert_close(taken, write_norms(x, output, HEADS, index=None)[index])
    assert taken.shape == (3, HEADS)


def test_no_graph_and_nothing_changed():
    output = linear()
    x = torch.randn(4, HEADS * DV, requires_grad=True)
    norms = write_norms(x, output, HEADS, index=None)
    assert not norms.requires_grad
    assert output.weight.grad is None
    assert head_slices(output, HEADS).data_ptr() == output.weight.data_ptr()


def test_a_nan_stays_in_its_token_and_head():
    x = torch.randn(300, HEADS * DV)
    x[2, DV] = torch.nan
    found = write_norms(x, linear(), HEADS, index=None).isnan().nonzero()
    assert found.tolist() == [[2, 1]]


class Quantised(nn.Linear):
    def __init__(self):
        super().__init__(HEADS * DV, WIDTH)
        self.weight = nn.Parameter(torch.zeros(HEADS * DV * WIDTH // 2, 1, dtype=torch.uint8), requires_grad=False)


def ia3():
    from peft import IA3Config

    config = IA3Config(target_modules=["out"], feedforward_modules=[])
    return get_peft_model(Adapted(linear()), config).base_model.model.out


UNTOLD = {
    "quantised": Quantised,
    "8-bit floats": lambda: linear().to(torch.float8_e4m3fn),
    "absent": lambda: nn.Linear(HEADS * DV, WIDTH, device="meta"),
    "indivisible": lambda: nn.Linear(HEADS * DV + 1, WIDTH),
    "not linear": lambda: nn.LayerNorm(HEADS * DV),
    "DoRA": lambda: lora(linear(), use_dora=True),
    "IA3": ia3,
}


@pytest.mark.parametrize("name", UNTOLD)
def test_what_cannot_be_told_is_none(name):
    output = UNTOLD[name]()
    assert head_slices(output, HEADS) is None
    assert write_norms(torch.randn(2, HEADS * DV), output, HEADS, index=None) is None


def test_an_input_of_another_width_is_none():
    assert write_norms(torch.randn(2, HEADS * DV + HEADS), linear(), HEADS, index=None) is None
