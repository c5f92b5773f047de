"""Many small device tensors, one copy to the host.

At the end of a step the tensors of all instruments are laid end to end in one float64 buffer (counts up to 2^53 and
float32 values pass exactly) and copied to pinned memory without waiting. The background thread waits for the copy's
event and takes the tensors apart again. On the CPU the laying end to end is the copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

Array = np.ndarray[Any, np.dtype[np.float64]]


class Packet:
    """Tensors on their way to the host, by (instrument, name)."""

    def __init__(self, tensors: Mapping[tuple[str, str], Tensor]) -> None:
        self._layout = [(key, tuple(t.shape), t.numel()) for key, t in tensors.items()]
        self._opened: dict[tuple[str, str], Array] | None = None
        self._copied: torch.cuda.Event | None = None
        pieces = [t.detach().reshape(-1).to(torch.float64) for t in tensors.values()]
        devices = {p.device for p in pieces if p.device.type != "cpu"}
        if devices:  # a model may be spread over several: bring the small pieces together first
            home = min(devices, key=str)
            pieces = [p.to(home, non_blocking=True) for p in pieces]
        flat = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.float64)
        if flat.is_cuda:
            self._host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            self._host.copy_(flat, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(flat.device))
        else:
            self._host = flat.cpu()

    def open(self) -> dict[tuple[str, str], Array]:
        """The tensors as float64 arrays, on the background thread; a second call gives the same arrays."""
        if self._opened is not None:
            return self._opened
        if self._copied is not None:
            self._copied.synchronize()
        flat = self._host.numpy()
        opened: dict[tuple[str, str], Array] = {}
        start = 0
        for key, shape, count in self._layout:
            opened[key] = flat[start : start + count].reshape(shape)
            start += count
        self._opened = opened
        return opened
