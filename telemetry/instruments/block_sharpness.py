"""`block_sharpness`: where in the network the loss is sharp, block by block.

For each block of the model, and for what lies outside the blocks, the largest eigenvalue of that part of the Hessian
which belongs to the part's own parameters: the diagonal block H_bb on the frozen probe. By interlacing none exceeds the
largest eigenvalue of H, and the layer whose value comes near it is the one that holds the training back. Fills
`curvature` with estimator `block_lanczos`, one row a part; `scope` is `stack.layer`, `embedding` (the input embedding,
and the output head where it is tied to it) or `other`.

One graph of the gradient serves all parts. A product with H_bb differentiates the part's gradients with respect to the
part's parameters alone, which walks the graph from the loss down to that part and no further: in the last, fourth and
first of six blocks 0.3, 0.6 and 1.2 gradients where a product with H cost 2.0. The cost of the graph is in the
`seconds` of the first row. Where there is no such graph (no second derivative, no memory, `micro_batch`) each part has
an operator of its own.

`threshold` is that of the whole Hessian (see `sharpness`): a block beyond it puts H beyond it. What cannot be measured
leaves an event and no row. Left out: warm starts, curvature between blocks, and averaging over ranks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lm_telemetry.errors import ProbeError
from lm_telemetry.hooks.differentiate import (
    RetainedHessian,
    flat_dtype,
    flatten,
    require_second_derivative,
    unflatten,
)
from lm_telemetry.hooks.preserve import evaluating
from lm_telemetry.hooks.probe import eager
from lm_telemetry.hooks.topology import scopes
from lm_telemetry.instruments.probing import Differentiating, Row, is_share
from lm_telemetry.kernels.lanczos import MINIMUM_STEPS, EigenResult, lanczos

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_telemetry.hooks.curvature_operator import CurvatureOperator
    from lm_telemetry.instruments.base import Attachment


class PartitionedHessian(RetainedHessian):
    """A retained Hessian whose diagonal blocks are operators of their own."""

    def block(self, indices: Sequence[int]) -> DiagonalBlock:
        """H_bb over the parameters at `indices`; it lives as long as the context."""
        return DiagonalBlock([self._graph[i] for i in indices], [self._parameters[i] for i in indices])


class DiagonalBlock:
    """H_bb of some parameters, by the second derivative of their own gradients; vectors as in `RetainedHessian`."""

    def __init__(self, gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        self._gradients, self._parameters = gradients, parameters
        self.dtype = flat_dtype(parameters)
        self.device = parameters[0].device

    @property
    def dimension(self) -> int:
        """Number of the block's coordinates."""
        return sum(p.numel() for p in self._parameters)

    def matvec(self, vector: Tensor) -> Tensor:
        """H_bb v for v of shape (dimension,), as a new tensor."""
        pieces = unflatten(vector, self._parameters)
        # A parameter the loss is linear in has a gradient without a graph, and a zero row.
        curved = [(g, piece) for g, piece in zip(self._gradients, pieces, strict=True) if g.requires_grad]
        if not curved:
            return torch.zeros_like(vector)
        with eager():
            products = torch.autograd.grad(
                [g for g, _ in curved],
                list(self._parameters),
                grad_outputs=[piece for _, piece in curved],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        return flatten(products, dtype=self.dtype, device=self.device)


@dataclass(kw_only=True)
class BlockSharpness(Differentiating):
    """Largest eigenvalue of each block's own Hessian on the frozen probe."""

    name: ClassVar[str] = "block_sharpness"
    usual_every: ClassVar[int | None] = 2000

    tolerance: float = 0.02
    """Relative error at which an eigenvalue counts as converged."""

    max_hvps: int = 20
    """Products a block may cost; what was found by then is stored with converged = false."""

    _parts: dict[str, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("tolerance", is_share(self.tolerance), "a number between 0 and 1")
        enough = type(self.max_hvps) is int and self.max_hvps >= MINIMUM_STEPS
        self.require("max_hvps", enough, f"at least {MINIMUM_STEPS}")

    def attach(self, attachment: Attachment) -> None:
        """Find the parts of the model."""
        super().attach(attachment)
        tap = attachment.parameters
        self._parts = scopes(attachment.model, attachment.topology, tap.names, tap.parameters)

    def estimate(self, attachment: Attachment, step: int) -> list[Row]:
        """One row a part."""
        if self.derivative != "finite_difference" and self.micro_batch is None:
            try:
                return self._on_one_graph(attachment)
            except (ProbeError, RuntimeError):
                # What is wrong with the probe is said again below; what only the graph cannot do is not.
                if self.derivative != "auto":
                    raise
        return self._part_by_part(attachment)

    def _on_one_graph(self, attachment: Attachment) -> list[Row]:
        began = time.perf_counter()
        model, probe = attachment.model, attachment.probe
        require_second_derivative(model)
        rows = []
        with (
            evaluating(model),
            PartitionedHessian(lambda: probe.loss(model), attachment.parameters.parameters) as hessian,
        ):
            for scope, indices in self._parts.items():
                result = self._solve(hessian.block(indices))
                rows.append(self._row(attachment, scope, result, hessian.loss, began))
                began = time.perf_counter()
        return rows

    def _part_by_part(self, attachment: Attachment) -> list[Row]:
        rows = []
        for scope, indices in self._parts.items():
            began = time.perf_counter()
            with self.hessian(attachment, [attachment.parameters.parameters[i] for i in indices]) as block:
                result = self._solve(block)
                row = self._row(attachment, scope, result, block.loss, began)
                # Of A + E some eigenvalue lies within |Ay - θy| of θ, and so of A within |Ey| more.
                row["residual"] += max(block.errors, default=0.0)
                row["derivative"] = block.derivative
            rows.append(row)
        return rows

    def _row(self, attachment: Attachment, scope: str, result: EigenResult, loss: float, began: float) -> Row:
        reading = self.reading()
        return {
            "operator": "hessian",
            "scope": scope,
            "estimator": "block_lanczos",
            "derivative": "double_backward",
            "index": 0,
            "value": result.value,
            "residual": result.residual,
            "converged": result.converged,
            "threshold": reading.threshold("hessian") if reading else None,
            "hvps": result.hvps,
            "loss": loss,
            "n_tokens": attachment.probe.n_tokens,
            "seconds": time.perf_counter() - began,
        }

    def _solve(self, block: DiagonalBlock | CurvatureOperator) -> EigenResult:
        return lanczos(
            block.matvec,
            dimension=block.dimension,
            tolerance=self.tolerance,
            max_steps=self.max_hvps,
            dtype=block.dtype,
            device=block.device,
        )
