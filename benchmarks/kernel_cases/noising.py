"""Noising: one launch from images to both network inputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ict_kernels.noising import launch_noise
from ict_kernels.triton_support import record_launches

from . import Case


def _case(shape_nhwc: tuple[int, int, int, int], dtype: torch.dtype, flips: bool) -> Case:
    count, height, width, channels = shape_nhwc
    shape = shape_nhwc if dtype == torch.uint8 else (count, channels, height, width)
    images = torch.empty(shape, dtype=dtype, device="meta")
    sigma = torch.empty(count, device="meta")
    flip = torch.empty(count, dtype=torch.uint8, device="meta") if flips else None
    seed = torch.empty(2, dtype=torch.int64, device="meta")
    with record_launches() as launches:
        launch_noise(images, sigma, sigma, flip, seed, None, 0, 0.5)
    words = f"{count} x {height} x {width} x {channels}, {str(dtype).removeprefix('torch.')}"
    bytes_moved = dtype.itemsize + 8
    words += ", flips" if flips else ""
    return Case("noise_images", words, "one pass", launches, bytes_moved, bytes_moved)


def cases(full: bool) -> Iterator[Case]:
    """CIFAR-10's bytes with flips; with `full` every network's images, bytes and floats."""
    yield _case((512, 32, 32, 3), torch.uint8, True)
    if full:
        for shape in ((512, 32, 32, 3), (128, 64, 64, 3), (64, 8, 8, 1), (6, 5, 7, 3)):
            for dtype in (torch.uint8, torch.float32, torch.bfloat16):
                yield _case(shape, dtype, False)
        yield _case((128, 64, 64, 3), torch.uint8, True)
        yield _case((64, 8, 8, 1), torch.uint8, True)
