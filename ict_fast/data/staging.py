"""Host memory that is filled while the device still reads what was filled before."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

# With three sets, filling the one of step k + 1 waits for the copy of step k - 2: the host runs up to two
# steps ahead of the device before anything blocks.
_NUM_SETS = 3


class HostSet(NamedTuple):
    """Tensors in host memory, and the mark that they have been read."""

    tensors: dict[str, torch.Tensor]
    copied: torch.cuda.Event | None
    """To be recorded after the copies to the device were queued; None for a CPU."""


class Staging:
    """Sets of host tensors: for CUDA pinned and lent in turn, for a CPU new each time.

    Args:
        device: where the tensors go.
        layout: shape and dtype of each tensor of a set, by name.
    """

    def __init__(self, device: torch.device, layout: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self._layout, self._pinned = layout, device.type == "cuda"
        self._turns = itertools.cycle([self._new_set() for _ in range(_NUM_SETS)] if self._pinned else [])

    def lend(self) -> HostSet:
        """A set to fill. Waits until the device has read what it held."""
        lent = next(self._turns, None) or self._new_set()
        if lent.copied is not None:
            lent.copied.synchronize()
        return lent

    def _new_set(self) -> HostSet:
        tensors = {
            name: torch.empty(shape, dtype=dtype, pin_memory=self._pinned)
            for name, (shape, dtype) in self._layout.items()
        }
        return HostSet(tensors, torch.cuda.Event() if self._pinned else None)
