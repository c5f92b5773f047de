"""Which attention rows are looked at and what they may see: built once a forward pass, used by all its layers.

Sampled positions, causality, the sliding window and the mask are the same in every layer of a kind, so whatever follows
from them alone (visibility, distances, counts) is computed once and kept, not once a layer.

Geometry of one row: the token of query index i has the key a, which is i + query_offset or told by `own_keys`. Key j is
visible iff

    (not causal, or j <= a)  and  (no window, or a - j < window)  and  (no segments, or j and a are of one segment)
    and  (no mask, or the mask lets i attend to j)

Segments are the sequences packed into one row: runs of keys with the same number. The first key of a query, which
`sink_mass` is about, is then that of its own segment.

What is derived is O(n Sk) for n rows. Whoever takes many rows works through `part`s of a geometry, which keep nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

RAW_COLUMNS = (
    "n_queries",
    "entropy",
    "normalized_entropy",
    "lse",
    "max_logit",
    "top1_mass",
    "effective_keys",
    "sink_mass",
    "prev_token_mass",
    "local_mass",
    "mean_distance",
    "n_induction",
    "induction_score",
    "nonfinite",
)
"""What is known of a row, or of a head: sums over its rows, but for max_logit, which is the largest."""

MAX_LOGIT = RAW_COLUMNS.index("max_logit")

Mask = torch.Tensor | Callable[[torch.Tensor], torch.Tensor | None]
"""A mask broadcastable to (B, Hq, Sq, Sk), or what gives its rows (1 or B, 1 or Hq, 1 or n, 1 or Sk) at queries
(1 or B, n), so that a mask which is a function need not be written out. Bool (True may attend) or additive."""

KEY_BLOCK = 32
"""Keys the kernel takes at a time. With 64, masks and biases spill registers on Hopper."""

LOCAL_WINDOW = 16
"""Keys fewer than this many positions away count as local."""

HIDDEN = -1e30
"""Added to the logit of a key that may not be seen. Finite, since 0 * -inf is NaN; absorbs any sane logit."""


@dataclass(frozen=True, kw_only=True, eq=False)  # not slotted: what is derived is kept in the instance once it is made
class RowGeometry:
    """Sampled rows and their visibility; made by `row_geometry`, which validates.

    Attributes:
        positions: (1 or B, n) int64, indices of the sampled queries.
        own: (1 or B, n) int64, the key of each sampled query's own token.
        keep: (1 or B, n) bool, False where a sampled query is padding; None for all.
        n_keys: number of keys, Sk.
        causal: whether keys after the query's own are hidden.
        window: length of the sliding window; None for none.
        mask: of four axes, or a function that gives rows; None for none.
        segments: (1 or B, Sk), the packed sequence of each key; None where a row holds one.
        row_segments: (1 or B, n), that of each sampled query; None likewise.
        first: (1 or B, n) int64, the first key of each sampled query's sequence; None for 0.
    """

    positions: torch.Tensor
    own: torch.Tensor
    keep: torch.Tensor | None
    n_keys: int
    causal: bool
    window: int | None
    mask: Mask | None
    segments: torch.Tensor | None
    row_segments: torch.Tensor | None
    first: torch.Tensor | None

    @property
    def batch(self) -> int:
        """Batch size this geometry is tied to; 1 if it serves any."""
        parts = (self.positions, self.own, self.keep, self.mask, self.segments, self.first)
        return max(len(part) for part in parts if isinstance(part, torch.Tensor))

    def part(self, rows: slice) -> RowGeometry:
        """The geometry of some of the sampled rows."""

        def of(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[:, rows]

        return replace(
            self,
            positions=self.positions[:, rows],
            own=self.own[:, rows],
            keep=of(self.keep),
            row_segments=of(self.row_segments),
            first=of(self.first),
        )

    @cached_property
    def _offsets(self) -> torch.Tensor:
        """(1 or B, n, Sk): a - j, how far key j lies behind the row's query."""
        keys = torch.arange(self.n_keys, device=self.own.device)
        return self.own[..., None] - keys

    @cached_property
    def _mask_rows(self) -> torch.Tensor | None:
        """The mask's rows of the sampled queries, (1 or B, 1 or Hq, 1 or n, 1 or Sk)."""
        if isinstance(self.mask, torch.Tensor):
            return self.mask if self.mask.shape[2] == 1 else rows_of(self.mask, self.positions)
        return None if self.mask is None else self.mask(self.positions)

    @cached_property
    def visible(self) -> torch.Tensor:
        """(1 or B, 1 or Hq, n, Sk) bool: which keys each row may see."""
        offset = self._offsets[:, None]
        visible = torch.ones_like(offset, dtype=torch.bool)
        if self.causal:
            visible &= offset >= 0
        if self.window is not None:
            visible &= offset < self.window
        if self.segments is not None and self.row_segments is not None:
            visible = visible & (self.row_segments[..., None] == self.segments[:, None])[:, None]
        if self._mask_rows is not None:
            allowed = self._mask_rows
            visible = visible & (allowed if allowed.dtype == torch.bool else allowed > hiding_bound(allowed.dtype))
        return visible

    @cached_property
    def n_visible(self) -> torch.Tensor:
        """(1 or B, 1 or Hq, n) float32: how many keys each row may see."""
        return self.visible.sum(-1, dtype=torch.float32)

    @cached_property
    def counted(self) -> torch.Tensor:
        """(1 or B, 1 or Hq, n) bool: rows that are kept and see at least one key."""
        counted = self.n_visible > 0
        return counted if self.keep is None else counted & self.keep[:, None]

    @cached_property
    def added(self) -> torch.Tensor:
        """(1 or B, 1 or Hq, n, Sk) float32, to be added to the logits: the additive mask, `HIDDEN` at hidden keys."""
        rows = self._mask_rows
        value = 0.0 if rows is None or rows.dtype == torch.bool else rows.float()
        return torch.where(self.visible, value, HIDDEN)

    @cached_property
    def padded_mask(self) -> torch.Tensor:
        """`added` in rows that begin at aligned addresses, for the kernel."""
        return aligned(self.added)

    @cached_property
    def log_visible(self) -> torch.Tensor:
        """(1 or B, 1 or Hq, n) float32: largest entropy of each row; inf where one key is seen: 0 / inf is 0."""
        return torch.where(self.n_visible > 1, self.n_visible.log(), torch.inf)

    @cached_property
    def log_visible_and_slot(self) -> torch.Tensor:
        """(1 or B, 1 or Hq, n) float32: the same with an attention-sink slot beside the keys."""
        return (self.n_visible + 1).log().clamp_(min=0.5)  # rows that see no key do not count, and must not divide by 0

    @cached_property
    def weights(self) -> torch.Tensor:
        """(1 or B, n, 5, Sk) float32: what a row's probabilities are summed with.

        Third axis: 1, |a - j|, whether |a - j| < `LOCAL_WINDOW`, whether j = a - 1, whether j is the first key.
        """
        offset = self._offsets
        distance = offset.abs()
        keys = torch.arange(self.n_keys, device=offset.device)
        first = (keys == 0)[None, None] if self.first is None else keys == self.first[..., None]
        columns = (torch.ones_like(offset), distance, distance < LOCAL_WINDOW, offset == 1, first)
        shape = (max(len(offset), len(first)), *offset.shape[1:])
        return torch.stack([column.float().expand(shape) for column in columns], dim=2)

    @cached_property
    def blank(self) -> torch.Tensor:
        """(14,) float32: the statistics of a row that does not count."""
        blank = torch.zeros(len(RAW_COLUMNS), device=self.positions.device)
        blank[MAX_LOGIT] = -torch.inf
        return blank


def row_geometry(
    *,
    positions: torch.Tensor,
    n_keys: int,
    causal: bool,
    query_offset: int = 0,
    own_keys: torch.Tensor | None = None,
    window: int | None = None,
    keep: torch.Tensor | None = None,
    mask: Mask | None = None,
    segments: torch.Tensor | None = None,
    first_key: torch.Tensor | None = None,
) -> RowGeometry:
    """The geometry of sampled rows.

    Args:
        positions: (n,) or (B, n) int64, indices of the sampled queries, each below Sq.
        n_keys: number of keys, Sk.
        causal: whether key j is hidden from query i unless j <= a, the key of the query's own token.
        query_offset: a - i (the number of cached keys, when decoding), where `own_keys` is None.
        own_keys: (1 or B, Sq) int64, a of every query, where it is not its index plus an offset (static caches).
        window: keys with a - j >= window are hidden (transformers' sliding window); None for none.
        keep: (n,) or (B, n) bool, False leaves a sampled row out; None keeps all.
        mask: broadcastable to (B, Hq, Sq, Sk), or a function that gives its rows (see `Mask`). Bool: True may attend.
            Floating: added to the logits, except that entries at or below half the dtype's minimum (and -inf) hide the
            key. None for none.
        segments: (1 or B, Sk) integers, equal within each of the sequences that are packed one after the other into a
            row; keys of other sequences than a's are hidden. None where a row holds one sequence.
        first_key: (1 or B,) int64, index of the first key that is not padding, for `sink_mass`; negative where it is
            not among the keys any more; None for 0. Segments, which begin with their first key, go before.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    _check(positions, n_keys, own_keys, keep, mask, segments, first_key)
    positions = positions if positions.ndim == 2 else positions[None]
    if own_keys is None:
        own = positions + query_offset
    else:
        batch = max(len(positions), len(own_keys))
        own = own_keys.expand(batch, -1).gather(1, positions.expand(batch, -1))
    first = None if first_key is None else first_key[:, None].expand(-1, positions.shape[1])
    row_segments = None
    if segments is not None:
        batch = max(len(own), len(segments))
        index = own.expand(batch, -1)
        row_segments = segments.expand(batch, -1).gather(1, index)
        first = _beginnings(segments).expand(batch, -1).gather(1, index)
    return RowGeometry(
        positions=positions,
        own=own,
        keep=keep if keep is None or keep.ndim == 2 else keep[None],
        n_keys=n_keys,
        causal=causal,
        window=window,
        mask=four_axes(mask) if isinstance(mask, torch.Tensor) else mask,
        segments=segments,
        row_segments=row_segments,
        first=first,
    )


def _check(  # noqa: PLR0917  -- in the order of `row_geometry`, which alone calls it
    positions: torch.Tensor,
    n_keys: int,
    own_keys: torch.Tensor | None,
    keep: torch.Tensor | None,
    mask: Mask | None,
    segments: torch.Tensor | None,
    first_key: torch.Tensor | None,
) -> None:
    def expect(holds: bool, expected: str, got: torch.Tensor) -> None:
        if not holds:
            raise ValueError(f"row_geometry: expected {expected}; got {tuple(got.shape)}, {got.dtype}")

    n = positions.shape[-1]
    expect(positions.ndim in {1, 2} and positions.dtype == torch.int64, "positions (n,) or (B, n), int64", positions)
    if own_keys is not None:
        expect(own_keys.ndim == 2 and own_keys.dtype == torch.int64, "own_keys (1 or B, Sq), int64", own_keys)
    if keep is not None:
        expect(
            keep.dtype == torch.bool and keep.ndim in {1, 2} and keep.shape[-1] == n, "keep like positions, bool", keep
        )
    if isinstance(mask, torch.Tensor):
        known = (mask.dtype == torch.bool or mask.is_floating_point()) and mask.ndim <= 4
        expect(known, "a bool or floating mask broadcastable to (B, Hq, Sq, Sk)", mask)
        expect(four_axes(mask).shape[-1] in {1, n_keys}, f"a mask over {n_keys} keys", mask)
    if segments is not None:
        known = segments.ndim == 2 and segments.shape[1] == n_keys and not segments.is_floating_point()
        expect(known, f"segments (1 or B, {n_keys}) of integers", segments)
    if first_key is not None:
        expect(first_key.ndim == 1, "first_key (1 or B,)", first_key)


def _beginnings(segments: torch.Tensor) -> torch.Tensor:
    """(1 or B, Sk) int64: where the segment of each key begins."""
    keys = torch.arange(segments.shape[1], device=segments.device)
    begins = torch.nn.functional.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return torch.where(begins, keys, 0).cummax(1).values


def rows_of(tensor: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows `positions` (1 or B, n) of a tensor (1 or B, H, Sq, X): (1 or B, H, n, X)."""
    if len(positions) == 1:
        return tensor.index_select(2, positions[0])
    batch, heads, _, last = (len(positions), *tensor.shape[1:])
    index = positions[:, None, :, None].expand(batch, heads, -1, last)
    return tensor.expand(batch, -1, -1, -1).gather(2, index)


def aligned(rows: torch.Tensor) -> torch.Tensor:
    """`rows` (..., X) in float32, X padded to whole blocks: the kernel reads them unguarded, four entries at a time."""
    return torch.nn.functional.pad(rows.float(), (0, -rows.shape[-1] % KEY_BLOCK))


def four_axes(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with axes of length one put in front, up to four."""
    return tensor.reshape((1,) * (4 - tensor.ndim) + tuple(tensor.shape))


def hiding_bound(dtype: torch.dtype) -> float:
    """Entries of an additive mask at or below this hide their key: half the most negative number of its dtype."""
    return torch.finfo(dtype).min / 2
