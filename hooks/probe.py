"""The frozen probe batch: one batch on which the loss is evaluated again and again.

Curvature of two different batches cannot be compared, and a warm start of an eigen-solver is worthless on a fresh
batch, so the first batch of a run is kept and replayed. The loss is the model's own mean over the batch, in eval mode:
arguments that carry the state of the training step (how many items the accumulated batch has, a key-value cache)
are dropped. A loss that the trainer computes outside the model (label smoothing, a loss function of its own) is
not seen here.

Left out: choosing a good probe (give one in the settings), and averaging over ranks: each rank has its own probe.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lm_telemetry.errors import ProbeError

NOT_REPLAYED = frozenset(
    {
        "num_items_in_batch",  # makes the loss a sum over the accumulated batch
        "past_key_values",  # state of a generation
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
    }
)
"""Arguments that belong to the step a batch was taken from."""


class Probe:
    """A batch that is frozen once, and the model's loss on it."""

    def __init__(self) -> None:
        self._batch: dict[str, Any] | None = None
        self._sha256: str | None = None

    @property
    def frozen(self) -> bool:
        """Whether there is a batch."""
        return self._batch is not None

    @property
    def batch(self) -> Mapping[str, Any]:
        """The frozen arguments of the model's forward (ProbeError while there are none)."""
        if self._batch is None:
            raise ProbeError("the probe has no batch yet: it takes the first batch of the run; or give one as `probe`")
        return self._batch

    def freeze(self, batch: Mapping[str, Any], *, model: nn.Module) -> None:
        """Keep a copy of `batch` on the model's device. The first batch wins; later calls do nothing.

        Raises:
            ProbeError: there is no tensor in it.
        """
        if self.frozen:
            return
        device = next((parameter.device for parameter in model.parameters()), None)
        kept = {name: _copy(value, device) for name, value in batch.items() if name not in NOT_REPLAYED}
        if next(_tensors(kept), None) is None:
            raise ProbeError(f"probe: expected a mapping of tensors by argument name; got {sorted(batch)} without any")
        self._batch = kept

    @property
    def n_tokens(self) -> int | None:
        """Tokens in the batch, padding left out where a (B, S) mask says so; None for a batch without tokens."""
        batch = self.batch
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return int((mask != 0).sum())
        if isinstance(batch.get("input_ids"), Tensor):
            return int(batch["input_ids"].numel())
        if isinstance(batch.get("inputs_embeds"), Tensor):
            return int(batch["inputs_embeds"].shape[:-1].numel())
        return None

    @property
    def sha256(self) -> str:
        """SHA-256 of names, dtypes, shapes and bytes; the same on every device and in every run."""
        if self._sha256 is None:
            digest = hashlib.sha256()
            for path, tensor in sorted(_tensors(self.batch), key=lambda item: item[0]):
                digest.update(f"{path}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
                digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            self._sha256 = digest.hexdigest()
        return self._sha256

    def loss(
        self, model: nn.Module, parameters: Mapping[str, Tensor] | None = None, *, require_finite: bool = True
    ) -> Tensor:
        """The model's loss on the batch, a scalar.

        To be called inside `preserve.evaluating(model)`, which keeps dropout off and the run untouched.

        Args:
            model: the bare model. A compiled one runs eagerly here.
            parameters: values to use instead of the model's own, by the names of `named_parameters()`; a tied weight
                needs one of its names.
            require_finite: refuse NaN and infinity. A line search takes them for a raised loss instead.

        Raises:
            ProbeError: no batch, no loss (no labels), a loss that is not a scalar or, if required, not finite.
        """
        arguments = dict(self.batch)
        if _takes_use_cache(model):
            arguments["use_cache"] = False
        with eager():
            if parameters is None:
                output = model(**arguments)
            else:
                output = torch.func.functional_call(model, dict(parameters), (), arguments)
        loss = _loss_of(output)
        if loss is None:
            raise ProbeError(
                f"{type(model).__name__} returned no loss for the arguments {sorted(self.batch)}: the probe needs "
                "`labels` (a trainer that computes the loss itself may have removed them: give a batch as `probe`)"
            )
        if loss.numel() != 1:
            raise ProbeError(f"{type(model).__name__} returned a loss of shape {tuple(loss.shape)}; expected a scalar")
        if require_finite and not bool(torch.isfinite(loss)):
            raise ProbeError(f"the loss on the probe is {float(loss.detach())}: no derivative of it means anything")
        return loss.reshape(())

    def precision(self, model: nn.Module) -> torch.dtype:
        """The dtype the model computes in: autocast's where its forward enters one, else that of its parameters.

        Costs one forward pass. To be called as `loss` is.
        """
        seen: list[torch.dtype] = []

        def look(module: nn.Module, _: Any) -> None:
            device = next((t.device.type for t in module.parameters()), None)
            if device is not None and torch.is_autocast_enabled(device):
                seen.append(torch.get_autocast_dtype(device))

        handle = register_module_forward_pre_hook(look)
        try:
            self.loss(model, require_finite=False)
        finally:
            handle.remove()
        return seen[0] if seen else next(p.dtype for p in model.parameters() if p.is_floating_point())


def eager() -> AbstractContextManager[None]:
    """Run compiled models eagerly inside: their graphs have no second derivative (donated buffers)."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled; importing it costs seconds
        return nullcontext()
    return cast("AbstractContextManager[None]", torch.compiler.set_stance("force_eager"))


def _takes_use_cache(model: nn.Module) -> bool:
    # Of the class: accelerate replaces `forward` on the instance by a wrapper.
    accepted = inspect.signature(type(model).forward).parameters
    if "use_cache" in accepted:
        return True
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    return passes_on and hasattr(getattr(model, "config", None), "use_cache")


def _loss_of(output: Any) -> Tensor | None:
    if isinstance(output, tuple):
        output = output[0] if output else None
    if not isinstance(output, Tensor):
        output = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return output if isinstance(output, Tensor) else None


def _copy(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().to(device or value.device)
    if isinstance(value, Mapping):
        return {name: _copy(part, device) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copy(part, device) for part in value)
    return value


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _tensors(part, f"{path}/{name}")
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from _tensors(part, f"{path}/{i}")
