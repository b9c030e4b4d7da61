"""Batches that NVIDIA DALI carries to the device while the device computes.

DALI holds no state of the run: its checkpoints restart a Python source from 0 without a word, and accept a
changed seed. Here the order is a function of the global step, and a jump starts a new pipeline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ict_fast.data.batches import Loader
from ict_fast.data.store import Store
from ict_fast.errors import InputError

# Steps that DALI prepares ahead of the one in use, and steps of which the device may still read the batch
# while the host runs ahead.
_PREFETCHED = 2
_IN_USE = 3


def dali_problem() -> str | None:
    """Why DALI cannot be used here, or None."""
    try:
        import nvidia.dali  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name in ("nvidia", "nvidia.dali"):
            return "DALI is not installed"
        return f"DALI lacks the package {error.name}"
    except Exception as error:  # a shared library of it, or another version of what it imports
        return f"DALI cannot be imported ({' '.join(str(error).split()) or type(error).__name__})"
    return None


def require_dali() -> None:
    """Raises InputError, with what to do, if DALI cannot be used here."""
    if (problem := dali_problem()) is not None:
        raise InputError(
            f'--data.loader is dali, but {problem}: pip install -c constraints.txt -e ".[dali]" (CUDA 13'
            ' or a CPU; ".[dali-cu12]" for CUDA 12), or choose --data.loader memmap'
        )


def dali_failure(device: torch.device) -> str | None:
    """Why DALI, which can be imported, cannot carry a byte to the device, or None.

    That a driver is too old for DALI's CUDA is noticed by a pipeline, not by an import.
    """
    try:
        _pipeline(lambda info: (np.zeros((1, 1), np.uint8),), 1, device).run()
    except Exception as error:  # RuntimeError, for whatever goes wrong in its libraries
        said = " ".join(str(error).partition("Stacktrace")[0].split()) or type(error).__name__
        return f"DALI fails on {device} ({said})"
    return None


class DaliLoader(Loader):
    """A DALI pipeline over the memory-mapped store, with a queue of prepared steps.

    The images are uint8 NHWC as in the store, in DALI's own memory, which the tensors share. They keep it as
    long as they live. On CUDA, one rule more than other loaders have: what reads a batch must be queued on
    the stream that is current in the next call of `micro_batches`, and before that call, or be waited for
    before the batch is dropped.

    Args:
        store, arguments: see Loader.
    Raises:
        InputError: see Loader; if DALI is not installed, or fails on the device.
    """

    def __init__(self, store: Store, **arguments: Any) -> None:
        super().__init__(store, **arguments)
        require_dali()
        failure = dali_failure(self._device)
        if failure is not None:
            raise InputError(f"--data.loader is dali, but {failure}; choose --data.loader resident or memmap")
        self._images = np.asarray(store.images)
        self._pipeline: Any = None
        self._next_step = -1
        self._failure: Exception | None = None
        self._given: list[torch.Tensor] = []
        self._in_use: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()

    def _load(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        if self._pipeline is None or step != self._next_step:
            self._pipeline, self._failure = self._new_pipeline(step), None
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        if stream is not None:
            self._let_go(stream)
        if self._failure is None:
            try:
                self._pipeline.schedule_run()
            except Exception as error:  # of a step ahead: those before it are delivered first
                self._failure = error
        if self._pipeline.empty():
            failure, self._pipeline = self._failure, None
            assert failure is not None
            raise failure
        outputs = self._pipeline.outputs(cuda_stream=stream)
        self._next_step = step + 1
        tensors = [torch.from_dlpack(output.as_tensor())[0] for output in outputs]
        if stream is not None:
            self._given = tensors
        images, labels, *flip = tensors
        return images, labels, flip[0] if flip else None

    def _release(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._in_use.clear()
        self._given = []
        self._pipeline = None

    def _let_go(self, stream: torch.cuda.Stream) -> None:
        """Drops our hold on the batches that the device has done with.

        DALI reuses a buffer as soon as its last tensor is gone, and neither DALI nor torch, which did not
        allocate it, knows of kernels that have yet to read it.
        """
        if self._given:
            event = torch.cuda.Event()
            event.record(stream)
            self._in_use.append((event, self._given))
            self._given = []
        while self._in_use and (len(self._in_use) > _IN_USE or self._in_use[0][0].query()):
            self._in_use.popleft()[0].synchronize()

    def _new_pipeline(self, first_step: int) -> Any:
        """A pipeline whose first output is that step's share, the next one the next step's."""

        def gather(info: Any) -> tuple[np.ndarray, ...]:
            step = first_step + info.iteration
            chosen = self._indices(step)
            self._store.require_whole()
            batch = [self._images[chosen], self._store.labels[chosen]]
            if self._flip:
                batch.append(self._flip_bits(step).numpy())
            return tuple(array[np.newaxis] for array in batch)

        return _pipeline(gather, 3 if self._flip else 2, self._device)


def _pipeline(gather: Callable[[Any], tuple[np.ndarray, ...]], num_outputs: int, device: torch.device) -> Any:
    """A pipeline to the device of what `gather` returns, arrays of one sample, for each iteration."""
    from nvidia.dali import fn, pipeline_def

    device_id = None
    if device.type == "cuda":
        device_id = torch.cuda.current_device() if device.index is None else device.index

    options: dict[str, Any] = {
        # A step is one sample to DALI: as 256 samples its images, labels and flips take 0.1 ms longer.
        "batch_size": 1,
        "num_threads": 1,
        "device_id": device_id,
        "prefetch_queue_depth": _PREFETCHED,
        # Outputs that own their memory. The older executor overwrites them after the next run.
        "exec_dynamic": True,
    }

    @pipeline_def(**options)
    def pipeline() -> tuple[Any, ...]:
        outputs = fn.external_source(gather, num_outputs=num_outputs, batch=True, batch_info=True)
        return tuple(output if device_id is None else output.gpu() for output in outputs)

    return pipeline()
