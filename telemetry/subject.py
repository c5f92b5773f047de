"""What is being trained, as a row of the `runs` table: the model, its optimizer, the software and the machine."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

from lm_telemetry.hooks.topology import Topology, text_config
from lm_telemetry.run import code_sha256, hardware, versions

if TYPE_CHECKING:
    from torch import nn

    from lm_telemetry.hooks.probe import Probe
    from lm_telemetry.settings import Settings


def describe_run(
    *,
    settings: Settings,
    model: nn.Module,
    topology: Topology,
    optimizer: dict[str, Any],
    mode: str,
    world_size: int,
    max_steps: int | None,
    probe: Probe,
) -> dict[str, list[Any]]:
    """Columns of `runs`, one row; `optimizer` from `describe_optimizer`."""
    parameters = list(model.parameters())
    config = text_config(model)
    row: dict[str, Any] = {
        "model_class": type(model).__name__,
        "n_parameters": sum(p.numel() for p in parameters),
        "n_trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "n_layers": None if topology.main is None else topology.stacks[topology.main],
        "n_heads": _whole(config, "num_attention_heads"),
        "hidden_size": topology.width,
        "vocab_size": _whole(config, "vocab_size"),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "attention": getattr(config, "_attn_implementation", None),
        "mode": mode,
        "world_size": world_size,
        "max_steps": max_steps,
        "settings": _json(settings.describe()),
        "max_overhead": settings.max_overhead,
        "versions": _json(versions()),
        "hardware": _json({**hardware(), "device": _device(parameters[0].device)}),
        "config_sha256": _config_sha256(getattr(model, "config", None)),
        "probe_sha256": probe.sha256 if probe.frozen else None,
        "code_sha256": code_sha256(),
    }
    row.update(optimizer)
    return {name: [value] for name, value in row.items()}


def describe_optimizer(optimizer: Any) -> dict[str, Any]:
    """Columns of `runs` about the optimizer as it is now, before a schedule changes its settings."""
    groups = getattr(optimizer, "param_groups", None)
    settings = {k: v for k, v in groups[0].items() if k != "params"} if groups else {}
    return {"optimizer": type(optimizer).__name__, "optimizer_settings": _json(settings)}


def _whole(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _config_sha256(config: Any) -> str | None:
    to_dict = getattr(config, "to_dict", None)
    if not callable(to_dict):
        return None
    return hashlib.sha256(_json(to_dict()).encode()).hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
