"""The Hessian of the cross-entropy loss in its logits, times a vector, in place.

For logits z (N, V), p = softmax(z) a row, and a tangent u (N, V), of a loss that sums the cross-entropies of the rows
that have a label and multiplies by `scale`:

    (H u)_i = scale (p_i * u_i - p_i (p_i . u_i)) = scale p_i * (u_i - <u_i>),   <u_i> = p_i . u_i

and 0 for a row without a label; which label a row has does not matter. H is the middle of the generalised Gauss-Newton
matrix J'HJ of a classifier (Schraudolph, Neural Computation 14, 2002; arXiv 1412.1193).

Decisions:

- The result takes the place of the tangent, and the softmax is never stored: beside logits and tangent nothing of their
  size exists. At a vocabulary of 128k a second such buffer is most of the memory of a step.
- u - <u> is formed so that it keeps its digits where one token has nearly all of the mass: p (1 - p) of a token certain
  to 1e-9 comes out right, where p * u - p * (p . u) in float32 would be all rounding.
- Two passes over the row: the first finds the largest logit, the sum of exponentials and <u>, the second writes.

Left out: the loss and its gradient, class weights, label smoothing, and a tensor-parallel vocabulary.
"""

from __future__ import annotations

import torch

from lm_telemetry.kernels.dispatch import choose, launching_on

_CPU_BLOCK = 131_072
"""Logits the twin works on at a time: 512 KiB in float32, so that a block and what is made of it stay in L2 cache."""

_DEVICE_BLOCK = 2**24
"""The same on an accelerator without Triton: 64 MiB in float32, enough to fill it."""


@torch.no_grad()
def cross_entropy_hvp(
    logits: torch.Tensor,
    tangent: torch.Tensor,
    labels: torch.Tensor,
    *,
    scale: float,
    ignore_index: int = -100,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each labelled row's scale (p * u - p (p . u)), p = softmax(z); 0 for the other rows.

    Computed in float32 (float64 where an argument is); `out` rounds once. A row with NaN, +inf or nothing but -inf
    among its logits gives NaN, unless it has no label. On the Triton path nothing synchronises with the device.

    Args:
        logits: z, (N, V), any floating dtype, rows may lie apart.
        tangent: u, (N, V), any floating dtype, rows may lie apart.
        labels: (N,) integers on the same device; only whether they equal `ignore_index` is looked at.
        scale: factor of the loss: 1 / (number of labels) for a mean over tokens, 1 for a sum.
        ignore_index: label of a row that does not count.
        out: (N, V), receives the result; None writes it over `tangent`. Must not overlap `logits`.

    Returns:
        `out`, or `tangent`.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    out = tangent if out is None else out
    for name, given in (("logits", logits), ("tangent", tangent), ("out", out)):
        if given.ndim != 2 or given.shape != logits.shape or not given.is_floating_point():
            raise ValueError(
                f"cross_entropy_hvp: expected {name} of shape (N, V), that of the logits {tuple(logits.shape)}, and "
                f"floating dtype; got {tuple(given.shape)}, {given.dtype}"
            )
    if labels.shape != logits.shape[:1] or labels.dtype not in {torch.int32, torch.int64}:
        raise ValueError(
            f"cross_entropy_hvp: expected labels of shape ({len(logits)},), one a row, int64 or int32; "
            f"got {tuple(labels.shape)}, {labels.dtype}"
        )
    if logits.numel() == 0:
        return out
    if choose(logits, tangent, out, refusal=_refusal(logits, tangent, out)).path == "triton":
        from lm_telemetry.kernels.cross_entropy_hvp_kernel import launch

        with launching_on(logits):
            return launch(logits, tangent, labels, scale, ignore_index, out)
    return _twin(logits, tangent, (labels == ignore_index)[:, None], scale, out)


def _refusal(*tensors: torch.Tensor) -> str | None:
    if any(tensor.shape[1] > 1 and tensor.stride(1) != 1 for tensor in tensors):
        return "the entries of a row are not adjacent"
    return None


def _twin(
    logits: torch.Tensor, tangent: torch.Tensor, ignored: torch.Tensor, scale: float, out: torch.Tensor
) -> torch.Tensor:
    """In blocks of rows, with three blocks of scratch.

    The mean is the corrected one of two passes: of u first, then of what is left of u, whose rounding is that of the
    spread about the mean and not that of the mean.
    """
    N, V = logits.shape
    dtype = torch.float64 if torch.float64 in {logits.dtype, tangent.dtype} else torch.float32
    step = max(1, (_CPU_BLOCK if logits.device.type == "cpu" else _DEVICE_BLOCK) // V)
    shape = (min(step, N), V)
    weights, products, spreads = (torch.empty(shape, dtype=dtype, device=logits.device) for _ in range(3))
    for start in range(0, N, step):
        here = slice(start, min(start + step, N))
        z, u = logits[here], tangent[here]
        p, product, spread = weights[: len(z)], products[: len(z)], spreads[: len(z)].copy_(u)
        torch.softmax(z, -1, dtype=dtype, out=p)
        for _ in range(2):
            spread.sub_(torch.mul(p, spread, out=product).sum(-1, keepdim=True))
        # The weights do not quite add up to 1: softmax sums a long row less carefully than sum does.
        spread.mul_(p).mul_(scale / p.sum(-1, keepdim=True))
        spread.masked_fill_(ignored[here], 0)
        out[here] = spread
    return out
