"""Registers, spills and shared memory of every kernel on the GPUs we name, compiled without one.

A variant is a call of a public function. It runs with the CPU passed off as a device that Triton compiles for, and with
launches recorded instead of made; what was recorded is then compiled for each target, specialised as a launch would
be. So a row holds for the kernel, block sizes and options that such a call really uses.

    python benchmarks/kernel_resources.py              # appends rows to benchmarks/results/kernel_resources.csv
    python benchmarks/kernel_resources.py --only gram  # variants whose name contains this; writes nothing

Columns: registers a thread; bytes of stack a thread, where registers are spilled; bytes of shared memory and warps of a
program. What they allow on a multiprocessor, and time, are not here.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import triton
from rows import append
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from lm_telemetry.kernels import dispatch
from lm_telemetry.kernels.attention_columns import received_mass
from lm_telemetry.kernels.attention_edges import attention_edges
from lm_telemetry.kernels.attention_rows import attention_lse, attention_rows
from lm_telemetry.kernels.cross_entropy_hvp import cross_entropy_hvp
from lm_telemetry.kernels.gram import gram
from lm_telemetry.kernels.moments import moments

if TYPE_CHECKING:
    from collections.abc import Callable

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
S, HEADS, KV_HEADS = 1024, 8, 2


def attention(function: Callable[..., Any], dtype: torch.dtype, width: int, **arguments: Any) -> None:
    """A call of one of the attention functions, grouped, causal unless told otherwise."""
    query = torch.zeros(1, S, HEADS, width, dtype=dtype).transpose(1, 2)
    key = torch.zeros(1, S, KV_HEADS, width, dtype=dtype).transpose(1, 2)
    usual = {"scale": width**-0.5, "causal": True}
    extra: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {
        attention_rows: ((), {"positions": torch.arange(32)}),
        attention_lse: ((), {}),
        received_mass: ((torch.zeros(1, HEADS, S),), {}),
        attention_edges: ((torch.ones(1, HEADS, S),), {"positions": torch.arange(32), "k": 4}),
    }
    more, own = extra[function]
    function(query, key, *more, **{**usual, **own, **arguments})


MASK = {"causal": False, "mask": torch.ones(1, 1, S, S, dtype=torch.bool)}
BIAS = {"bias": torch.zeros(1, HEADS, S, S), "softcap": 30.0}
ADDED = {"causal": False, "mask": torch.zeros(1, 1, S, S)}
PACKED = {"segments": torch.zeros(1, S, dtype=torch.int32), "window": 512}
SINKS = {"sinks": torch.zeros(HEADS)}
TOKENS = torch.arange(256)


def logits(dtype: torch.dtype, vocabulary: int) -> None:
    x = torch.zeros(4, vocabulary, dtype=dtype)
    cross_entropy_hvp(x, x, torch.zeros(4, dtype=torch.int64), scale=1.0)


VARIANTS: dict[str, Callable[[], Any]] = {
    "attention_rows, bf16, 64": lambda: attention(attention_rows, BF16, 64),
    "attention_rows, bf16, 128": lambda: attention(attention_rows, BF16, 128),
    "attention_rows, bf16, 128, mask": lambda: attention(attention_rows, BF16, 128, **MASK),
    "attention_rows, bf16, 128, packed": lambda: attention(attention_rows, BF16, 128, **PACKED),
    "attention_rows, bf16, 256, mask, bias, softcap, sinks": lambda: attention(
        attention_rows, BF16, 256, **ADDED, **BIAS, **SINKS
    ),
    "attention_rows, fp32, 128": lambda: attention(attention_rows, FP32, 128),
    "attention_lse, bf16, 128": lambda: attention(attention_lse, BF16, 128),
    "attention_lse, bf16, 128, mask, bias, softcap, sinks": lambda: attention(
        attention_lse, BF16, 128, **ADDED, **BIAS, **SINKS
    ),
    "attention_lse, fp32, 128": lambda: attention(attention_lse, FP32, 128),
    "received_mass, bf16, 64": lambda: attention(received_mass, BF16, 64),
    "received_mass, bf16, 128": lambda: attention(received_mass, BF16, 128),
    "received_mass, bf16, 128, mask": lambda: attention(received_mass, BF16, 128, **MASK),
    "received_mass, bf16, 128, packed": lambda: attention(received_mass, BF16, 128, **PACKED),
    "received_mass, bf16, 256": lambda: attention(received_mass, BF16, 256),
    "received_mass, bf16, 256, mask, bias, softcap": lambda: attention(received_mass, BF16, 256, **ADDED, **BIAS),
    "received_mass, fp32, 128": lambda: attention(received_mass, FP32, 128),
    "attention_edges, bf16, 128": lambda: attention(attention_edges, BF16, 128),
    "attention_edges, bf16, 128, 16 edges, bias, softcap, sinks": lambda: attention(
        attention_edges, BF16, 128, k=16, **BIAS, **SINKS
    ),
    "attention_edges, fp32, 128": lambda: attention(attention_edges, FP32, 128),
    "moments, bf16, 4096": lambda: moments(torch.zeros(64, 4096, dtype=BF16), out=torch.zeros(9, dtype=torch.float64)),
    "moments, bf16, 8192": lambda: moments(torch.zeros(64, 8192, dtype=BF16), out=torch.zeros(9, dtype=torch.float64)),
    "moments, fp32, 768": lambda: moments(torch.zeros(64, 768), out=torch.zeros(9, dtype=torch.float64)),
    "gram, bf16, 4096": lambda: gram(torch.zeros(512, 4096, dtype=BF16), rows=TOKENS, center=True),
    "gram, fp32, 768": lambda: gram(torch.zeros(512, 768), rows=TOKENS, center=True),
    "cross_entropy_hvp, bf16, 128,256": lambda: logits(BF16, 128_256),
    "cross_entropy_hvp, fp32, 128,256": lambda: logits(FP32, 128_256),
    "cross_entropy_hvp, fp16, 50,257": lambda: logits(FP16, 50_257),
}


def launches(call: Callable[[], Any]) -> dict[str, tuple[JITFunction[Any], tuple[Any, ...], dict[str, Any]]]:
    """Kernels that a call launches, with their arguments, by name."""
    found = {}

    def record(kernel: JITFunction[Any], *args: Any, **kwargs: Any) -> None:
        kwargs = {name: value for name, value in kwargs.items() if name not in {"grid", "warmup"}}
        found.setdefault(kernel.fn.__name__, (kernel, args, kwargs))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(dispatch, "_device_obstacle", return_value=None),
    ):
        call()
    return found


def compiled(target: GPUTarget, kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The kernel, specialised as `JITFunction.run` does."""
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, specialization, options = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, arguments, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def resources(binary: Any) -> dict[str, int]:
    """Registers and bytes of stack a thread, shared memory and warps a program, from the binary itself."""
    if "cubin" in binary.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(binary.asm["cubin"])
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            printed = subprocess.run(
                [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        registers, stack = (int(re.search(pattern, printed)[1]) for pattern in (r"REG:(\d+)", r"STACK:(\d+)"))
    else:
        text = binary.asm["amdgcn"]
        patterns = (r"\.vgpr_count:\s*(\d+)", r"\.private_segment_fixed_size:\s*(\d+)")
        registers, stack = (int(re.search(pattern, text)[1]) for pattern in patterns)
    return {
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": binary.metadata.shared,
        "warps": binary.metadata.num_warps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="variants whose name contains this; writes no rows")
    arguments = parser.parse_args()
    for variant, call in VARIANTS.items():
        if arguments.only is not None and arguments.only not in variant:
            continue
        for name, launch in launches(call).items():
            for target, gpu in TARGETS.items():
                row = {"variant": variant, "kernel": name, "target": target, **resources(compiled(gpu, *launch))}
                print(row, flush=True)
                if arguments.only is None:
                    append("kernel_resources", {**row, "triton": version("triton")})


if __name__ == "__main__":
    main()
