"""One process's batches, and what every loader of them has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch

from ict_fast.data.order import batch_indices, micro_batch_size, rank_slice
from ict_fast.data.store import Store
from ict_kernels.philox import flip_bits

# Flip bits are drawn for so many samples at once. 256 take 0.25 ms, as long as gathering their images, and
# 4,096 take 0.32 ms; 8,192 would call for a compiler, which a loader's thread has no time for.
_FLIPS_AT_ONCE = 4096


class Batch(NamedTuple):
    """One micro-batch of one process."""

    images: torch.Tensor
    """uint8 (n, H, W, C) on the device, not flipped: the noising kernel does that."""
    labels: torch.Tensor
    """int64 (n,) on the device."""
    flip: torch.Tensor | None
    """uint8 (n,) on the device, 1 = flip horizontally; None if the run does not flip."""
    offset: int
    """Index of the first image within the global batch."""


class Loader(ABC):
    """Batches on the device, addressed by the global step.

    A loader keeps nothing that a checkpoint must know: any loader continues any run at any step, and all give
    the same images, labels and flips. They differ in how these reach the device.

    Args:
        store: the images.
        batch_size: global batch, over all processes.
        seed: the run's seed; order and flips derive from it.
        flip: draw a flip bit for each sample.
        device: where batches go.
        rank, world_size: this process among all.
        micro_batch: images per Batch; None or 0, or more than this process's share, means the whole share.
    Raises:
        InputError: if the batch cannot be shared equally, or the share not be cut into micro-batches.
    """

    def __init__(
        self,
        store: Store,
        *,
        batch_size: int,
        seed: int,
        flip: bool,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int | None = None,
    ) -> None:
        self._share = rank_slice(batch_size, rank, world_size)
        self._share_size = self._share.stop - self._share.start
        self._micro_batch = micro_batch_size(batch_size, world_size, micro_batch)
        self._store, self._device = store, device
        self._seed, self._batch_size, self._flip = seed, batch_size, flip
        self._steps_per_draw = max(1, _FLIPS_AT_ONCE // self._share_size)
        self._drawn: tuple[int, torch.Tensor] | None = None
        self._closed = False

    def micro_batches(self, step: int) -> list[Batch]:
        """This process's share of global batch `step`, in order; starts to prepare the next step.

        The tensors belong to the caller. On CUDA they are ready in the order of the current stream.

        Raises:
            RuntimeError: after `close`. What went wrong while preparing this step surfaces here as well.
        """
        if self._closed:
            raise RuntimeError("the loader is closed")
        images, labels, flip = self._load(step)
        starts = range(0, self._share_size, self._micro_batch)
        parts = [slice(start, start + self._micro_batch) for start in starts]
        return [
            Batch(
                images[part],
                labels[part],
                None if flip is None else flip[part],
                self._share.start + part.start,
            )
            for part in parts
        ]

    def close(self) -> None:
        """Ends what works in the background and frees its memory. May be called again."""
        self._closed = True
        self._release()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @abstractmethod
    def _load(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Images, labels and flip bits of the share of one step, on the device."""

    @abstractmethod
    def _release(self) -> None:
        """Ends threads and drops memory; called once or more."""

    def _indices(self, step: int) -> np.ndarray:
        """int64 (share,): the images of one step, as places in the store."""
        return batch_indices(self._store.num_images, self._seed, step, self._batch_size)[0][self._share]

    def _flip_bits(self, step: int) -> torch.Tensor:
        """uint8 (share,) on the CPU: the flip bits of one step. Part of a cache: read it only."""
        draw, place = divmod(step, self._steps_per_draw)
        if self._drawn is None or self._drawn[0] != draw:
            steps = torch.arange(draw * self._steps_per_draw, (draw + 1) * self._steps_per_draw)
            numbers = steps[:, None] * self._batch_size + torch.arange(self._share.start, self._share.stop)
            parts = [flip_bits(self._seed, part) for part in numbers.flatten().split(_FLIPS_AT_ONCE)]
            self._drawn = draw, torch.cat(parts).view(numbers.shape)
        return self._drawn[1][place]
