"""The cross-entropy HVP kernel compiles for the GPUs we name: no spilled registers on Hopper, no exotic needs."""

from __future__ import annotations

import pytest
import torch

from .test_ahead_of_time import KEPT, NAMES, POINTERS, SHARED_MEMORY, TARGETS, resources, vector_spills

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.compiler import ASTSource  # noqa: E402  -- after the skip where Triton is missing

from lm_telemetry.kernels.cross_entropy_hvp_kernel import hvp_row, launch_options  # noqa: E402

CASES = [  # logits, tangent, vocabulary
    (torch.bfloat16, torch.bfloat16, 128_256),
    (torch.float32, torch.float32, 128_256),
    (torch.float16, torch.float32, 50_257),
    (torch.bfloat16, torch.bfloat16, 50_257),
    (torch.float32, torch.float32, 256),
]


def compiled(target, logits, tangent, vocabulary):
    """As launched over `tangent`; rows are aligned where the vocabulary's size lets them be."""
    options = launch_options(vocabulary)
    constants = {"BLOCK": options.pop("BLOCK"), "labels_stride": 1}  # Triton specialises on strides of 1
    types = {"logits": POINTERS[logits], "tangent": POINTERS[tangent], "out": POINTERS[tangent], "labels": "*i64"}
    types |= {"scale": "fp32"}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in hvp_row.arg_names}
    aligned = [n for n in hvp_row.arg_names if signature[n].startswith("*")]
    if vocabulary % 16 == 0:
        aligned += ["width", "logits_stride", "tangent_stride", "out_stride"]
    attributes = {(hvp_row.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    return triton.compile(
        ASTSource(hvp_row, signature, constants, attributes),
        target=TARGETS[target],
        options=options | {"enable_fp_fusion": True},
    )


def name(value):
    return NAMES.get(value, value)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(name(value)) for value in case))
def test_on_hopper(case, tmp_path):
    kernel = compiled("sm_90", *case)
    registers, stack = resources(kernel, tmp_path)
    assert stack == 0, f"registers are spilled ({registers} registers, {stack} bytes of stack)"
    assert registers <= 80, "fewer than three programs of 256 threads would share a multiprocessor"
    assert kernel.metadata.shared <= SHARED_MEMORY["sm_90"]


def test_aligned_rows_are_read_sixteen_bytes_at_a_time():
    """What the order of columns among lanes is for: the kernel is bound by memory."""
    assert "ld.global.v4.b32" in compiled("sm_90", *CASES[0]).asm["ptx"]


@pytest.mark.parametrize("target", KEPT)
def test_elsewhere(target):
    for case in CASES[:2]:
        kernel = compiled(target, *case)
        assert kernel.metadata.shared <= SHARED_MEMORY[target]
        if target == "gfx942":
            assert vector_spills(kernel) == 0
