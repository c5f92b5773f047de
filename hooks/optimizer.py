"""What a live optimizer is doing, read without touching it: its kind, its learning rate, its preconditioner.

A curvature means something only beside the step that is taken with it. On a quadratic with Hessian eigenvalue λ each
method below is a linear recurrence, and diverges when λ passes the threshold at which a root of its characteristic
polynomial passes -1:

| method | operator | threshold |
| --- | --- | --- |
| SGD | Hessian | 2/η |
| heavy ball, momentum β, dampening τ | Hessian | (2 + 2β) / ((1 - τ) η) |
| Nesterov momentum | Hessian | (2 + 2β) / ((1 + 2β) η) |
| Adam, AdamW | P^-1/2 H P^-1/2 | (2 + 2β1) / ((1 - β1) η) |
| any, along its own update | critical sharpness | 2/η |

Sources: arXiv 2103.00065 (appendix B), 2207.14484, 2601.16979. There is no threshold, and so NULL, wherever the raw
Hessian would be compared with an adaptive method's learning rate. Weight decay is left out of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from lm_telemetry.hooks.differentiate import flat_dtype, flatten

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Kind = Literal["sgd", "adam", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerReading:
    """Hyperparameters of one step.

    Read it before the learning-rate scheduler steps, that is, right after the optimizer's own step.

    Attributes:
        kind: `sgd`, `adam` (Adam and AdamW, whichever implementation) or `unknown`.
        name: class of the optimizer.
        learning_rate: of the first group that holds parameters.
        momentum: β of SGD, β1 of Adam; 0 if unknown.
        dampening: τ of SGD.
        nesterov: whether SGD takes Nesterov's step.
        uniform: whether all groups agree on these numbers (and none maximises); else there is no threshold.
    """

    kind: Kind
    name: str
    learning_rate: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    uniform: bool = True

    def threshold(self, operator: Literal["hessian", "preconditioned", "critical"]) -> float | None:
        """The edge of stability that an estimate of `operator` may be compared with, or None (see the module)."""
        if self.learning_rate <= 0 or not self.uniform:
            return None
        beta = self.momentum
        if operator == "critical":
            return 2 / self.learning_rate
        if operator == "preconditioned" and self.kind == "adam" and beta < 1:
            return (2 + 2 * beta) / ((1 - beta) * self.learning_rate)
        if operator == "hessian" and self.kind == "sgd":
            if self.nesterov:
                return (2 + 2 * beta) / ((1 + 2 * beta) * self.learning_rate)
            # Dampening acts through the momentum buffer, which plain SGD does not have.
            kept = 1 - self.dampening if beta else 1.0
            return (2 + 2 * beta) / (kept * self.learning_rate) if kept > 0 else None
        return None


def unwrap_optimizer(optimizer: Any) -> Optimizer | None:
    """The torch optimizer inside accelerate's (or a similar) wrapper; None if there is none."""
    inner = getattr(optimizer, "optimizer", None)
    while isinstance(inner, Optimizer):
        optimizer, inner = inner, getattr(inner, "optimizer", None)
    return optimizer if isinstance(optimizer, Optimizer) else None


def read_optimizer(optimizer: Optimizer) -> OptimizerReading:
    """The hyperparameters in use now."""
    inner = unwrap_optimizer(optimizer) or optimizer
    kind: Kind = "adam" if isinstance(inner, Adam | AdamW) else "sgd" if isinstance(inner, SGD) else "unknown"
    groups = [group for group in inner.param_groups if group["params"]] or list(inner.param_groups)
    settings = [_settings(kind, group) for group in groups]
    maximises = any(group.get("maximize", False) for group in groups)
    return OptimizerReading(
        kind=kind,
        name=type(inner).__name__,
        uniform=not maximises and all(other == settings[0] for other in settings),
        **settings[0],
    )


def preconditioner(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Tensor | None:
    """Adam's diagonal P = (1 - β1^t) (sqrt(v / (1 - β2^t)) + ε), (P,) in the order of `parameters` (arXiv 2207.14484).

    v is the second moment (with amsgrad its running maximum) and t the parameter's own step count. A parameter the
    optimizer has never stepped is infinitely stiff: its entries are inf. None for other optimizers, and while there is
    no state at all. float32, or float64 if a parameter is.
    """
    inner = unwrap_optimizer(optimizer)
    if not isinstance(inner, Adam | AdamW):
        return None
    group_of = {id(p): group for group in inner.param_groups for p in group["params"]}
    pieces = [_adam_diagonal(inner.state.get(p, {}), group_of.get(id(p)), p) for p in parameters]
    if all(piece is None for piece in pieces):
        return None
    filled = [
        torch.full_like(p, torch.inf) if piece is None else piece for piece, p in zip(pieces, parameters, strict=True)
    ]
    return flatten(filled, dtype=flat_dtype(parameters), device=parameters[0].device)


def _settings(kind: Kind, group: dict[str, Any]) -> dict[str, Any]:
    # Hyperparameters may be tensors (capturable).
    settings: dict[str, Any] = {"learning_rate": float(group.get("lr", 0.0))}
    if kind == "sgd":
        settings |= {name: float(group[name]) for name in ("momentum", "dampening")}
        settings["nesterov"] = bool(group["nesterov"])
    elif kind == "adam":
        settings["momentum"] = float(group["betas"][0])
    return settings


def _adam_diagonal(state: dict[str, Any], group: dict[str, Any] | None, parameter: Tensor) -> Tensor | None:
    if group is None or "exp_avg_sq" not in state:
        return None
    beta1, beta2 = (float(beta) for beta in group["betas"])
    step = float(state["step"])
    second: Tensor = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    second = second.to(flat_dtype([parameter]))
    root = torch.sqrt(second / (1 - beta2**step))
    diagonal: Tensor = (root + float(group["eps"])) * (1 - beta1**step)
    return diagonal
