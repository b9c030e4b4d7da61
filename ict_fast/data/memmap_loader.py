"""Batches gathered by one thread from the memory-mapped store: works everywhere, needs nothing."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ict_fast.data.batches import Loader
from ict_fast.data.staging import HostSet, Staging
from ict_fast.data.store import Store


class MemmapLoader(Loader):
    """Gathers batches from the memory-mapped store; one thread prepares the next step.

    Args:
        store, arguments: see Loader.
    Raises:
        InputError: see Loader.
    """

    def __init__(self, store: Store, **arguments: Any) -> None:
        super().__init__(store, **arguments)
        self._images = np.asarray(store.images).reshape(store.num_images, -1)
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "images": ((self._share_size, *store.images.shape[1:]), torch.uint8),
            "labels": ((self._share_size,), torch.int64),
        }
        if self._flip:
            layout["flip"] = ((self._share_size,), torch.uint8)
        self._staging = Staging(self._device, layout)
        on_gpu: dict[str, Any] = {}
        if self._device.type == "cuda":
            # Else what the thread asks of CUDA is done on GPU 0, and takes memory there.
            index = torch.cuda.current_device() if self._device.index is None else self._device.index
            on_gpu = {"initializer": torch.cuda.set_device, "initargs": (index,)}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ict-fast-loader", **on_gpu)
        self._next: tuple[int, Future[HostSet]] | None = None

    def _load(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        ahead, self._next = self._next, None
        if ahead is None or ahead[0] != step:
            ahead = (step, self._thread.submit(self._gather, step))
        gathered = ahead[1].result()
        batch = {
            name: tensor.to(self._device, non_blocking=True) for name, tensor in gathered.tensors.items()
        }
        if gathered.copied is not None:
            gathered.copied.record(torch.cuda.current_stream(self._device))
        self._next = (step + 1, self._thread.submit(self._gather, step + 1))
        return batch["images"], batch["labels"], batch.get("flip")

    def _release(self) -> None:
        self._next = None
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _gather(self, step: int) -> HostSet:
        """Runs in the thread: reads the share of one step into host memory."""
        chosen, lent = self._indices(step), self._staging.lend()
        self._store.require_whole()
        # NumPy and not torch.index_select: 1.0 against 1.2 M images/s of 64x64 on an idle core, but torch's
        # threads wait for each other, and with two of them on two busy cores it falls to 0.03 M.
        # mode="clip" because "raise" gathers into a buffer of its own first.
        images = lent.tensors["images"].numpy().reshape(self._share_size, -1)
        np.take(self._images, chosen, axis=0, out=images, mode="clip")
        np.take(self._store.labels, chosen, out=lent.tensors["labels"].numpy(), mode="clip")
        if self._flip:
            lent.tensors["flip"].copy_(self._flip_bits(step))
        return lent
