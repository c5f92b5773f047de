"""`representation`: the geometry of what the model makes of the frozen probe, and how it drifts in training.

One forward pass of the probe, in eval mode, with taps of its own that are gone afterwards. At each site the same
`tokens` real tokens, evenly spaced, are turned into Gram matrices on the model's device (`kernels.gram`), and these
into two tables (`kernels.geometry` has the formulas):

- `representations`: how many directions the tokens fill (participation ratio, effective rank, RankMe, stable rank),
  whether they point one way (anisotropy), the massive activation (the largest magnitude among all real tokens of the
  probe, with its place), and how far the site is from the previous and the first capture since the agent was attached
  (debiased CKA, mutual nearest neighbours). With lr = 0 both are 1.
- `sketches`: the U-centred Gram matrix of `sketch_tokens` tokens above its diagonal, row by row, in float32. For any
  two steps, layers, runs or models on the same probe debiased CKA is then `list_cosine_similarity(a.gram, b.gram)`.
  A sketch of 128 tokens takes 32,512 bytes a site, of 256 tokens 130,560. Its tokens do not depend on `tokens`.

Decisions:

- By default the stream is looked at where it enters, between blocks and where it leaves (`embed`, `resid`, `final`);
  what blocks write (`attn_out`, `mlp_out`) can be asked for.
- The training thread does the forward, the Gram matrices and what later captures are compared with; the eigen-solves
  (two a site) are done on the writer's thread.
- Two captures are compared if the same tokens were finite in both. Tokens with NaN or infinite entries are counted and
  left out of everything else, and a sketch without all of its tokens is not stored, since nobody could tell which
  ones it lacks.

Held between captures: of the first and the previous one a sketch and the neighbours, 0.28 MB a site for 256 tokens.
Left out: null distributions (see `kernels.geometry`), and averaging over ranks, each of which has its own probe.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lm_telemetry.catalogue import Cost
from lm_telemetry.errors import ProbeError
from lm_telemetry.hooks.activation_taps import Activation, ActivationTaps
from lm_telemetry.hooks.forward_pass import ForwardPass
from lm_telemetry.hooks.preserve import evaluating
from lm_telemetry.instruments.probing import Probing, Row
from lm_telemetry.kernels import geometry
from lm_telemetry.kernels.gram import MAX_TOKENS, Gram, gram
from lm_telemetry.kernels.massive import massive_activation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from torch import Tensor

    from lm_telemetry.hooks.topology import Site
    from lm_telemetry.instruments.base import Attachment, Columns

SITES = ("embed", "resid", "attn_out", "mlp_out", "final")
"""Sites that can be asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """A site in the probe's forward pass, reduced, on the model's device.

    Attributes:
        width: its channels.
        length: positions of a sequence; None where the model has flattened its tokens.
        kept: (n,) bool, False for a sampled token that repeats another.
        centred: Gram matrix of the sampled tokens about their mean.
        plain: the same, not centred.
        sketched: that of the sketch's tokens, centred; None without sketches.
        sketch_kept: as `kept`, for these.
        massive: (5,) float64, `massive.COLUMNS`.
    """

    width: int
    length: int | None
    kept: Tensor
    centred: Gram
    plain: Gram
    sketched: Gram | None
    sketch_kept: Tensor | None
    massive: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """A site at one step, for later captures to be compared with; on the host.

    Attributes:
        step: when it was captured.
        used: (n,) bool, which of the sampled tokens it is of.
        sketch: their `geometry.sketch`; None if there are too few.
        neighbours: their nearest neighbours.
    """

    step: int
    used: Tensor
    sketch: Tensor | None
    neighbours: Tensor

    def drift(self, then: _Form | None) -> tuple[float | None, float | None]:
        """Debiased CKA and overlap of neighbours with an earlier form; None for other tokens, or where not defined."""
        if then is None or not torch.equal(self.used, then.used):
            return None, None
        alike = None if self.sketch is None or then.sketch is None else geometry.debiased_cka(self.sketch, then.sketch)
        return alike, geometry.neighbour_overlap(self.neighbours, then.neighbours)


@dataclass(kw_only=True)
class Representation(Probing):
    """Geometry and drift of the representation of the frozen probe."""

    name: ClassVar[str] = "representation"
    tables: ClassVar[tuple[str, ...]] = ("representations", "sketches")
    cost: ClassVar[Cost] = Cost.FORWARD
    usual_every: ClassVar[int | None] = 100

    tokens: int = 256
    """Tokens sampled at a site, the same ones at every capture. Ranks depend on their number: keep it between runs."""

    neighbours: int = 10
    """Nearest neighbours of a token by which captures are compared."""

    sketch_tokens: int = 128
    """Tokens of a sketch, chosen apart from `tokens`; 0 for no sketches."""

    sites: Sequence[str] = ("embed", "resid", "final")
    """Sites that are looked at."""

    _first: dict[int, _Form] = field(default_factory=dict, init=False, repr=False, compare=False)
    _previous: dict[int, _Form] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        least = geometry.LEAST_TOKENS
        for name, lowest in (("tokens", least), ("neighbours", 1), ("sketch_tokens", least)):
            value = getattr(self, name)
            holds = type(value) is int and (lowest <= value <= MAX_TOKENS or (name == "sketch_tokens" and value == 0))
            self.require(name, holds, f"{lowest} to {MAX_TOKENS}" + ", or 0" * (name == "sketch_tokens"))
        listed = isinstance(self.sites, list | tuple) and len(self.sites) > 0
        self.require("sites", listed and all(site in SITES for site in self.sites), f"some of {', '.join(SITES)}")

    def attach(self, attachment: Attachment) -> None:
        """Keep the way to the model; drift is measured from here on."""
        super().attach(attachment)
        self._first, self._previous = {}, {}

    def estimate(self, attachment: Attachment, step: int) -> list[Row]:
        """For each site the columns that are known at once, and what `rows` works the others out from."""
        found: list[Row] = []
        for site, seen in self._look(attachment):
            row = self._row(site, seen, step)
            row["previous"] = self._previous.get(site.index)
            row["first"] = self._first.setdefault(site.index, row["form"])
            self._previous[site.index] = row["form"]
            found.append(row)
        if not found:
            raise ProbeError(
                f"{type(attachment.model).__name__} showed none of the sites {', '.join(self.sites)} in a forward pass "
                "of the probe: there is no representation to look at"
            )
        broken = sum(row["columns"]["nonfinite"] > 0 for row in found)
        if broken:
            attachment.event(
                "warning",
                "representation_nonfinite",
                f"tokens of the probe have NaN or infinite entries at {broken} of {len(found)} sites: they are left "
                "out of the ranks there, and a sketch that lacks tokens is not stored",
            )
        return found

    def rows(self, host: Mapping[str, np.ndarray[Any, Any]], note: Any) -> Mapping[str, Columns]:
        """Spectra and comparisons, a row a site; and the sketches."""
        geometries = [_geometry(row) for row in note]
        sketches = [_sketch(row) for row in note if row["sketched"] is not None]
        filled = {"representations": geometries, "sketches": sketches}
        return {t: {name: [row[name] for row in rows] for name in rows[0]} for t, rows in filled.items() if rows}

    def detach(self) -> None:
        """Let go of the model, and of the captures later ones were to be compared with."""
        super().detach()
        self._first, self._previous = {}, {}

    def _look(self, attachment: Attachment) -> list[tuple[Site, _Seen]]:
        """One forward pass of the probe, in which each site is reduced as it is computed."""
        model, topology = attachment.model, attachment.topology
        seen: dict[int, tuple[Site, _Seen]] = {}

        def listen(activation: Activation) -> None:
            if activation.site.site in self.sites:
                seen[activation.site.index] = (activation.site, self._reduce(activation))

        taps = ActivationTaps(topology, listen, lambda _: nullcontext())
        with evaluating(model), torch.no_grad():
            taps.install(heads=False)
            try:
                taps.arm(
                    ForwardPass(attachment.probe.batch, is_encoder_decoder=topology.is_encoder_decoder), heads=False
                )
                attachment.probe.forward(model)
            finally:
                taps.remove()
        return [seen[index] for index in sorted(seen)]

    def _reduce(self, activation: Activation) -> _Seen:
        hidden, stack = activation.hidden, activation.site.stack
        batch_size, length = hidden.shape[:2] if hidden.dim() > 2 else (1, hidden.shape[0])
        flat = hidden.reshape(-1, hidden.shape[-1])

        def sample(wanted: int) -> tuple[Tensor, Tensor]:
            drawn = activation.forward.tokens(stack, batch_size, length, wanted, hidden.device)
            return drawn.index, torch.ones_like(drawn.index, dtype=torch.bool) if drawn.keep is None else drawn.keep

        rows, kept = sample(self.tokens)
        sketched, sketch_kept = None, None
        if self.sketch_tokens:
            sketch_rows, sketch_kept = sample(self.sketch_tokens)
            sketched = gram(flat, rows=sketch_rows, keep=sketch_kept, center=True)
        real = activation.forward.mask(stack, batch_size, length)
        return _Seen(
            width=flat.shape[1],
            length=length if hidden.dim() > 2 else None,
            kept=kept,
            centred=gram(flat, rows=rows, keep=kept, center=True),
            plain=gram(flat, rows=rows, keep=kept, center=False),
            sketched=sketched,
            sketch_kept=sketch_kept,
            massive=massive_activation(flat, rows=rows, keep=kept, real=None if real is None else real.reshape(-1)),
        )

    def _row(self, site: Site, seen: _Seen, step: int) -> Row:
        """A site on the host: columns that take no eigenvalues, Gram matrices of the used tokens, and its form."""
        n_tokens, used = int(seen.kept.sum()), seen.centred.used.cpu()
        centred, plain = _of_used(seen.centred), _of_used(seen.plain)
        sketched = None
        if seen.sketched is not None and seen.sketch_kept is not None:
            complete = torch.equal(seen.sketched.used, seen.sketch_kept)
            enough = int(seen.sketch_kept.sum()) >= geometry.LEAST_TOKENS
            sketched = _of_used(seen.sketched) if complete and enough else None
        magnitude, value, token, channel, median = seen.massive.tolist()
        there = magnitude >= 0
        place = divmod(int(token), seen.length) if there and seen.length is not None else (None, None)
        return {
            "columns": {
                "stack": site.stack,
                "layer": site.layer,
                "site": site.site,
                "n_tokens": n_tokens,
                "width": seen.width,
                "massive_value": value if there else None,
                "massive_ratio": magnitude / median if there and median > 0 else None,
                "massive_sequence": place[0],
                "massive_position": place[1],
                "massive_channel": int(channel) if there else None,
                "nonfinite": n_tokens - int(used.sum()),
            },
            "centred": centred,
            "plain": plain,
            "sketched": sketched,
            "form": _Form(
                step=step,
                used=used,
                sketch=geometry.sketch(centred) if len(centred) >= geometry.LEAST_TOKENS else None,
                neighbours=geometry.nearest_neighbours(plain, self.neighbours),
            ),
        }


def _of_used(found: Gram) -> Tensor:
    """The matrix of the used tokens alone, on the host."""
    used, matrix = found.used.cpu(), found.matrix.cpu()
    return matrix[used][:, used]


def _geometry(row: Row) -> Row:
    """A row of `representations`."""
    singular = geometry.singular_values(row["centred"])
    form, previous, first = row["form"], row["previous"], row["first"]
    cka_previous, knn_previous = form.drift(previous)
    cka_first, knn_first = form.drift(first)
    return {
        **row["columns"],
        "participation_ratio": geometry.participation_ratio(row["centred"]),
        "effective_rank": geometry.effective_rank(singular),
        "rankme": geometry.effective_rank(geometry.singular_values(row["plain"])),
        "stable_rank": geometry.stable_rank(singular),
        "anisotropy": geometry.anisotropy(row["plain"]),
        "cka_previous": cka_previous,
        "cka_first": cka_first,
        "knn_previous": knn_previous,
        "knn_first": knn_first,
        "neighbours": form.neighbours.shape[1],
        "previous_step": None if previous is None else previous.step,
        "first_step": first.step,
    }


def _sketch(row: Row) -> Row:
    """A row of `sketches`."""
    return {
        **{name: row["columns"][name] for name in ("stack", "layer", "site")},
        "n_tokens": len(row["sketched"]),
        "gram": geometry.sketch(row["sketched"]).numpy(),
    }
