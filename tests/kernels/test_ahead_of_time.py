"""Every kernel compiles for the GPUs we name, without one: no spilled registers on Hopper, shared memory that fits.

What the compiler cannot tell, whether the numbers are right on a device, is for the `gpu` tests.
"""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from real_parts import missing

from lm_telemetry.kernels.attention_rows_geometry import HIDDEN, LOCAL_WINDOW

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402  -- after the skip where Triton is missing
from triton.compiler import ASTSource  # noqa: E402

from lm_telemetry.kernels import attention_rows_kernel, moments_kernel  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: this process interprets and cannot compile", allow_module_level=True)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes a program may use on each."""

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
PLAIN = {"CAUSAL": True}
FLAGS = [n for n in attention_rows_kernel.row_kernel.arg_names if n.startswith("HAS_")]
FULL = dict.fromkeys(["CAUSAL", *FLAGS], True)
MASKED = dict.fromkeys(["CAUSAL", "HAS_KEEP", "HAS_FIRST", "HAS_MASK", "HAS_INDUCTION"], True)
PACKED = dict.fromkeys(["CAUSAL", "HAS_FIRST", "HAS_SEGMENTS", "HAS_INDUCTION"], True)
LSE = {"CAUSAL": True, "LSE_ONLY": True}
LSE_FULL = {n: n not in {"HAS_KEEP", "HAS_INDUCTION"} for n in FULL} | {"LSE_ONLY": True}
ROWS = [  # dtype, head width, rows a key-value head, what the call has
    (torch.bfloat16, 64, 128, MASKED),
    (torch.bfloat16, 128, 128, PLAIN),
    (torch.bfloat16, 128, 32, FULL),
    (torch.bfloat16, 256, 128, FULL),
    (torch.float16, 80, 128, {}),
    (torch.float32, 64, 128, FULL),
    (torch.float32, 128, 32, PLAIN),
    (torch.float32, 256, 128, MASKED),
    (torch.bfloat16, 128, 128, PACKED),
    (torch.bfloat16, 128, 128, LSE),
    (torch.bfloat16, 256, 128, LSE_FULL),
    (torch.float32, 128, 128, LSE_FULL),
]
WIDTHS = [
    (torch.bfloat16, 256),
    (torch.bfloat16, 4096),
    (torch.float32, 768),
    (torch.float32, 8192),
    (torch.bfloat16, 8192),
]

KEPT = ["sm_80", "sm_100", "gfx942"]
"""Targets on which two variants stand for all; sm_90 compiles every one."""


@cache
def compiled(kernel, target, types, constants, options):
    """A kernel for a target; `types` by argument, the other arguments int32; constants are specialised on."""
    constants, types = dict(constants), dict(types)
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    # As at a launch: allocations are aligned, and strides of whole heads, rows and padded masks are multiples of 16.
    aligned = [i for i, n in enumerate(kernel.arg_names) if signature[n] != "constexpr" and _aligned(n, signature[n])]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=dict(options))


def _aligned(name, type_):
    return type_.startswith("*") or re.fullmatch(r"stride|(query|key|mask|bias)_\w", name) is not None


def rows_kernel(target, dtype, width, n_rows, present):
    whole_head = dtype != torch.float32
    constants = dict.fromkeys(["CAUSAL", *FLAGS, "LSE_ONLY"], False) | present
    constants |= {"UPCAST": False, "LOCAL": LOCAL_WINDOW, "HIDDEN": HIDDEN}
    constants |= attention_rows_kernel.block_sizes(n_rows, width, whole_head=whole_head)
    ones = ["positions_n", "own_n", "keep_n", "first_key_n", "induction_key_n", "segments_j", "sinks_h"]
    constants |= dict.fromkeys(ones, 1)  # Triton specialises on strides of 1
    types = {"query": POINTERS[dtype], "key": POINTERS[dtype], "rows": "*fp32", "positions": "*i64", "keep": "*u8"}
    types |= dict.fromkeys(["own", "first_key", "induction_key"], "*i64") | {"segments": "*i32", "sinks": "*fp32"}
    types |= {"mask": "*fp32", "bias": "*fp32", "scale": "fp32", "softcap": "fp32"}
    options = attention_rows_kernel.launch_options(whole_head=whole_head)
    return compiled(
        attention_rows_kernel.row_kernel,
        target,
        tuple(types.items()),
        tuple(constants.items()),
        tuple(options.items()),
    )


def tile_kernel(target, dtype, width, *, sampled=True):
    block_n, block_d, warps = moments_kernel.tile_shape(width)
    return compiled(
        moments_kernel.tile_moments,
        target,
        (("x", POINTERS[dtype]), ("rows", "*i64"), ("keep", "*u8"), ("partials", "*fp64"), ("outlier_rms", "fp32")),
        (("HAS_ROWS", sampled), ("HAS_KEEP", sampled), ("BLOCK_N", block_n), ("BLOCK_D", block_d)),
        (("num_warps", warps), ("enable_fp_fusion", True)),
    )


def merge_kernel(target):
    return compiled(
        moments_kernel.merge_tiles,
        target,
        (("partials", "*fp64"), ("out", "*fp64")),
        (("BLOCK", 128),),
        (("num_warps", 4), ("enable_fp_fusion", True)),
    )


def resources(kernel, tmp_path):
    """(registers, bytes of stack) a thread takes, read from the binary; a stack is where registers are spilled."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not cuobjdump.exists():
        missing("cuobjdump in Triton's wheel")
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    printed = subprocess.run([cuobjdump, "--dump-resource-usage", binary], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", printed.stdout).groups()
    return int(registers), int(stack)


def vector_spills(kernel):
    """Vector registers an AMD kernel spills, from its own metadata."""
    return int(re.search(r"\.vgpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"]).group(1))


def row_name(case):
    dtype, width, n_rows, present = case
    names = {id(v): k for k, v in globals().items() if k.isupper()}
    return f"{NAMES[dtype]}-{width}-{n_rows}-{names.get(id(present), 'bare').lower()}"


@pytest.mark.parametrize("case", ROWS, ids=row_name)
def test_attention_rows_on_hopper(case, tmp_path):
    kernel = rows_kernel("sm_90", *case)
    registers, stack = resources(kernel, tmp_path)
    assert stack == 0, f"registers are spilled ({registers} registers, {stack} bytes of stack)"
    assert kernel.metadata.shared <= SHARED_MEMORY["sm_90"]


@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "all tokens"])
@pytest.mark.parametrize(("dtype", "width"), WIDTHS, ids=lambda v: NAMES.get(v, v))
def test_moments_on_hopper(dtype, width, sampled, tmp_path):
    kernel = tile_kernel("sm_90", dtype, width, sampled=sampled)
    registers, stack = resources(kernel, tmp_path)
    assert stack == 0, f"registers are spilled ({registers} registers, {stack} bytes of stack)"
    assert kernel.metadata.shared <= SHARED_MEMORY["sm_90"]


@pytest.mark.parametrize("target", KEPT)
def test_attention_rows_elsewhere(target):
    for case in ((torch.bfloat16, 256, 128, FULL), (torch.float32, 128, 128, PLAIN), (torch.bfloat16, 128, 128, LSE)):
        kernel = rows_kernel(target, *case)
        assert kernel.metadata.shared <= SHARED_MEMORY[target]
        if target == "gfx942":
            assert vector_spills(kernel) == 0


@pytest.mark.parametrize("target", ["sm_90", *KEPT])
def test_moments_elsewhere(target):
    for kernel in (tile_kernel(target, torch.bfloat16, 4096), merge_kernel(target)):
        assert kernel.metadata.shared <= SHARED_MEMORY[target]
        if target == "gfx942":
            assert vector_spills(kernel) == 0
