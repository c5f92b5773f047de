"""What one optimizer step has said of itself: its losses, tokens, learning rate, and how long it took.

Tensors stay on their device until the step's one copy; nothing here waits for them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class StepClock:
    """Collects from `begin` to `end`, once a step.

    Attributes:
        open: whether a step is running.
        learning_rate: of the first parameter group, as it was when the optimizer stepped.
    """

    def __init__(self) -> None:
        self.open = False
        self.learning_rate: Any = None
        self._last_end = time.perf_counter()
        self._losses: list[Tensor] = []
        self._token_counts: list[Tensor | int] = []
        self._loss_is_part_of_a_sum = False

    def begin(self) -> None:
        """A step begins; what an abandoned one has left is forgotten."""
        self.open = True
        self.learning_rate = None
        self._losses = []
        self._token_counts = []
        self._loss_is_part_of_a_sum = False

    def saw_batch(self, batch: Mapping[str, Any]) -> None:
        """A micro-batch goes into the model."""
        self._loss_is_part_of_a_sum |= batch.get("num_items_in_batch") is not None
        mask, ids, embeds = (batch.get(k) for k in ("attention_mask", "input_ids", "inputs_embeds"))
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self._token_counts.append((mask != 0).sum())
        elif isinstance(ids, Tensor):
            self._token_counts.append(ids.numel())
        elif isinstance(embeds, Tensor):
            self._token_counts.append(embeds[..., 0].numel())

    def saw_output(self, output: Any) -> None:
        """A micro-batch has come out; its loss is kept if the model gave one."""
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.dim() == 0:
            self._losses.append(loss.detach())

    def saw_learning_rate(self, optimizer: Any) -> None:
        """The optimizer has stepped, or the step ends without having been told."""
        groups = getattr(optimizer, "param_groups", None)
        if groups and "lr" in groups[0]:
            rate = groups[0]["lr"]
            # a tensor's value is taken later with everything else, since the scheduler will write into it
            self.learning_rate = rate.detach().clone() if isinstance(rate, Tensor) else float(rate)

    def end(self, *, loss: Any = None, grad_norm: Any = None) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
        """The step is over: its scalars still on the device, and those already on the host.

        Without a `loss` from the loop it is that of the micro-batches: their sum where each was divided by the items
        of the whole batch, else their mean.
        """
        now = time.perf_counter()
        host: dict[str, list[Any]] = {"seconds": [now - self._last_end]}
        device: dict[str, Tensor] = {}
        self._last_end = now
        self.open = False
        if loss is None and self._losses:
            stacked = torch.stack([value.double() for value in self._losses])
            loss = stacked.sum() if self._loss_is_part_of_a_sum else stacked.mean()
        for name, value in (("loss", loss), ("grad_norm", grad_norm), ("learning_rate", self.learning_rate)):
            if isinstance(value, Tensor):
                device[name] = value.detach()
            elif value is not None:
                host[name] = [float(value)]
        if self._token_counts:
            counted = [count for count in self._token_counts if isinstance(count, Tensor)]
            known = sum(count for count in self._token_counts if not isinstance(count, Tensor))
            if counted:
                device["tokens"] = torch.stack(counted).sum() + known
            else:
                host["tokens"] = [known]
        return device, host
