"""`gradient_noise`: how much of a step's gradient is signal, from micro-batches that are computed anyway.

With G the true gradient and S the covariance of one sequence's gradient, the gradient of n sequences has E|g_n|² =
|G|² + tr S / n. Two sizes give both unknowns, without bias (arXiv 1812.06162, appendix A): b sequences of the first
micro-batch on this rank, and B of the whole step, over all micro-batches and ranks:

    |G|² = (B |g_B|² - b |g_b|²) / (B - b)          tr S = (|g_b|² - |g_B|²) / (1/b - 1/B)

Fills `gradient_square`, `gradient_variance` and `gradient_noise_scale` of `steps`. One capture is very noisy, the first
may be negative, and a mean of ratios would be biased: the noise scale is the ratio of exponential moving averages of
both over the captures, and NULL as long as either average is not positive.

* |g_b| comes from hooks on the parameters, before accumulation and before DDP reduces (`hooks.gradient_tap`); |g_B| is
  the norm before clipping that the loop tells (the Trainer, or `step(grad_norm=...)` of `observe`).
* g_b is the mean gradient of its micro-batch: the factor the loop multiplied its loss by is divided out. Where the
  Trainer gives the model `num_items_in_batch`, the loss is a sum over tokens divided by those of the whole step, which
  is made a mean again by the micro-batch's own count of labels.
* g_B is taken for the mean the loop makes of its micro-batches: the sum of their factors is divided out, but for
  float16, where a loss scale is in them that is no longer in the norm.
* A sequence is a row of the batch. With tokens weighted equally, rows of different lengths are not; packed rows are
  bigger and fewer sequences.

There is no estimate where b = B (one micro-batch on one rank), where the loss is computed outside the model, or in a
compiled model: NULL, and one event that says what to do. Left out: noise by layer (2411.00999), and averaging over
ranks: each rank writes its own estimate, and their mean is a better one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lm_telemetry.catalogue import Cost
from lm_telemetry.hooks.gradient_tap import GradientTap
from lm_telemetry.instruments.base import Attachment, Columns, Harvest, Instrument
from lm_telemetry.instruments.probing import is_share

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

IGNORED_LABEL = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class _MicroBatch:
    """What there is to know of a micro-batch before its forward.

    Attributes:
        sequences: rows.
        step_items: items the model divides its sum of losses by, if it does.
        items: (2,), its own items, counted with and without a shift of the labels by one; None without labels.
    """

    sequences: int
    step_items: Tensor | int | None
    items: Tensor | None


@dataclass(kw_only=True)
class GradientNoise(Instrument):
    """Gradient noise scale from the first micro-batch of a step and the whole of it."""

    name: ClassVar[str] = "gradient_noise"
    tables: ClassVar[tuple[str, ...]] = ("steps",)
    cost: ClassVar[Cost] = Cost.REDUCTION

    smoothing: float = 0.95
    """Share of the moving averages that a capture leaves as it was."""

    _attachment: Attachment | None = field(default=None, init=False, repr=False, compare=False)
    _tap: GradientTap | None = field(default=None, init=False, repr=False, compare=False)
    _batches: list[_MicroBatch] = field(default_factory=list, init=False, repr=False, compare=False)
    _averages: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _told: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("smoothing", self.smoothing == 0 or is_share(self.smoothing), "a number from 0 to below 1")

    def attach(self, attachment: Attachment) -> None:
        """Make the tap; nothing hangs on the model yet."""
        self._attachment = attachment
        self._tap = GradientTap(attachment.model, attachment.parameters.parameters)
        self._averages = None
        self._told.clear()

    def begin(self, step: int) -> None:
        """Listen to this step's backward passes."""
        assert self._tap is not None
        self._batches = []
        self._tap.arm()

    def on_batch(self, batch: Mapping[str, Any]) -> None:
        """Count the sequences and items of a micro-batch."""
        assert self._tap is not None
        self._tap.next_batch()
        self._batches.append(_describe(batch))

    def before_update(self) -> None:
        """All backward passes are over."""
        assert self._tap is not None
        self._tap.disarm()

    def harvest(self) -> Harvest | None:
        """Put the estimate together on the device."""
        assert self._tap is not None
        assert self._attachment is not None
        self._tap.disarm()
        problem = self._problem(self._tap, self._attachment)
        if problem is not None:
            if problem not in self._told:
                self._told.add(problem)
                self._attachment.event("warning", "gradient_noise_not_measured", problem)
            return None
        square, variance = self._estimate(self._tap, self._attachment)
        pair = torch.stack([square, variance])
        if self._averages is None:
            self._averages = torch.zeros_like(pair)
        # Started at 0: the ratio of both does not see it. A step that overflowed must not stay in them for ever.
        moved = torch.lerp(pair, self._averages, self.smoothing)
        self._averages = torch.where(torch.isfinite(pair).all(), moved, self._averages)
        return Harvest(tensors={"estimate": pair, "averages": self._averages})

    def rows(self, host: Mapping[str, np.ndarray[Any, Any]], note: Any) -> Mapping[str, Columns]:
        """What joins the step's own row."""
        square, variance = (float(x) for x in host["estimate"])
        mean_square, mean_variance = (float(x) for x in host["averages"])
        resolved = mean_square > 0 and mean_variance > 0
        return {
            "steps": {
                "gradient_square": [square],
                "gradient_variance": [variance],
                "gradient_noise_scale": [mean_variance / mean_square if resolved else None],
            }
        }

    def detach(self) -> None:
        """Take the hooks off and let go of the model."""
        if self._tap is not None:
            self._tap.disarm()
        self._tap = self._attachment = self._averages = None

    def _problem(self, tap: GradientTap, attachment: Attachment) -> str | None:
        """Why there is no estimate, and what to do; None if there is one."""
        if not self._batches:
            return "no forward pass with gradients was seen in the step"
        whole = sum(b.sequences for b in self._batches) * attachment.world_size
        if self._batches[0].sequences == whole:
            return (
                "the noise needs two sizes of batch, and the step is one micro-batch on one rank: train with gradient "
                "accumulation (gradient_accumulation_steps=2 and half the batch size is the same training) or on more "
                "ranks"
            )
        if attachment.grad_norm() is None:
            return (
                "the norm of the step's gradient before clipping is not known: give what `clip_grad_norm_` returns to "
                "`step(grad_norm=...)`; under the Trainer, DeepSpeed does not tell it"
            )
        if tap.problem is not None:
            return tap.problem
        if not tap.complete:
            return (
                "no backward pass of the model's own loss was seen: pass `labels` to the model so that it returns the "
                "loss, call `backward` after each micro-batch, and do not compile the model"
            )
        if any(b.step_items is not None and b.items is None for b in self._batches):
            return "the model was given `num_items_in_batch` without `labels`: the micro-batch's share is not known"
        return None

    def _estimate(self, tap: GradientTap, attachment: Attachment) -> tuple[Tensor, Tensor]:
        """Unbiased |G|² and tr S, float64 scalars on the device."""
        norm, factors = tap.norm(), tap.factors()
        weight, total = factors[0], torch.ones_like(norm)
        if self._batches[0].step_items is not None:
            weight = weight * self._share(attachment.world_size, norm.device)
        elif not tap.half:
            total = factors.sum()
        small = (norm / weight).square()
        large = (_scalar(attachment.grad_norm(), norm.device) / total).square()
        b = self._batches[0].sequences
        B = sum(batch.sequences for batch in self._batches) * attachment.world_size
        return (B * large - b * small) / (B - b), (small - large) / (1 / b - 1 / B)

    def _share(self, world_size: int, device: torch.device) -> Tensor:
        """The first micro-batch's items over those that its sum of losses was divided by.

        Which labels are items is the Trainer's choice: a causal model's first label predicts nothing, and whether it
        is counted depends on the version, as does whether items are summed over ranks. The count that comes nearest to
        the divisor is the one that was made.
        """
        items = torch.stack([b.items for b in self._batches if b.items is not None]).to(device, torch.float64)
        divisor = _scalar(self._batches[0].step_items, device)
        here = items.sum(0)
        shifted, plain = torch.minimum((divisor - here).abs(), (divisor - world_size * here).abs())
        return torch.where(shifted <= plain, items[0, 0], items[0, 1]) / divisor


def _scalar(value: Any, device: torch.device) -> Tensor:
    """A tensor or number as a float64 scalar on a device, without waiting for it."""
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64).reshape(())
    return torch.full((), float(value), dtype=torch.float64, device=device)


def _describe(batch: Mapping[str, Any]) -> _MicroBatch:
    tensors = [batch.get(name) for name in ("input_ids", "inputs_embeds", "labels")]
    first = next((t for t in (*tensors, *batch.values()) if isinstance(t, Tensor) and t.dim() > 0), None)
    divisor = batch.get("num_items_in_batch")
    items = None
    if divisor is not None:
        shifted, labels = batch.get("shift_labels"), batch.get("labels")
        if isinstance(shifted, Tensor):
            items = (shifted != IGNORED_LABEL).sum().expand(2)
        elif isinstance(labels, Tensor):
            counted = labels != IGNORED_LABEL
            items = torch.stack([counted[..., 1:].sum(), counted.sum()])
    return _MicroBatch(sequences=0 if first is None else first.shape[0], step_items=divisor, items=items)
