"""Moments of activations at every site: is the residual stream growing, dying, or carried by a few entries?

Fills `layers`: mean, std, rms, absmax, kurtosis, share of zeros and of outliers, non-finite entries, over a fixed
number of evenly spaced real tokens of the step's first micro-batch; and the residual ratio, which is the RMS of what a
block writes over the RMS of the stream that enters the block.

On a GPU each site is reduced by one kernel as it is computed. On the CPU the sampled tokens are set aside and all sites
reduced at once when the step ends, since there the cost is in the number of calls.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from lm_telemetry.catalogue import Cost
from lm_telemetry.instruments.base import Attachment, Columns, Harvest, Instrument, Tap
from lm_telemetry.kernels.dispatch import choose
from lm_telemetry.kernels.moments import RAW_COLUMNS, finish, moments, stacked_moments

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from lm_telemetry.hooks.activation_taps import Activation
    from lm_telemetry.hooks.topology import Site


@dataclass(kw_only=True)
class Activations(Instrument):
    """Moments of activations by layer and site."""

    name: ClassVar[str] = "activations"
    tables: ClassVar[tuple[str, ...]] = ("layers",)
    taps: ClassVar[frozenset[Tap]] = frozenset({Tap.ACTIVATIONS})
    cost: ClassVar[Cost] = Cost.REDUCTION

    tokens: int | None = 256
    """Tokens sampled a capture, fixed so that captures compare; None takes every token."""

    _sites: tuple[Site, ...] = field(default=(), init=False, repr=False)
    _raw: Tensor | None = field(default=None, init=False, repr=False)
    _staged: dict[tuple[int, int, torch.dtype], tuple[Tensor, list[int]]] = field(
        default_factory=dict, init=False, repr=False
    )
    _widths: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _seen: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        Instrument.__post_init__(self)
        self.require(
            "tokens", self.tokens is None or (type(self.tokens) is int and self.tokens >= 1), "at least 1, or None"
        )

    def attach(self, attachment: Attachment) -> None:
        """Keep the sites."""
        self._sites = attachment.topology.sites

    def begin(self, step: int) -> None:
        """Forget what an abandoned capture has left."""
        self._seen = False
        # a buffer for each shape of sample; those not used by the last capture (batches have changed) are given up
        self._staged = {key: staged for key, staged in self._staged.items() if staged[1]}
        for _, filled in self._staged.values():
            filled.clear()
        if self._raw is not None:
            self._raw.zero_()

    def on_activation(self, activation: Activation) -> None:
        """Reduce a site, or set its sampled tokens aside."""
        hidden = activation.hidden
        batch_size, length = hidden.shape[:2] if hidden.dim() > 2 else (1, hidden.shape[0])
        rows = hidden.reshape(-1, hidden.shape[-1])
        sample = activation.forward.tokens(activation.site.stack, batch_size, length, self.tokens, hidden.device)
        if self._raw is None or self._raw.device != hidden.device:
            self._raw = torch.zeros(len(self._sites), len(RAW_COLUMNS), dtype=torch.float64, device=hidden.device)
        self._seen = True
        self._widths[activation.site.index] = rows.shape[1]
        if hidden.device.type == "cpu" and choose(rows).path == "torch":
            key = (len(sample.index), rows.shape[1], rows.dtype)
            if key not in self._staged:
                self._staged[key] = (torch.empty(len(self._sites), *key[:2], dtype=key[2]), [])
            stage, filled = self._staged[key]
            torch.index_select(rows, 0, sample.index, out=stage[len(filled)])
            filled.append(activation.site.index)
        else:
            moments(rows, out=self._raw[activation.site.index], rows=sample.index, keep=sample.keep)

    def harvest(self) -> Harvest | None:
        """The raw moments of all sites."""
        if not self._seen or self._raw is None:
            return None
        for stage, filled in self._staged.values():
            if filled:
                self._raw[filled] = stacked_moments(stage[: len(filled)])
        return Harvest(tensors={"raw": self._raw})

    def rows(self, host: Mapping[str, np.ndarray[Any, Any]], note: Any) -> Mapping[str, Columns]:
        """One row a site that was seen."""
        raw = host["raw"]
        counted = raw[:, RAW_COLUMNS.index("count")] + raw[:, RAW_COLUMNS.index("nonfinite")]
        seen = [int(i) for i in np.flatnonzero(counted)]
        sites = [self._sites[i] for i in seen]
        columns: dict[str, Any] = dict(finish(raw[seen]))
        columns["stack"] = [s.stack for s in sites]
        columns["layer"] = [s.layer for s in sites]
        columns["site"] = [s.site for s in sites]
        columns["n_tokens"] = (counted[seen] / [self._widths[i] for i in seen]).astype(np.int64)
        columns["residual_ratio"] = _residual_ratio(sites, columns["rms"])
        return {"layers": columns}

    def detach(self) -> None:
        """Let go of the buffers."""
        self._raw = None
        self._staged = {}


def _residual_ratio(sites: list[Site], rms: np.ma.MaskedArray[Any, Any]) -> np.ma.MaskedArray[Any, Any]:
    """RMS of each block's writes over the RMS of the stream that enters the block; masked at other sites."""
    values: list[float] = rms.filled(np.nan).tolist()
    stream = {(s.stack, s.layer): v for s, v in zip(sites, values, strict=True) if s.site in {"embed", "resid"}}
    ratio = [
        value / stream.get((site.stack, site.layer - 1), 0.0)
        if site.site in {"attn_out", "mlp_out"} and stream.get((site.stack, site.layer - 1), 0.0) > 0
        else np.nan
        for site, value in zip(sites, values, strict=True)
    ]
    return np.ma.masked_invalid(ratio)
