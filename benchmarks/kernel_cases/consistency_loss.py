"""The loss and its gradient: the launches at each size of image."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ict_kernels.consistency_loss import launch_loss, launch_loss_backward
from ict_kernels.triton_support import record_launches

from . import Case

# CIFAR-10, ImageNet-64, digits, two that are split, and one whose size no vector width divides.
_SHAPES = (
    (512, 3, 32, 32),
    (128, 3, 64, 64),
    (64, 1, 8, 8),
    (8, 1, 128, 128),
    (8, 3, 256, 256),
    (6, 3, 5, 7),
)
_SCALARS = (0.5, 0.002, 0.03)


def _cases(shape: tuple[int, ...], dtype: torch.dtype, metric: str, preconditioned: bool) -> Iterator[Case]:
    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    count, elements = shape[0], shape[1] * shape[2] * shape[3]
    tensors = [empty(*shape, dtype=dtype), empty(*shape, dtype=dtype)]
    tensors += [empty(*shape), empty(*shape), empty(count), empty(count)] if preconditioned else [None] * 4
    tensors.append(empty(count))
    with record_launches() as forward:
        *_, difference = launch_loss(*tensors, *_SCALARS, metric, True)
    levels, weight = tensors[4], tensors[6]
    with record_launches() as backward:
        launch_loss_backward(
            empty(count), tensors[0], difference, levels, weight, empty(count), *_SCALARS, metric
        )
    op = "consistency_loss" if preconditioned else "pseudo_huber_loss"
    words = f"{count} x {elements}, {str(dtype).removeprefix('torch.')}, {metric}"
    moved = 2 * dtype.itemsize + 8 * preconditioned + 4, 4 + dtype.itemsize  # with the difference
    algorithm = "one pass" if len(forward) == 1 else "split"
    yield Case(f"{op} forward", words, algorithm, forward, moved[0], moved[0])
    yield Case(f"{op} backward", words, "one pass", backward, moved[1], moved[1])


def cases(full: bool) -> Iterator[Case]:
    """CIFAR-10's loss in bf16; with `full` every size, dtype and metric."""
    if not full:
        yield from _cases(_SHAPES[0], torch.bfloat16, "pseudo-huber", True)
        return
    for shape in _SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield from _cases(shape, dtype, "pseudo-huber", True)
            yield from _cases(shape, dtype, "pseudo-huber", False)
    for metric in ("l2", "l1"):
        yield from _cases(_SHAPES[1], torch.float32, metric, True)
    yield from _cases(_SHAPES[1], torch.float32, "elementwise pseudo-huber", False)
