"""`knock_out`: what each attention head does for the loss, found by taking it out of the model on the frozen probe.

Statistics of attention say what a head looks at; only an intervention says whether the model needs it. For each head h
in turn the probe's loss is evaluated with the head's output replaced, everywhere, by its mean over the probe's real
tokens (or by zero), and with all else left alone:

    effect_h = L(without h) - L,        L = sum_i w_i L_i,        w_i = counted labels of sequence i, as a share

Positive: the head is needed; negative: the model would do better without. Effects do not add up: of two
heads that do the same thing either can be taken out at no cost, and of two that work together (a previous-token head
feeds an induction head) each has the effect of both (2211.00593, 2209.11895).

Decisions:

- Ablation by the mean is the default. Zero takes a head's constant part away, too, which the rest of the model counts
  on like a bias, and so makes heads look needed that carry no information.
- The loss is evaluated sequence by sequence, which takes the same arithmetic and gives the standard error. With
  d_i the effect on sequence i it is that of a weighted mean, by the delta method for a ratio:
  stderr^2 = n/(n-1) sum_i w_i^2 (d_i - effect)^2, and sd/sqrt(n) where the weights are equal. It says how the effect
  would change with other sequences, not with another training run.
- Means are from one forward of the whole probe, whatever `micro_batch` is, so that effects do not depend on the cut.
- A head without which the loss is not finite leaves no row; one event names all of them. So does one, once, for
  layers whose heads cannot be told apart, or whose output projection is not given all of them in a forward pass.

Cost: 2 + H forward passes of the probe, H heads in all (twice as many for both ablations); a model of 12 layers of 12
heads pays 146, the arithmetic of 49 gradients. So it is asked for by name, has a rare cadence, and can be told to take
only so many `heads` a capture, the next ones then. Resolution: differences of float32 losses, about 1e-7 of the loss.

Left out: using again what comes before the head's layer, which would halve the cost (layers may hand each other more
than their outputs), heads in pairs, and averaging over ranks, each of which has its own probe.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch

from lm_telemetry.catalogue import Cost
from lm_telemetry.errors import ProbeError
from lm_telemetry.hooks.forward_pass import ForwardPass
from lm_telemetry.hooks.interventions import HeadMeans, without_head
from lm_telemetry.hooks.preserve import evaluating
from lm_telemetry.instruments.probing import Probing, Row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from lm_telemetry.hooks.topology import AttentionModule
    from lm_telemetry.instruments.base import Attachment

Ablation = Literal["zero", "mean", "both"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    attention: AttentionModule
    head: int
    mean: Tensor


@dataclass(kw_only=True)
class KnockOut(Probing):
    """Causal effect of each head on the loss of the frozen probe."""

    name: ClassVar[str] = "knock_out"
    tables: ClassVar[tuple[str, ...]] = ("head_effects",)
    cost: ClassVar[Cost] = Cost.FORWARD
    usual_every: ClassVar[int | None] = 1000

    ablation: Ablation = "mean"
    """What stands for a head that is out: its `mean` over the probe, `zero`, or one after the other (`both`)."""

    heads: int | None = None
    """Heads taken out a capture, the next ones at the next capture, round and round; None for all at each."""

    micro_batch: int | None = 1
    """Sequences of the probe evaluated at a time, each piece one sample of the standard error; None for the whole probe
    at once, without one."""

    _next: int = field(default=0, init=False, repr=False, compare=False)
    _told: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("ablation", self.ablation in get_args(Ablation), f"one of {', '.join(get_args(Ablation))}")
        for name in ("heads", "micro_batch"):
            value = getattr(self, name)
            self.require(name, value is None or (type(value) is int and value >= 1), "at least 1, or None")

    def attach(self, attachment: Attachment) -> None:
        """Keep the way to the model; begin with its first head."""
        super().attach(attachment)
        self._next, self._told = 0, False

    def estimate(self, attachment: Attachment, step: int) -> list[Row]:
        """Knock the heads out that are due."""
        began = time.perf_counter()
        model, probe, topology = attachment.model, attachment.probe, attachment.topology
        rows: list[Row] = []
        broken: list[str] = []
        with evaluating(model), torch.no_grad():
            weighted = probe.micro_batches(self.micro_batch, model=model)
            shares, pieces = [w for w, _ in weighted], [piece for _, piece in weighted]
            means = HeadMeans(topology.attentions)
            with means.reading(ForwardPass(probe.batch, is_encoder_decoder=topology.is_encoder_decoder)):
                probe.loss(model)
            present = [float(piece.loss(model)) for piece in pieces]
            loss = _weighted(shares, present)
            for due in self._due(self._heads(attachment, means)):
                for ablation in ("zero", "mean") if self.ablation == "both" else (self.ablation,):
                    replacement = due.mean if ablation == "mean" else None
                    with without_head(due.attention, due.head, replacement=replacement):
                        absent = [piece.loss(model, require_finite=False) for piece in pieces]
                    effects = [a - p for a, p in zip(torch.stack(absent).tolist(), present, strict=True)]
                    if not all(map(math.isfinite, effects)):
                        broken.append(f"{due.attention.name}.{due.head}")
                        continue
                    rows.append(
                        {
                            "stack": due.attention.stack,
                            "layer": due.attention.layer,
                            "kind": due.attention.kind,
                            "head": due.head,
                            "ablation": ablation,
                            "effect": _weighted(shares, effects),
                            "stderr": _standard_error(shares, effects),
                            "loss": loss,
                            "n_sequences": probe.n_sequences,
                            "n_tokens": probe.n_tokens,
                        }
                    )
        if broken:
            attachment.event(
                "warning",
                "knock_out_not_finite",
                f"without any one of {len(broken)} heads the loss on the probe is not finite: they have no effect that "
                "could be stored",
                heads=broken,
            )
        seconds = time.perf_counter() - began
        return [{**row, "seconds": seconds} for row in rows]

    def _heads(self, attachment: Attachment, means: HeadMeans) -> list[_Head]:
        """All heads that can be taken out."""
        found: list[_Head] = []
        missing: list[str] = []
        for attention in attachment.topology.attentions:
            mean = means.of(attention)
            if mean is None:
                missing.append(attention.name)
            else:
                found += [_Head(attention=attention, head=head, mean=part) for head, part in enumerate(mean)]
        if not found:
            raise ProbeError(
                f"{type(attachment.model).__name__}: no attention with a known number of heads calls its output "
                "projection as a module, so that no head can be taken out"
            )
        if missing and not self._told:
            self._told = True
            attachment.event(
                "info",
                "heads_not_knocked_out",
                f"{len(missing)} of {len(attachment.topology.attentions)} attention layers have no rows in "
                "`head_effects`: their number of heads is not known, or their output projection is not given them all",
                layers=missing,
            )
        return found

    def _due(self, heads: list[_Head]) -> list[_Head]:
        """Those whose turn it is."""
        n = len(heads) if self.heads is None else min(self.heads, len(heads))
        due = [heads[(self._next + i) % len(heads)] for i in range(n)]
        self._next = (self._next + n) % len(heads)
        return due


def _weighted(shares: Sequence[float], values: Sequence[float]) -> float:
    return math.fsum(w * v for w, v in zip(shares, values, strict=True))


def _standard_error(shares: Sequence[float], effects: Sequence[float]) -> float | None:
    """Of the weighted mean; None for a single piece."""
    n = len(effects)
    if n < 2:
        return None
    mean = _weighted(shares, effects)
    return math.sqrt(n / (n - 1) * math.fsum((w * (d - mean)) ** 2 for w, d in zip(shares, effects, strict=True)))
