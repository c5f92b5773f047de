"""Which attention rows are looked at and what they may see: built once a forward pass, used by all its layers.

Sampled positions, causality, the sliding window and the mask are the same in every layer of a kind, so whatever follows
from them alone (visibility, distances, counts) is computed once and kept, not once a layer.

Geometry of one row: query index i stands at key position a = i + query_offset. Key j is visible iff

    (not causal, or j <= a)  and  (no window, or a - j < window)  and  (no mask, or the mask lets i attend to j)

Left out: packed sequences other than through the mask.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    "nonfinite",
)
"""What is known of a row, or of a head: sums over its rows, but for max_logit, which is the largest."""

MAX_LOGIT = RAW_COLUMNS.index("max_logit")

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
        keep: (1 or B, n) bool, False where a sampled query is padding; None for all.
        n_keys: number of keys, Sk.
        causal: whether keys after the query are hidden.
        query_offset: key position of query index 0.
        window: length of the sliding window; None for none.
        mask: four axes, broadcastable to (B, Hq, Sq, Sk); bool (True may attend) or additive; None for none.
        first_key: (B,) int64, the first key that is not padding; None for 0.
    """

    positions: torch.Tensor
    keep: torch.Tensor | None
    n_keys: int
    causal: bool
    query_offset: int
    window: int | None
    mask: torch.Tensor | None
    first_key: torch.Tensor | None

    @property
    def batch(self) -> int:
        """Batch size this geometry is tied to; 1 if it serves any."""
        parts = (self.positions, self.keep, self.mask, self.first_key)
        return max(len(part) for part in parts if part is not None)

    @cached_property
    def _offsets(self) -> torch.Tensor:
        """(1 or B, n, Sk): a - j, how far key j lies behind the row's query."""
        keys = torch.arange(self.n_keys, device=self.positions.device)
        return (self.positions + self.query_offset)[..., None] - keys

    @cached_property
    def _mask_rows(self) -> torch.Tensor | None:
        """The mask's rows of the sampled queries, (1 or B, 1 or Hq, 1 or n, 1 or Sk)."""
        if self.mask is None or self.mask.shape[2] == 1:
            return self.mask
        return rows_of(self.mask, self.positions)

    @cached_property
    def visible(self) -> torch.Tensor:
        """(1 or B, 1 or Hq, n, Sk) bool: which keys each row may see."""
        offset = self._offsets[:, None]
        visible = torch.ones_like(offset, dtype=torch.bool)
        if self.causal:
            visible &= offset >= 0
        if self.window is not None:
            visible &= offset < self.window
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
    def weights(self) -> torch.Tensor:
        """(1 or B, n, Sk, 5) float32: what a row's probabilities are summed with.

        Last axis: 1, |a - j|, whether |a - j| < `LOCAL_WINDOW`, whether j = a - 1, whether j is the first key.
        """
        offset = self._offsets
        distance = offset.abs()
        keys = torch.arange(self.n_keys, device=offset.device)
        first = (keys == 0)[None, None] if self.first_key is None else keys == self.first_key[:, None, None]
        columns = (torch.ones_like(offset), distance, distance < LOCAL_WINDOW, offset == 1, first)
        shape = (max(len(offset), len(first)), *offset.shape[1:])
        return torch.stack([column.float().expand(shape) for column in columns], dim=-1)

    @cached_property
    def blank(self) -> torch.Tensor:
        """(12,) float32: the statistics of a row that does not count."""
        blank = torch.zeros(len(RAW_COLUMNS), device=self.positions.device)
        blank[MAX_LOGIT] = -torch.inf
        return blank


def row_geometry(
    *,
    positions: torch.Tensor,
    n_keys: int,
    causal: bool,
    query_offset: int = 0,
    window: int | None = None,
    keep: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    first_key: torch.Tensor | None = None,
) -> RowGeometry:
    """The geometry of sampled rows.

    Args:
        positions: (n,) or (B, n) int64, indices of the sampled queries, each below Sq.
        n_keys: number of keys, Sk.
        causal: whether key j is hidden from query i unless j <= i + query_offset.
        query_offset: key position of query index 0 (the number of cached keys, when decoding).
        window: keys with i + query_offset - j >= window are hidden (transformers' sliding window); None for none.
        keep: (n,) or (B, n) bool, False leaves a sampled row out; None keeps all.
        mask: broadcastable to (B, Hq, Sq, Sk). Bool: True may attend. Floating: added to the logits, except that
            entries at or below half the dtype's minimum (and -inf) hide the key. None for none.
        first_key: (B,) int64, index of the first key that is not padding, for `sink_mass`; None for 0.

    Raises:
        ValueError: a shape or dtype is not as above.
    """
    if positions.ndim not in {1, 2} or positions.dtype != torch.int64:
        raise ValueError(
            f"row_geometry: expected positions (n,) or (B, n), int64; got {tuple(positions.shape)}, {positions.dtype}"
        )
    if keep is not None and (
        keep.dtype != torch.bool or keep.ndim not in {1, 2} or keep.shape[-1] != positions.shape[-1]
    ):
        raise ValueError(f"row_geometry: expected keep like positions, bool; got {tuple(keep.shape)}, {keep.dtype}")
    if mask is not None:
        if not (mask.dtype == torch.bool or mask.is_floating_point()) or mask.ndim > 4:
            raise ValueError(
                "row_geometry: expected a bool or floating mask broadcastable to (B, Hq, Sq, Sk); "
                f"got {tuple(mask.shape)}, {mask.dtype}"
            )
        mask = four_axes(mask)
        if mask.shape[-1] not in {1, n_keys}:
            raise ValueError(f"row_geometry: expected a mask over {n_keys} keys; got one over {mask.shape[-1]}")
    if first_key is not None and first_key.ndim != 1:
        raise ValueError(f"row_geometry: expected first_key of shape (B,); got {tuple(first_key.shape)}")
    return RowGeometry(
        positions=positions if positions.ndim == 2 else positions[None],
        keep=keep if keep is None or keep.ndim == 2 else keep[None],
        n_keys=n_keys,
        causal=causal,
        query_offset=query_offset,
        window=window,
        mask=mask,
        first_key=first_key,
    )


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
