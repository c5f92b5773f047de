"""The frozen probe batch: one batch on which the loss is evaluated again and again.

Curvature of two different batches cannot be compared, and a warm start of an eigen-solver is worthless on a fresh
batch, so the first batch of a run is kept and replayed. The loss is the model's own mean over the batch, in eval mode:
arguments that carry the state of the training step (how many items the accumulated batch has, a key-value cache)
are dropped. A loss that the trainer computes outside the model (label smoothing, a loss function of its own) is
not seen here.

A probe too large to differentiate at once is cut into micro-batches of whole sequences (`Probe.micro_batches`), whose
losses, weighted by their numbers of counted labels, add up to the loss of the whole.

Left out: choosing a good probe (give one in the settings), and averaging over ranks: each rank has its own probe.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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

IGNORED_LABEL = -100
"""The label that torch's and transformers' losses do not count."""


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

    def forward(self, model: nn.Module, parameters: Mapping[str, Tensor] | None = None) -> Any:
        """The model's output for the batch, run eagerly; to be called inside `preserve.evaluating(model)`.

        Args:
            model: the bare model.
            parameters: as in `loss`.
        """
        arguments = dict(self.batch)
        if _takes_use_cache(model):
            arguments["use_cache"] = False
        with eager():
            if parameters is None:
                return model(**arguments)
            return torch.func.functional_call(model, dict(parameters), (), arguments)

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
        output = self.forward(model, parameters)
        loss = _loss_of(output)
        if loss is None:
            raise ProbeError(
                f"{type(model).__name__} returned no loss for the arguments {sorted(self.batch)}: the probe needs "
                "`labels` (a trainer that computes the loss itself may have removed them: give a batch as `probe`)"
            )
        if loss.numel() != 1:
            raise ProbeError(f"{type(model).__name__} returned a loss of shape {tuple(loss.shape)}; expected a scalar")
        if require_finite and not bool(torch.isfinite(loss)):
            raise ProbeError(f"the loss on the probe is {float(loss.detach())}: nothing measured there has a meaning")
        return loss.reshape(())

    @property
    def n_sequences(self) -> int:
        """Sequences in the batch."""
        return _sequences(self.batch)

    def first(self, wanted: int) -> Probe:
        """The batch's first `wanted` sequences, as views; the probe itself if it has no more.

        Raises:
            ProbeError: an argument cannot be cut by sequences.
        """
        n = self.n_sequences
        if n <= wanted:
            return self
        piece = Probe()
        piece._batch = {name: _cut(value, 0, wanted, n, name) for name, value in self.batch.items()}
        return piece

    def micro_batches(self, size: int | None, *, model: nn.Module) -> list[tuple[float, Probe]]:
        """The batch in pieces of at most `size` sequences, each with its share w of the loss: L = Σ w_i L_i, Σ w_i = 1.

        The loss is taken for a mean over counted labels, so w_i = n_i/n with n_i the labels in piece i that are not
        -100. A causal loss looks at `labels[:, 1:]`, and so counts only those. Without `labels` sequences are counted.
        Pieces in which nothing is counted are left out: their own mean would be 0/0. The pieces are views.

        Args:
            size: sequences in a piece at most; None leaves the batch whole.
            model: whose loss it is, to know whether it shifts the labels.

        Raises:
            ProbeError: a loss that is no such mean, an argument that cannot be cut by sequences, or no label counted.
        """
        batch = self.batch
        n = _sequences(batch)
        if size is None or n <= size:
            return [(1.0, self)]
        if batch.get("output_router_logits", getattr(getattr(model, "config", None), "output_router_logits", False)):
            raise ProbeError(
                "micro_batch: the router's auxiliary loss (`output_router_logits`) is not a mean over labels, so the "
                "loss of the whole is no sum over pieces; use micro_batch = None or switch that loss off"
            )
        counts = _counted_labels(batch, n, model)
        if not any(counts):
            raise ProbeError("micro_batch: no label of the probe is counted (all are -100)")
        pieces: list[tuple[float, Probe]] = []
        for start in range(0, n, size):
            share = sum(counts[start : start + size]) / sum(counts)
            if share > 0:
                piece = Probe()
                piece._batch = {name: _cut(value, start, size, n, name) for name, value in batch.items()}
                pieces.append((share, piece))
        return pieces

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


@contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing of transformers' layers inside a model in eval mode, without its dropout.

    Such a layer checkpoints itself where `gradient_checkpointing` is set and it is training; its own dropout asks the
    same flag. So the flag is raised on these layers alone, and taken down again within what is checkpointed, also when
    that is computed anew in the backward pass. Layers of other libraries that ask no flag need nothing.
    """
    with ExitStack() as stack:
        for layer in model.modules():
            bases = {base.__name__ for base in type(layer).__mro__}
            if "GradientCheckpointingLayer" in bases and getattr(layer, "gradient_checkpointing", False):
                stack.callback(setattr, layer, "_gradient_checkpointing_func", layer._gradient_checkpointing_func)
                stack.callback(setattr, layer, "training", layer.training)
                layer._gradient_checkpointing_func = _evaluated(layer, layer._gradient_checkpointing_func)
                layer.training = True
        yield


def _evaluated(layer: nn.Module, checkpoint: Any) -> Any:
    def checkpoint_evaluated(function: Any, *args: Any, **kwargs: Any) -> Any:
        def evaluated(*inner: Any, **named: Any) -> Any:
            layer.training = False
            try:
                return function(*inner, **named)
            finally:
                layer.training = True

        return checkpoint(evaluated, *args, **kwargs)

    return checkpoint_evaluated


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


def _sequences(batch: Mapping[str, Any]) -> int:
    named = (batch.get(name) for name in ("input_ids", "inputs_embeds", "labels"))
    tensors = [*(t for t in named if isinstance(t, Tensor)), *(t for _, t in _tensors(batch))]
    return next((int(t.shape[0]) for t in tensors if t.dim() > 0), 1)


def _counted_labels(batch: Mapping[str, Any], n: int, model: nn.Module) -> list[int]:
    """Labels that the loss counts, per sequence."""
    labels = batch.get("shift_labels", batch.get("labels"))
    if not isinstance(labels, Tensor) or labels.dim() == 0 or labels.shape[0] != n:
        return [1] * n
    counted = labels.is_floating_point() | (labels != IGNORED_LABEL)
    whole: list[int] = counted.reshape(n, -1).sum(1).tolist()
    if labels.dim() == 1 or "shift_labels" in batch:
        return whole
    shifted: list[int] = counted[:, 1:].reshape(n, -1).sum(1).tolist()
    if any(shifted) and all(a * sum(shifted) == b * sum(whole) for a, b in zip(whole, shifted, strict=True)):
        return whole  # the same shares either way
    loss = getattr(model, "loss_function", None)
    if loss is None:
        raise ProbeError(
            f"micro_batch: the shares of the pieces depend on whether the loss of {type(model).__name__} shifts the "
            "labels, which is not known; give `shift_labels`, sequences with equally many labels, or micro_batch = None"
        )
    causal = getattr(loss, "__name__", "") == "ForCausalLMLoss"
    # Encoder-decoder models shift the decoder's inputs instead.
    return shifted if causal and not getattr(model.config, "is_encoder_decoder", False) else whole


def _cut(value: Any, start: int, size: int, n: int, name: str) -> Any:
    """The sequences from `start` on of an argument; what all sequences share is left whole."""
    if isinstance(value, Mapping):
        return {key: _cut(part, start, size, n, f"{name}.{key}") for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cut(part, start, size, n, f"{name}[{i}]") for i, part in enumerate(value))
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    dim = -2 if name == "position_ids" and value.dim() == 3 else 0  # (3, B, S) of multimodal rotary embeddings
    if value.shape[dim] == 1:
        return value
    if value.shape[dim] != n:
        raise ProbeError(
            f"the probe: expected {n} sequences along dimension {dim} of `{name}`; got shape {tuple(value.shape)}; "
            "this batch cannot be cut: take it whole (micro_batch = None, or as many `sequences` as it has)"
        )
    return value.narrow(dim, start, min(size, n - start))


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
