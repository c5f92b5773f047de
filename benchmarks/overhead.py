"""What telemetry costs a training step, beside its peers.

Setting: a Llama of 3.15 M parameters, float32, a batch of 4 x 256 tokens, forward + backward + AdamW, one thread, and
the whole process bound to one core, so that the background writer's work is paid for in the same time. Each variant has
a model of its own with the same weights. Blocks of steps of the plain loop and of a variant take turns; a row gives
the median over pairs of the ratio of their wall times, with its 20th and 80th percentile, and the same of processor
times, which other processes on the machine disturb less.

    python benchmarks/overhead.py            # appends rows to benchmarks/results/overhead.csv
    python benchmarks/overhead.py --pairs 3  # a quick look; writes nothing

Ours write once in each block, inside its time, which is more often than by default (every 5 seconds). Curvature is not
here: its cost is told in gradients.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("WANDB_SILENT", "true")

import torch
from rows import append
from transformers import LlamaConfig, LlamaForCausalLM

from lm_telemetry import observe

STEPS = 8
PER_STEP = ("activations", "attention", "parameters")
NEVER = 10**9

Step = Callable[[], None]


def nothing() -> None:
    """What most variants have to finish at the end of a block."""


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
        )
    )


class Loop:
    """A model, its optimizer and a batch."""

    def __init__(self, **forward: Any) -> None:
        self.model = model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.batch = torch.randint(0, 256, (4, 256), generator=torch.Generator().manual_seed(1))
        self.forward = forward

    def step(self) -> torch.Tensor:
        output = self.model(input_ids=self.batch, labels=self.batch, **self.forward)
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.output = output
        return output.loss


FINISH: dict[Step, Callable[[], None]] = {}
"""what a variant must have done before its block is over"""


@contextlib.contextmanager
def plain() -> Iterator[Step]:
    loop = Loop()
    yield lambda: loop.step() and None


@contextlib.contextmanager
def ours(instruments: tuple[str, ...], every: int) -> Iterator[Step]:
    loop = Loop()
    with (
        tempfile.TemporaryDirectory() as store,
        observe(
            loop.model,
            optimizer=loop.optimizer,
            store=store,
            every=every,
            flush_seconds=1e6,
            instruments={name: {"every": every} for name in instruments},
            strict=True,
        ) as session,
    ):
        step: Any = lambda: session.step(loss=loop.step())
        FINISH[step] = lambda: session.flush() and None
        yield step


@contextlib.contextmanager
def hooks(*, item: bool) -> Iterator[Step]:
    """Mean, deviation and largest magnitude of each block, attention and MLP output, by plain forward hooks."""
    loop, found = Loop(), []

    def hook(_module: Any, _args: Any, output: Any) -> None:
        hidden = (output[0] if isinstance(output, tuple) else output).detach()
        values = [hidden.mean(), hidden.std(), hidden.abs().max()]
        found.extend([v.item() for v in values] if item else values)

    for name, module in loop.model.named_modules():
        if name.endswith(("self_attn", "mlp", "embed_tokens", "model.norm")) or name.split(".")[-1].isdigit():
            module.register_forward_hook(hook)

    def step() -> None:
        found.clear()
        loop.step()
        if not item:
            torch.stack(found).cpu()

    yield step


@contextlib.contextmanager
def output_attentions() -> Iterator[Step]:
    """Entropy and sink from the S x S matrices that transformers returns."""
    loop = Loop(output_attentions=True)
    loop.model.set_attn_implementation("eager")

    def step() -> None:
        loop.step()
        for matrix in loop.output.attentions:
            p = matrix.detach()
            torch.special.xlogy(p, p).sum(-1).mean((0, 2))
            p[..., 0].mean((0, 2))

    yield step


@contextlib.contextmanager
def wandb_watch() -> Iterator[Step]:
    import wandb

    loop = Loop()
    with tempfile.TemporaryDirectory() as directory:
        run = wandb.init(mode="offline", dir=directory, project="overhead")
        run.watch(loop.model, log="all", log_freq=1)

        def step() -> None:
            run.log({"loss": loop.step().item()})

        yield step
        run.finish()


VARIANTS: dict[str, Callable[[], contextlib.AbstractContextManager[Step]]] = {
    "ours, attached and idle": lambda: ours(PER_STEP, NEVER),
    "ours, all per-step instruments, every step": lambda: ours(PER_STEP, 1),
    "ours, all per-step instruments, every 10 steps": lambda: ours(PER_STEP, 10),
    "ours, activations and attention, every step": lambda: ours(("activations", "attention"), 1),
    "ours, activations, every step": lambda: ours(("activations",), 1),
    "ours, attention, every step": lambda: ours(("attention",), 1),
    "ours, parameters, every step": lambda: ours(("parameters",), 1),
    "plain against plain": plain,
    "plain hooks, one copy": lambda: hooks(item=False),
    "plain hooks with .item()": lambda: hooks(item=True),
    "output_attentions": output_attentions,
    "wandb.watch, log_freq=1": wandb_watch,
}


def block(step: Step) -> tuple[float, float]:
    """Wall and processor seconds of a block; the latter count all threads, and no other process."""
    step()  # what another variant left in the caches is not this one's
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        step()
    FINISH.get(step, nothing)()
    return time.perf_counter() - wall, time.process_time() - cpu


def spread(name: str, values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(values)
    at = lambda share: round(ordered[round(share * (len(ordered) - 1))], 4)
    return {f"{name}_median": round(statistics.median(values), 4), f"{name}_p20": at(0.2), f"{name}_p80": at(0.8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, help="pairs a variant; writes no rows")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    arguments = parser.parse_args()
    pairs = arguments.pairs or 9
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for name, variant in VARIANTS.items():
        if arguments.only not in name:
            continue
        wall, cpu, base = [], [], []
        with contextlib.ExitStack() as stack:
            try:
                reference, observed = stack.enter_context(plain()), stack.enter_context(variant())
            except ImportError as error:
                print(f"{name}: left out, {error}", file=sys.stderr)
                continue
            block(reference), block(observed)
            for pair in range(pairs):
                order = [reference, observed] if pair % 2 == 0 else [observed, reference]
                seconds = {id(step): block(step) for step in order}
                (ours_wall, ours_cpu), (plain_wall, plain_cpu) = seconds[id(observed)], seconds[id(reference)]
                wall.append(ours_wall / plain_wall)
                cpu.append(ours_cpu / plain_cpu)
                base.append(plain_wall / STEPS)
        row = {
            "variant": name,
            **spread("wall_ratio", wall),
            **spread("cpu_ratio", cpu),
            "pairs": pairs,
            "steps_a_block": STEPS,
            "plain_step_ms": round(1e3 * statistics.median(base), 1),
        }
        print(row, flush=True)
        if arguments.pairs is None:
            append("overhead", row)


if __name__ == "__main__":
    main()
