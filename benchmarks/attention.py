"""What the attention statistics cost, beside the attention they are of and a peer that forms the S x S matrix.

Each variant and the model's own attention (`scaled_dot_product_attention`, causal, grouped) of the same call take turns
in blocks of calls; a row gives the median over pairs of the ratio of their times, with its 20th and 80th percentile,
and the most memory a call holds beyond its inputs. On the CPU everything is bound to one core.

    python benchmarks/attention.py          # appends rows to benchmarks/results/attention.csv
    python benchmarks/attention.py --quick  # a few pairs; writes nothing

The peer computes softmax(QK'), entropy and column sums in plain torch. `lse + columns` is what the instrument
`key_mass` does, `rows, 32 queries` what `attention` does by default. With a GPU there is also the moments kernel beside
a copy on the device: it reads an entry once where a copy reads and writes it, so its share of the copy's bandwidth is
half the inverse of its ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from curvature import peak
from rows import append

from lm_telemetry.kernels.attention_columns import received_mass
from lm_telemetry.kernels.attention_rows import attention_lse, attention_rows_at, row_geometry
from lm_telemetry.kernels.moments import moments

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK_SECONDS = 0.1
"""About how long a block of calls takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Sizes of a call."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    width: int
    dtype: torch.dtype

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}"
        return f"B {self.batch}, H {heads}, S {self.length}, D {self.width}, {str(self.dtype).removeprefix('torch.')}"


CPU = (
    Setting(batch=4, heads=4, kv_heads=4, length=256, width=64, dtype=torch.float32),
    Setting(batch=1, heads=8, kv_heads=2, length=1024, width=64, dtype=torch.float32),
)
GPU = (
    Setting(batch=1, heads=32, kv_heads=8, length=2048, width=128, dtype=torch.bfloat16),
    Setting(batch=1, heads=32, kv_heads=8, length=8192, width=128, dtype=torch.bfloat16),
)


def calls(setting: Setting, device: torch.device) -> tuple[Callable[[], Any], dict[str, Callable[[], Any]]]:
    """The attention itself, and what is compared with it."""
    generator = torch.Generator(device).manual_seed(0)

    def heads(n: int) -> torch.Tensor:
        shape = (setting.batch, setting.length, n, setting.width)
        return torch.randn(shape, generator=generator, device=device).to(setting.dtype).transpose(1, 2)

    query, key, value = heads(setting.heads), heads(setting.kv_heads), heads(setting.kv_heads)
    logits: dict[str, Any] = {"scale": setting.width**-0.5}
    last = torch.arange(1, 33, device=device) * setting.length // 32 - 1
    every = torch.arange(setting.length, device=device)
    sampled, whole = (row_geometry(positions=p, n_keys=setting.length, causal=True) for p in (last, every))
    lse = attention_lse(query, key, causal=True, **logits)

    def eager() -> None:
        repeated = key.repeat_interleave(setting.heads // setting.kv_heads, dim=1)
        scores = (query @ repeated.transpose(-1, -2)).float() * setting.width**-0.5
        hidden = torch.ones(setting.length, setting.length, dtype=torch.bool, device=device).triu(1)
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        torch.special.xlogy(p, p).sum(-1).mean((0, 2))
        p.sum(2)

    def lse_and_columns() -> None:
        fresh = attention_lse(query, key, causal=True, **logits)
        received_mass(query, key, fresh, causal=True, **logits)

    return (
        lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True),
        {
            "rows, 32 queries": lambda: attention_rows_at(query, key, sampled, **logits),
            "rows, all queries": lambda: attention_rows_at(query, key, whole, **logits),
            "columns": lambda: received_mass(query, key, lse, causal=True, **logits),
            "lse + columns": lse_and_columns,
            "peer: softmax(QK'), entropy and column sums": eager,
        },
    )


def seconds(call: Callable[[], Any], times: int, device: torch.device) -> float:
    """Of a block of calls."""
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(times):
            call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def memory(call: Callable[[], Any], device: torch.device) -> float:
    """MiB that a call holds at most beyond what was there."""
    if device.type == "cpu":
        return peak(call) / 2**20
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def compare(base: Callable[[], Any], call: Callable[[], Any], device: torch.device, pairs: int) -> dict[str, Any]:
    """The columns of a row."""
    held = memory(call, device)  # warms up and compiles, too
    base()
    once = [max(seconds(c, 1, device), 1e-6) for c in (base, call)]
    times = [max(1, round(BLOCK_SECONDS / one)) for one in once]
    ratios, bases = [], []
    for pair in range(pairs):
        measured = [0.0, 0.0]
        for i in (0, 1) if pair % 2 == 0 else (1, 0):
            measured[i] = seconds((base, call)[i], times[i], device) / times[i]
        ratios.append(measured[1] / measured[0])
        bases.append(measured[0])
    ordered = sorted(ratios)
    return {
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_p20": round(ordered[round(0.2 * (pairs - 1))], 3),
        "ratio_p80": round(ordered[round(0.8 * (pairs - 1))], 3),
        "pairs": pairs,
        "base_ms": round(1e3 * statistics.median(bases), 3),
        "peak_mib": round(held, 2),
    }


def beside_a_copy(device: torch.device, pairs: int) -> dict[str, Any]:
    """Moments of a site against a copy of it."""
    x = torch.randn(65_536, 4096, device=device, dtype=torch.bfloat16)
    target, out = torch.empty_like(x), torch.empty(9, dtype=torch.float64, device=device)
    found = compare(lambda: target.copy_(x), lambda: moments(x, out=out), device, pairs)
    return {"variant": "moments", "base": "copy on the device", "setting": "65,536 x 4,096, bfloat16", **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few pairs; writes no rows")
    arguments = parser.parse_args()
    pairs = 3 if arguments.quick else 15
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    if device.type == "cpu" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    def tell(row: dict[str, Any]) -> None:
        print(row, flush=True)
        if not arguments.quick:
            append("attention", row)

    with torch.no_grad():
        for setting in CPU if device.type == "cpu" else GPU:
            base, variants = calls(setting, device)
            for variant, call in variants.items():
                found = compare(base, call, device, pairs)
                tell({"variant": variant, "base": "attention's forward", "setting": str(setting), **found})
        if device.type == "cuda":
            tell(beside_a_copy(device, pairs))


if __name__ == "__main__":
    main()
