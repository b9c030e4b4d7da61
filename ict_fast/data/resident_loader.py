"""Batches gathered on the device, which holds the whole store: the host sends indices only."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ict_fast.data.batches import Loader
from ict_fast.data.staging import Staging
from ict_fast.data.store import Store
from ict_fast.errors import InputError
from ict_fast.hardware import available_memory

_BLOCK_BYTES = 1 << 26  # read and sent at a time


def resident_bytes(store: Store) -> int:
    """Device memory that the images and labels of a store take, in bytes."""
    return store.images.nbytes + store.labels.nbytes


def free_bytes(device: torch.device) -> int:
    """Memory of a device that is free now, in bytes; for a CPU what the system can give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = available_memory()
    assert available is not None, "/proc/meminfo has had MemAvailable since Linux 3.14"
    return available


class ResidentLoader(Loader):
    """Copies the store to the device once, then gathers every batch there by index.

    A step reads the indices from one static tensor, so that its gather can be part of a captured CUDA graph.

    Args:
        store, arguments: see Loader.
    Raises:
        InputError: see Loader; if the store does not fit into the device's free memory.
    """

    def __init__(self, store: Store, **arguments: Any) -> None:
        super().__init__(store, **arguments)
        needed, free = resident_bytes(store), free_bytes(self._device)
        if needed > free:
            raise InputError(
                f"--data.loader is resident, which needs {needed:,} bytes of memory on {self._device} for"
                f" {store.path}; {free:,} bytes are free; choose --data.loader memmap"
            )
        self._images = torch.empty(
            (store.num_images, store.images[0].size), dtype=torch.uint8, device=self._device
        )
        rows = max(1, _BLOCK_BYTES // self._images.shape[1])
        for start in range(0, store.num_images, rows):
            store.require_whole()
            block = np.array(store.images[start : start + rows])  # a copy: torch warns of a read-only map
            self._images[start : start + rows] = torch.from_numpy(block).flatten(1)
        self._labels = torch.from_numpy(store.labels).to(self._device)
        self._chosen = torch.empty(self._share_size, dtype=torch.int64, device=self._device)
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "chosen": ((self._share_size,), torch.int64),
            "flip": ((self._share_size,), torch.uint8),
        }
        self._staging = Staging(self._device, layout)

    def _load(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        lent = self._staging.lend()
        lent.tensors["chosen"].copy_(torch.from_numpy(self._indices(step)))
        self._chosen.copy_(lent.tensors["chosen"], non_blocking=True)
        flip = None
        if self._flip:
            flip = lent.tensors["flip"].copy_(self._flip_bits(step)).to(self._device, non_blocking=True)
        if lent.copied is not None:
            lent.copied.record(torch.cuda.current_stream(self._device))
        images = torch.index_select(self._images, 0, self._chosen)
        return (
            images.view(-1, *self._store.images.shape[1:]),
            torch.index_select(self._labels, 0, self._chosen),
            flip,
        )

    def _release(self) -> None:
        self._images = self._labels = torch.empty(0)
