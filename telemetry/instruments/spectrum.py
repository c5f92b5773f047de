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
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lm_telemetry.instruments.probing import Differentiating, Row
from lm_telemetry.kernels.density import LEAST_POINTS, spectral_density
from lm_telemetry.kernels.trace import own_generator

if TYPE_CHECKING:
    from lm_telemetry.instruments.base import Attachment


@dataclass(kw_only=True)
class Spectrum(Differentiating):
    """Spectral density of the Hessian on the frozen probe."""

    name: ClassVar[str] = "spectrum"
    tables: ClassVar[tuple[str, ...]] = ("spectra",)
    usual_every: ClassVar[int | None] = 2000

    probes: int = 4
    """Random vectors."""

    steps: int = 40
    """Lanczos steps from each; probes times steps Hessian-vector products are spent, and `steps` vectors held."""

    grid_points: int = 200
    """Points at which the density is stored."""

    width: float | None = None
    """Standard deviation of the broadening, in units of the eigenvalues; None takes 1 % of the span."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("probes", 1), ("steps", 2), ("grid_points", LEAST_POINTS)):
            value = getattr(self, name)
            self.require(name, type(value) is int and value >= least, f"at least {least}")
        number = isinstance(self.width, int | float) and not isinstance(self.width, bool)
        self.require("width", self.width is None or (number and self.width > 0), "a positive number, or None")

    def estimate(self, attachment: Attachment, step: int) -> list[Row]:
        """The density, one row."""
        began = time.perf_counter()
        with self.hessian(attachment) as hessian:
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
        row = {
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
        return [row]
