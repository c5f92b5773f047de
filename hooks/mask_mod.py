"""A mask that is a function: what FlexAttention's `BlockMask` holds, evaluated only where it is asked for.

The function takes four indices (sequence, head, query, key), int64 without axes, and says whether that query may see
that key. It may index tensors, so it is vectorised by `vmap` in the way FlexAttention itself does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskMod:
    """A mask over `n_keys` keys.

    Attributes:
        function: True where a query may see a key, of (sequence, head, query, key).
        batch: sequences it differs between; 1 if it is the same for all.
        heads: heads likewise.
        n_keys: number of keys, Sk.
    """

    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    batch: int
    heads: int
    n_keys: int

    def rows(self, positions: Tensor) -> Tensor:
        """Bool `(1 or B, 1 or H, n, Sk)`: what queries `(1 or B, n)` see. O(n Sk) memory."""
        each = len(positions) > 1
        keys = torch.arange(self.n_keys, device=positions.device)
        function = torch.vmap(self.function, in_dims=(None, None, None, 0))
        function = torch.vmap(function, in_dims=(None, None, 0, None))
        return self._over(function, positions if each else positions[0], keys, (0, None, 0 if each else None, None))

    def at(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Bool `(1 or B, 1 or H, n)`: whether queries `(n,)` see their own entry of keys `(n,)`."""
        function = torch.vmap(self.function, in_dims=(None, None, 0, 0))
        return self._over(function, queries, keys, (0, None, None, None))

    def _over(
        self, function: Callable[..., Tensor], queries: Tensor, keys: Tensor, dims: tuple[int | None, ...]
    ) -> Tensor:
        """Over heads and sequences as well."""
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        function = torch.vmap(function, in_dims=(None, 0, None, None))
        function = torch.vmap(function, in_dims=dims)
        batch = len(queries) if dims[2] == 0 else self.batch
        sequence, head = torch.arange(batch, device=keys.device), torch.arange(self.heads, device=keys.device)
        with TransformGetItemToIndex():  # indexing by a vectorised index, as flex does
            return function(sequence, head, queries, keys)
