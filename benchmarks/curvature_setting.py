"""The setting of the curvature benchmark: a Llama of 1.31 M parameters on real text, after 40 steps of AdamW."""

from __future__ import annotations

import os
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

LENGTH, SEQUENCES, STEPS, RATE = 128, 4, 40, 3e-4


def batch(inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": inputs, "labels": inputs}


def text(number: int) -> torch.Tensor:
    """The `number`-th batch of windows of Python's own sources."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    source = b"".join(path.read_bytes() for path in files[:40])
    rows = []
    for i in range(SEQUENCES):
        start = (number * SEQUENCES + i) * 4099 % (len(source) - LENGTH)
        rows.append(list(source[start : start + LENGTH]))
    return torch.tensor(rows)


def setting() -> tuple[Any, torch.optim.Optimizer, torch.Tensor]:
    """Model, optimizer and probe batch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=160,
            intermediate_size=424,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LENGTH,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    for number in range(STEPS):
        step(model, optimizer, number)
    return model, optimizer, text(0)


def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
    model(**batch(text(number))).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def gradient_seconds(model: Any, inputs: torch.Tensor) -> float:
    """Seconds of one forward and backward, the unit in which costs are told."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    times = []
    for _ in range(9):
        start = time.perf_counter()
        torch.autograd.grad(model(**batch(inputs)).loss, parameters)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
