"""The attention-column kernel compiles for the GPUs we name: no spilled registers on Hopper, enough shared memory."""

from __future__ import annotations

import pytest
import torch

from .test_ahead_of_time import KEPT, NAMES, POINTERS, SHARED_MEMORY, compiled, resources, vector_spills

triton = pytest.importorskip("triton", reason="Triton is not installed")

from lm_telemetry.kernels.attention_columns_kernel import (  # noqa: E402  -- after the skip where Triton is missing
    block_sizes,
    column_kernel,
    launch_options,
)

PLAIN = {"CAUSAL": True}
PACKED = {"CAUSAL": True, "HAS_SEGMENTS": True, "HAS_WINDOW": True}
BOOL = {"HAS_BOOL_MASK": True}
FULL = dict.fromkeys(
    ["CAUSAL", "HAS_WINDOW", "HAS_OWN_KEYS", "HAS_SEGMENTS", "HAS_BIAS", "HAS_SOFTCAP", "HAS_ADDED_MASK"], True
)
CASES = [  # dtype, head width, what the call has
    (torch.bfloat16, 128, PLAIN),
    (torch.bfloat16, 64, PLAIN),
    (torch.bfloat16, 128, PACKED),
    (torch.bfloat16, 128, BOOL),
    (torch.bfloat16, 128, FULL),
    (torch.bfloat16, 256, PLAIN),
    (torch.bfloat16, 256, FULL),
    (torch.float16, 80, BOOL),
    (torch.float32, 64, FULL),
    (torch.float32, 128, PLAIN),
    (torch.float32, 256, FULL),
]


def column(target, dtype, width, present):
    whole_head = dtype != torch.float32
    flags = [n for n in column_kernel.arg_names if n.startswith("HAS_")]
    sizes = block_sizes(4096, width, whole_head=whole_head)
    constants = dict.fromkeys(["CAUSAL", "UPCAST", *flags], False) | present | sizes
    # Triton specialises on strides of 1.
    constants |= dict.fromkeys(["own_keys_n", "segments_n", "mask_k", "bias_k"], 1)
    types = {"query": POINTERS[dtype], "key": POINTERS[dtype], "log_total": "*fp32", "mass": "*fp32"}
    types |= {"own_keys": "*i64", "segments": "*i32", "bias": POINTERS[dtype], "scale": "fp32", "softcap": "fp32"}
    types |= {"mask": "*u8" if present.get("HAS_BOOL_MASK") else POINTERS[dtype], "mask_bound": "fp32"}
    options = launch_options(sizes, whole_head=whole_head)
    return compiled(column_kernel, target, tuple(types.items()), tuple(constants.items()), tuple(options.items()))


def name(case):
    dtype, width, present = case
    return "-".join((NAMES[dtype], str(width), *(["FULL"] if present is FULL else present)))


@pytest.mark.parametrize("case", CASES, ids=name)
def test_on_hopper(case, tmp_path):
    kernel = column("sm_90", *case)
    registers, stack = resources(kernel, tmp_path)
    assert stack == 0, f"registers are spilled ({registers} registers, {stack} bytes of stack)"
    assert kernel.metadata.shared <= SHARED_MEMORY["sm_90"]


@pytest.mark.parametrize("target", KEPT)
def test_elsewhere(target):
    for case in ((torch.bfloat16, 128, PLAIN), (torch.bfloat16, 256, FULL), (torch.float32, 128, PLAIN)):
        kernel = column(target, *case)
        assert kernel.metadata.shared <= SHARED_MEMORY[target]
        if target == "gfx942":
            assert vector_spills(kernel) == 0
