"""Batches on the device, addressed by the global step.

A loader keeps nothing that a checkpoint must know: any loader continues any run at any step.
"""

from __future__ import annotations

import itertools
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from ict_fast.config import Config
from ict_fast.data.order import batch_indices, rank_slice
from ict_fast.data.store import Store
from ict_fast.errors import InputError
from ict_kernels.philox import flip_bits

# Pinned buffers on CUDA. With three, the gather of step k + 1 waits for the copy of step k - 2, so the host
# runs up to two steps ahead of the device before anything blocks.
_NUM_PINNED = 3


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


class _Buffer:
    """Host memory for one process's share of a global batch; pinned for CUDA."""

    def __init__(self, shape: tuple[int, ...], flip: bool, pinned: bool) -> None:
        self.images = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        self.labels = torch.empty(shape[0], dtype=torch.int64, pin_memory=pinned)
        self.flip = torch.empty(shape[0], dtype=torch.uint8, pin_memory=pinned) if flip else None
        self.copied = torch.cuda.Event() if pinned else None


class MemmapLoader:
    """Gathers batches from the memory-mapped store; one thread prepares the next step.

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
        self._micro_batch = min(micro_batch or self._share_size, self._share_size)
        if self._share_size % self._micro_batch:
            raise InputError(
                f"--training.micro-batch is {self._micro_batch}; it must divide the {self._share_size} images"
                f" that each of {world_size} processes has of a batch of {batch_size}"
            )
        self._num_images, self._image_shape = store.num_images, store.images.shape[1:]
        self._seed, self._batch_size, self._flip, self._device = seed, batch_size, flip, device
        with warnings.catch_warnings():
            # torch warns that the memory map is read-only. Nothing writes to it: it is only gathered from.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self._images = torch.from_numpy(store.images.reshape(store.num_images, -1))
        self._labels = torch.from_numpy(store.labels)
        self._pinned = itertools.cycle(
            [self._new_buffer(pinned=True) for _ in range(_NUM_PINNED)] if device.type == "cuda" else []
        )
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ict-fast-loader")
        self._next: tuple[int, Future[_Buffer]] | None = None

    def micro_batches(self, step: int) -> list[Batch]:
        """This process's share of global batch `step`, in order; starts to prepare the next step.

        The tensors belong to the caller. On CUDA they are ready in the order of the current stream.

        Raises:
            RuntimeError: after `close`. What went wrong while preparing this step surfaces here as well.
        """
        ahead, self._next = self._next, None
        if ahead is None or ahead[0] != step:
            ahead = (step, self._thread.submit(self._gather, step))
        buffer = ahead[1].result()
        images, labels, flip = self._deliver(buffer)
        self._next = (step + 1, self._thread.submit(self._gather, step + 1))
        return [
            Batch(
                images[part],
                labels[part],
                None if flip is None else flip[part],
                self._share.start + part.start,
            )
            for part in (
                slice(start, start + self._micro_batch)
                for start in range(0, self._share_size, self._micro_batch)
            )
        ]

    def close(self) -> None:
        """Waits for the thread and ends it. May be called again."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> MemmapLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _new_buffer(self, pinned: bool) -> _Buffer:
        return _Buffer((self._share_size, *self._image_shape), self._flip, pinned)

    def _gather(self, step: int) -> _Buffer:
        """Runs in the thread: reads the share of one step into host memory."""
        indices, sample_numbers = batch_indices(self._num_images, self._seed, step, self._batch_size)
        chosen = torch.from_numpy(indices[self._share])
        buffer = next(self._pinned, None) or self._new_buffer(pinned=False)
        if buffer.copied is not None:
            buffer.copied.synchronize()  # the device may still be reading what it held
        torch.index_select(self._images, 0, chosen, out=buffer.images.view(self._share_size, -1))
        torch.index_select(self._labels, 0, chosen, out=buffer.labels)
        if buffer.flip is not None:
            buffer.flip.copy_(flip_bits(self._seed, torch.from_numpy(sample_numbers[self._share])))
        return buffer

    def _deliver(self, buffer: _Buffer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The buffer's tensors on the device, copied on the current stream without waiting."""
        if buffer.copied is None and self._device.type == "cpu":
            return buffer.images, buffer.labels, buffer.flip
        images = buffer.images.to(self._device, non_blocking=True)
        labels = buffer.labels.to(self._device, non_blocking=True)
        flip = None if buffer.flip is None else buffer.flip.to(self._device, non_blocking=True)
        if buffer.copied is not None:
            buffer.copied.record(torch.cuda.current_stream(self._device))
        return images, labels, flip


def make_loader(
    config: Config, store: Store, device: torch.device, *, rank: int = 0, world_size: int = 1
) -> tuple[MemmapLoader, str]:
    """The loader that `--data.loader` names.

    Args:
        config: its data section, batch, micro-batch and seed.
        store: the images.
        device: where batches go.
        rank, world_size: this process among all.
    Returns:
        The loader, and a line that says which it is and why.
    Raises:
        InputError: as MemmapLoader.
    """
    loader = MemmapLoader(
        store,
        batch_size=config.training.batch_size,
        seed=config.training.seed,
        flip=config.data.flip,
        device=device,
        rank=rank,
        world_size=world_size,
        micro_batch=config.training.micro_batch,
    )
    why = "as asked" if config.data.loader == "memmap" else "the only one in this version"
    return loader, f"memmap loader ({why}), {store.num_images:,} images from {store.path}"
