"""Curvature under mixed precision: double backward stays within one per cent of float32."""

from __future__ import annotations

import pytest
import torch
from tiny_models import batch, build

from lm_telemetry import Curvature


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_top_eigenvalue_under_autocast(name, dtype):
    model, inputs = build(name), batch()
    right = Curvature(model, inputs).sharpness(tolerance=1e-4)
    with torch.autocast("cpu", dtype):
        found = Curvature(model, inputs).sharpness(tolerance=1e-3)
    assert found.converged
    assert found.derivative == "double_backward"
    assert found.value == pytest.approx(right.value, rel=1e-2)
    assert found.value != right.value  # it did run in the lower precision
