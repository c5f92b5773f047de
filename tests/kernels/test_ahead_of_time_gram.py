"""The Gram kernels compile for the GPUs we name: float64 on the tensor cores, no spilled registers on Hopper."""

from __future__ import annotations

import pytest
import torch

from .test_ahead_of_time import KEPT, NAMES, POINTERS, SHARED_MEMORY, TARGETS, compiled, resources, vector_spills

triton = pytest.importorskip("triton", reason="Triton is not installed")

from lm_telemetry.kernels import gram_kernel  # noqa: E402  -- after the skip where Triton is missing

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KERNELS = {
    "flag_tokens": gram_kernel.FLAG | {"HAS_KEEP": True},
    "mean_token": gram_kernel.MEAN,
    "token_products": gram_kernel.TILE | {"CENTER": True},
}
POINTED = {"rows": "*i64", "keep": "*u8", "used": "*u8", "mean": "*fp64", "out": "*fp64"}


def kernel(target, name, dtype):
    """As launched over sampled rows whose channels are adjacent."""
    constants = KERNELS[name] | {"HAS_ROWS": True, "col_s": 1}  # Triton specialises on strides of 1
    types = POINTED | {"x": POINTERS[dtype]}
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return compiled(
        getattr(gram_kernel, name), target, tuple(types.items()), tuple(constants.items()), tuple(options.items())
    )


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_on_hopper(name, dtype, tmp_path):
    found = kernel("sm_90", name, dtype)
    registers, stack = resources(found, tmp_path)
    assert stack == 0, f"registers are spilled ({registers} registers, {stack} bytes of stack)"
    assert registers <= 168, "fewer than three programs of 128 threads would share a multiprocessor"
    assert found.metadata.shared <= SHARED_MEMORY["sm_90"]


@pytest.mark.parametrize("target", TARGETS)
def test_products_are_float64_on_the_tensor_cores(target):
    found = kernel(target, "token_products", torch.bfloat16)
    assembly, instruction = ("amdgcn", "v_mfma_f64") if target == "gfx942" else ("ptx", "f64.f64.f64.f64")
    assert instruction in found.asm[assembly]


@pytest.mark.parametrize("target", KEPT)
def test_elsewhere(target):
    for name in KERNELS:
        found = kernel(target, name, torch.float32)
        assert found.metadata.shared <= SHARED_MEMORY[target]
        if target == "gfx942":
            assert vector_spills(found) == 0
