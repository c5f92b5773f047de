"""The attention-edge kernel compiles for the GPUs we name: no spilled registers on Hopper, shared memory that fits."""

from __future__ import annotations

import pytest
import torch

from .test_ahead_of_time import KEPT, NAMES, POINTERS, SHARED_MEMORY, compiled, resources, vector_spills

pytest.importorskip("triton", reason="Triton is not installed")

from lm_telemetry.kernels.attention_edges_kernel import (
    LOWEST,
    block_sizes,
    edge_kernel,
    launch_options,
)
from lm_telemetry.kernels.attention_rows_geometry import HIDDEN

FLAGS = tuple(name for name in edge_kernel.arg_names if name.startswith("HAS_"))
CASES = [  # dtype, head width, rows a key-value head, edges a row, what the call has
    (torch.bfloat16, 64, 128, 4, ("HAS_WEIGHT",)),
    (torch.bfloat16, 128, 128, 4, ("HAS_WEIGHT",)),
    (torch.bfloat16, 128, 16, 16, FLAGS),
    (torch.bfloat16, 256, 128, 16, FLAGS),
    (torch.float16, 80, 128, 1, ()),
    (torch.float32, 64, 128, 4, FLAGS),
    (torch.float32, 128, 32, 4, ("HAS_WEIGHT",)),
    (torch.float32, 256, 128, 16, FLAGS),
]


def kernel_for(target, case):
    dtype, width, n_rows, k, present = case
    constants = {flag: flag in present for flag in FLAGS}
    constants |= {"UPCAST": False, "HIDDEN": HIDDEN, "LOWEST": LOWEST, "positions_n": 1}
    constants |= block_sizes(n_rows, width, k, whole_head=dtype != torch.float32)
    types = {"query": POINTERS[dtype], "key": POINTERS[dtype], "keys_out": "*i64", "positions": "*i64"}
    types |= dict.fromkeys(["weight", "mask", "bias", "sinks", "mass_out", "flow_out", "total_out"], "*fp32")
    types |= {"scale": "fp32", "softcap": "fp32"}
    return compiled(
        edge_kernel, target, tuple(types.items()), tuple(constants.items()), tuple(launch_options().items())
    )


def name(case):
    dtype, width, n_rows, k, present = case
    return f"{NAMES[dtype]}-{width}-{n_rows}-{k}-{len(present)}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_on_hopper(case, tmp_path):
    kernel = kernel_for("sm_90", case)
    registers, stack = resources(kernel, tmp_path)
    assert stack == 0, f"registers are spilled ({registers} registers, {stack} bytes of stack)"
    assert kernel.metadata.shared <= SHARED_MEMORY["sm_90"]


@pytest.mark.parametrize("target", KEPT)
def test_elsewhere(target):
    for case in (CASES[3], CASES[6]):
        kernel = kernel_for(target, case)
        assert kernel.metadata.shared <= SHARED_MEMORY[target]
        if target == "gfx942":
            assert vector_spills(kernel) == 0
