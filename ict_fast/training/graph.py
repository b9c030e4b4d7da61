"""The step as CUDA graphs: `--training.cuda-graph`, an option to measure.

A step of a small network is a thousand launches of a few microseconds each, which the host may not keep up
with. Captured once, the device runs them without it. What differs from step to step is in device tensors
already (`TrainStep.begin`) or copied into the tensors that the graphs read (the images); the rest of a step
is the same operations with the same numbers, which tests/training/test_graph.py holds it to. There are two
graphs, for what is before and after the processes of a run communicate, which is not captured. On an H200 the
results are those without (tests/gpu/test_graph.py); no run has timed it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ict_fast.errors import InputError
from ict_fast.training.loss_window import FIGURES
from ict_fast.training.step import TrainStep

if TYPE_CHECKING:
    from ict_fast.data.loaders import Batch

# Blocks compile, cuDNN tries its algorithms, tables and optimizer state are made, and the allocator grows: in
# the first steps, which are the run's own and merely not captured.
_WARM_UP_STEPS = 3


class CapturedStep:
    """Calls a TrainStep, and from the fourth step on replays what it did.

    Captured anew, after as many steps as at first, when the trunk's arithmetic changes, the micro-batches
    have other shapes or places in the global batch, or the graphs were released.

    Attributes:
        captures: how often a step has been captured so far.
    """

    def __init__(self, step: TrainStep) -> None:
        self.captures = 0
        self._step = step
        self._plan: tuple[Any, ...] | None = None
        self._uncaptured = 0
        self._inputs: list[Batch] = []
        self._figures = torch.zeros(FIGURES, device=step.device)
        self._replays: tuple[Callable[[], None], Callable[[], None]] | None = None

    def __call__(self, number: int, micro_batches: Sequence[Batch]) -> None:
        """Trains on global batch `number`, to the same bits as the TrainStep itself."""
        plan = (self._step.autocast_dtype, *map(_form, micro_batches))
        if plan != self._plan:
            self.release()  # the old graphs' memory goes before the new ones' is taken
            self._plan = plan
            self._inputs = [_empty_like(batch) for batch in micro_batches]
        self._step.begin(number)
        for held, batch in zip(self._inputs, micro_batches, strict=True):
            _copy(held, batch)
        if self._uncaptured < _WARM_UP_STEPS:
            self._uncaptured += 1
            run_aside(lambda: self._step.advance(self._inputs))
            return
        if self._replays is None:
            compute = capture(lambda: self._figures.copy_(self._step.compute(self._inputs)))
            self._replays = compute, capture(self._step.update)
            self.captures += 1
        compute, update = self._replays
        compute()
        self._step.losses.add(self._figures.clone())  # which may keep them for many steps
        self._step.reduction.finish()
        update()

    def release(self) -> None:
        """Gives back the graphs' memory, which is that of a whole step, for work between steps."""
        self._replays, self._uncaptured = None, 0
        self._step.reduction.clear()  # of one process, they lie in it


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all that is captured, or runs before: torch's allocator keeps memory for each stream apart."""
    return torch.cuda.Stream(device)


def run_aside(work: Callable[[], object]) -> None:
    """Runs on the stream that captures, as work that is to be captured has to before."""
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)


def capture(work: Callable[[], object]) -> Callable[[], None]:
    """Records what `work` launches, without running it; returns what runs it."""
    graph, stream = torch.cuda.CUDAGraph(), _side_stream(torch.cuda.current_device())
    # Other threads, such as the one that writes checkpoints, may go on with what a capture forbids.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph.replay


def require_capturable(device: torch.device, loader: str) -> None:
    """Checks what a captured step needs of a run.

    Args:
        device: where it trains.
        loader: the value of --data.loader.
    Raises:
        InputError: naming the option that rules it out.
    """
    if device.type != "cuda":
        raise InputError("--training.cuda-graph needs an NVIDIA GPU, and this run trains on a CPU")
    if loader != "resident":
        raise InputError(
            f"--training.cuda-graph needs the images in the GPU's memory, and --data.loader is {loader}; add"
            " --data.loader resident"
        )


def _form(batch: Batch) -> tuple[Any, ...]:
    """What the recorded launches depend on."""
    tensors = (batch.images, batch.labels, batch.flip)
    return (batch.offset, *(None if t is None else (tuple(t.shape), t.dtype) for t in tensors))


def _empty_like(batch: Batch) -> Batch:
    flip = None if batch.flip is None else torch.empty_like(batch.flip)
    return batch._replace(
        images=torch.empty_like(batch.images), labels=torch.empty_like(batch.labels), flip=flip
    )


def _copy(held: Batch, batch: Batch) -> None:
    pairs: list[tuple[Tensor | None, Tensor | None]] = [
        (held.images, batch.images),
        (held.labels, batch.labels),
        (held.flip, batch.flip),
    ]
    for to, source in pairs:
        if to is not None and source is not None:
            to.copy_(source)
