"""The top Hessian eigenvalue of a small Llama, by us and by our peers: how right, and for how many gradients.

Setting (`curvature_setting.py`): a Llama of 1.31 M parameters with default attention, float32, one batch of 4 x 128
bytes of real text as the probe, after 40 steps of AdamW; one thread. Truth is Lanczos to 1e-6 on the float64 model. A
cost is a time over that of one forward and backward in the same process. Peers run in environments of their
own, as they are and, if that fails, under math attention.

    python benchmarks/curvature.py            # appends rows to benchmarks/results/curvature.csv
    python benchmarks/curvature.py --no-peers
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import torch
from curvature_setting import STEPS, batch, gradient_seconds, setting, step
from rows import append
from torch.profiler import ProfilerActivity, profile

from lm_telemetry import observe
from lm_telemetry.hooks.curvature_operator import curvature_operator
from lm_telemetry.hooks.probe import Probe
from lm_telemetry.kernels.lanczos import lanczos

WARM = 21
"""steps after the setting at each of which the eigenvalue is asked for; the first solve is cold"""

PEERS = {
    "pyhessian": ["pyhessian"],
    "curvlinops": ["curvlinops-for-pytorch", "einops", "einconv", "unfoldNd", "linear_operator", "jaxtyping",
                   "wadler-lindig", "scipy"],
    "hessian-eigenthings, defaults": ["hessian-eigenthings"],
    "hessian-eigenthings, 20 steps": ["hessian-eigenthings"],
    "cockpit": ["cockpit-for-pytorch", "backpack-for-pytorch", "unfoldNd", "einops", "json_tricks", "seaborn",
                "tikzplotlib", "matplotlib", "pandas", "scipy", "contourpy", "cycler", "kiwisolver", "pyparsing",
                "python-dateutil", "six", "pillow", "fonttools", "webcolors", "pytz"],
}  # fmt: skip
"""What each needs beside torch and transformers, which it shares with us."""


def truth(model: Any, inputs: torch.Tensor) -> float:
    exact = copy.deepcopy(model).double()
    probe = Probe()
    probe.freeze(batch(inputs), model=exact)
    with curvature_operator(exact, probe, list(exact.parameters())) as hessian:
        found = lanczos(
            hessian.matvec,
            dimension=hessian.dimension,
            tolerance=1e-6,
            max_steps=60,
            dtype=hessian.dtype,
            device=hessian.device,
        )
    return found.value


def in_a_run() -> list[dict[str, Any]]:
    """Cold and warm solves by the instrument, at every step of a run."""
    import pyarrow.dataset as ds

    model, optimizer, inputs = setting()
    unit = gradient_seconds(model, inputs)
    errors, hvps, costs = [], [], []
    with tempfile.TemporaryDirectory() as store:
        with observe(
            model, optimizer=optimizer, store=store, every=1, probe=batch(inputs), strict=True,
            instruments={"sharpness": {"every": 1, "operators": "hessian"}},
        ) as session:  # fmt: skip
            exact = []
            for number in range(STEPS, STEPS + WARM):
                step(model, optimizer, number)
                session.step()
                exact.append(truth(model, inputs))
        rows = ds.dataset(f"{store}/curvature", partitioning="hive").to_table().to_pylist()
        for row, right in zip(sorted(rows, key=lambda r: r["step"]), exact, strict=True):
            errors.append(abs(row["value"] / right - 1))
            hvps.append(row["hvps"])
            costs.append(row["seconds"] / unit)
    return [
        {"who": "ours, cold", "relative_error": errors[0], "hvps": hvps[0], "gradients": costs[0]},
        {
            "who": f"ours, warm (median of {WARM - 1} steps of AdamW)",
            "relative_error": statistics.median(errors[1:]),
            "worst_error": max(errors[1:]),
            "hvps": statistics.median(hvps[1:]),
            "gradients": statistics.median(costs[1:]),
        },
    ]


def of_one_product() -> list[dict[str, Any]]:
    """Time and memory of one product, and what bf16 autocast costs in accuracy, for each derivative."""
    model, _, inputs = setting()
    parameters = list(model.parameters())
    unit, right = gradient_seconds(model, inputs), truth(model, inputs)
    probe = Probe()
    probe.freeze(batch(inputs), model=model)
    one = peak(lambda: torch.autograd.grad(probe.loss(model), parameters))
    vector = torch.randn(sum(p.numel() for p in parameters), generator=torch.Generator().manual_seed(0))
    rows = []
    for derivative in ("double_backward", "finite_difference"):
        with curvature_operator(model, probe, parameters, derivative=derivative) as hessian:
            times = []
            for _ in range(9):
                start = time.perf_counter()
                hessian.matvec(vector)
                times.append(time.perf_counter() - start)

        def product(derivative: Any = derivative) -> None:
            with curvature_operator(model, probe, parameters, derivative=derivative) as operator:
                operator.matvec(vector)

        rows.append(
            {
                "who": f"ours, one product, {derivative}",
                "gradients": statistics.median(times) / unit,
                "peak_memory_gradients": peak(product) / one,
            }
        )
        with (
            torch.autocast("cpu", torch.bfloat16),
            curvature_operator(model, probe, parameters, derivative=derivative) as hessian,
        ):
            found = lanczos(
                hessian.matvec, dimension=hessian.dimension, dtype=hessian.dtype, device=hessian.device, max_steps=40
            )
            stated = found.residual + max(hessian.errors, default=0.0)
        rows.append(
            {
                "who": f"ours, bf16 autocast, {derivative}",
                "relative_error": abs(found.value / right - 1),
                "hvps": found.hvps,
                "note": f"states an error of {stated / found.value:.1%}",
            }
        )
    return rows


def peak(work: Any) -> int:
    """Most bytes the allocator held during `work` beyond those before it."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    total = highest = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest


def of_peers(right: float) -> list[dict[str, Any]]:
    rows = []
    ours = [path for path in sys.path if path.endswith("site-packages")]
    with tempfile.TemporaryDirectory() as place:
        for name, packages in PEERS.items():
            home = Path(place) / packages[0]
            python = home / "bin" / "python"
            if not python.exists():
                venv.create(home, with_pip=True)
                site = next(home.glob("lib/python*/site-packages"))
                (site / "shared.pth").write_text("\n".join(ours))
                subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *packages], check=False)
            script = Path(__file__).with_name("curvature_peer.py")
            done = subprocess.run([python, script, name], capture_output=True, text=True, check=False)
            found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"math": done.stderr[-120:]}
            row: dict[str, Any] = {"who": name}
            for way in ("as is", "math"):
                answer = found.get(way)
                if isinstance(answer, dict):
                    row["relative_error"] = abs(answer["value"] / right - 1)
                    row["gradients"] = answer["gradients"]
                    row["note"] = "" if way == "as is" else f"fails as is ({row.get('note', '')}); under math attention"
                elif answer:
                    row["note"] = " ".join(str(answer).split())[:90]
            rows.append(row)
    return rows


COLUMNS = ("who", "relative_error", "worst_error", "hvps", "gradients", "peak_memory_gradients", "note")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--no-peers", action="store_true", help="ours only; writes no rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = in_a_run() + of_one_product()
    if not arguments.no_peers:
        model, _, inputs = setting()
        rows += of_peers(truth(model, inputs))
    for row in rows:
        full = {name: row.get(name, "") for name in COLUMNS}
        full = {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in full.items()}
        print(full, flush=True)
        if not arguments.no_peers:
            append("curvature", full)


if __name__ == "__main__":
    main()
