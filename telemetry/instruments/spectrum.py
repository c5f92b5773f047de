"""`spectrum`: the density of all Hessian eigenvalues on the frozen probe, by stochastic Lanczos quadrature.

Fills `spectra` with one row of scope `all` and estimator `slq` (see `kernels.density`; arXiv 1901.10159): `density` on
`grid` is the share of the eigenvalues per unit of eigenvalue, broadened by 1 % of the span unless `width` says
otherwise, and `density_stderr` its standard error over random vectors. A language model's is a narrow bulk at 0 with a
few outliers far to its right; an outlier that is one eigenvalue of a million has a millionth of the mass, so plot the
density on a logarithmic axis, and read the outliers themselves from `sharpness`.

Random vectors are drawn from a generator of this instrument's own, seeded with the step. What cannot be measured leaves
an event and no row. Left out: layers, and averaging over ranks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from lm_telemetry.catalogue import Cost
from lm_telemetry.errors import ProbeError
from lm_telemetry.hooks.curvature_operator import DERIVATIVES, Derivative, curvature_operator
from lm_telemetry.instruments.base import Attachment, Columns, Harvest, Instrument, Tap
from lm_telemetry.kernels.density import LEAST_POINTS, spectral_density
from lm_telemetry.kernels.trace import own_generator

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np


@dataclass(kw_only=True)
class Spectrum(Instrument):
    """Spectral density of the Hessian on the frozen probe."""

    name: ClassVar[str] = "spectrum"
    tables: ClassVar[tuple[str, ...]] = ("spectra",)
    taps: ClassVar[frozenset[Tap]] = frozenset({Tap.PROBE})
    cost: ClassVar[Cost] = Cost.GRADIENT
    usual_every: ClassVar[int | None] = 2000

    probes: int = 4
    """Random vectors."""

    steps: int = 40
    """Lanczos steps from each; probes times steps Hessian-vector products are spent, and `steps` vectors held."""

    grid_points: int = 200
    """Points at which the density is stored."""

    width: float | None = None
    """Standard deviation of the broadening, in units of the eigenvalues; None takes 1 % of the span."""

    derivative: Derivative = "auto"
    """How the Hessian is applied, as for `sharpness`."""

    micro_batch: int | None = None
    """Sequences of the probe differentiated at a time, so that these bound the memory; None for all at once."""

    _attachment: Attachment | None = field(default=None, init=False, repr=False, compare=False)
    _told: bool = field(default=False, init=False, repr=False, compare=False)
    _captured: dict[str, Any] | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("probes", 1), ("steps", 2), ("grid_points", LEAST_POINTS)):
            value = getattr(self, name)
            self.require(name, type(value) is int and value >= least, f"at least {least}")
        number = isinstance(self.width, int | float) and not isinstance(self.width, bool)
        self.require("width", self.width is None or (number and self.width > 0), "a positive number, or None")
        self.require("derivative", self.derivative in DERIVATIVES, f"one of {', '.join(DERIVATIVES)}")
        size = self.micro_batch
        self.require("micro_batch", size is None or (type(size) is int and size >= 1), "at least 1, or None")

    def attach(self, attachment: Attachment) -> None:
        """Keep the model and the probe."""
        self._attachment = attachment
        self._told = False

    def begin(self, step: int) -> None:
        """Forget the last capture."""
        self._captured = None

    def measure(self, step: int) -> None:
        """Estimate the density."""
        assert self._attachment is not None
        try:
            self._captured = self._estimate(self._attachment, step)
        except (ProbeError, FloatingPointError) as error:
            self._attachment.event("warning", "spectrum_not_measured", str(error))

    def harvest(self) -> Harvest | None:
        """Hand over the estimate; it is on the host already."""
        captured, self._captured = self._captured, None
        return None if captured is None else Harvest(note=captured)

    def rows(self, host: Mapping[str, np.ndarray[Any, Any]], note: Any) -> Mapping[str, Columns]:
        """One row."""
        return {"spectra": {name: [value] for name, value in note.items()}}

    def detach(self) -> None:
        """Let go of the model."""
        self._attachment = None

    def _estimate(self, attachment: Attachment, step: int) -> dict[str, Any]:
        began = time.perf_counter()
        model, probe = attachment.model, attachment.probe
        with curvature_operator(
            model,
            probe,
            attachment.parameters.parameters,
            derivative=self.derivative,
            micro_batch=self.micro_batch,
        ) as hessian:
            found = spectral_density(
                hessian.matvec,
                dimension=hessian.dimension,
                probes=self.probes,
                steps=self.steps,
                generator=own_generator(step, hessian.device),
                grid_points=self.grid_points,
                width=self.width,
                dtype=hessian.dtype,
                device=hessian.device,
            )
        self._tell(attachment, hessian.reason)
        return {
            "operator": "hessian",
            "scope": "all",
            "estimator": "slq",
            "grid": found.grid.numpy(),
            "density": found.density.numpy(),
            "density_stderr": None if found.density_stderr is None else found.density_stderr.numpy(),
            "probes": found.probes,
            "hvps": found.hvps,
            "seconds": time.perf_counter() - began,
        }

    def _tell(self, attachment: Attachment, reason: str | None) -> None:
        """Say once why differences of gradients stand in for the second derivative."""
        if reason and not self._told:
            self._told = True
            attachment.event("info", "finite_differences", f"the Hessian is applied by differences: {reason}")
