"""Halving and doubling: one launch each way, which is also the other's gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ict_kernels.fir_resampling import launch_down, launch_up
from ict_kernels.triton_support import record_launches

from . import Case


def _cases(count: int, channels: int, size: int, dtype: torch.dtype) -> Iterator[Case]:
    """Down to half of a size and up to it again; bytes for each element of the larger image."""
    words = f"{count} x {channels} x {size} x {size}, {str(dtype).removeprefix('torch.')}"
    bytes_moved = 1.25 * dtype.itemsize
    for op, run, side in (("fir_downsample", launch_down, size), ("fir_upsample", launch_up, size // 2)):
        x = torch.empty(count, channels, side, side, dtype=dtype, device="meta")
        with record_launches() as launches:
            run(x.contiguous(memory_format=torch.channels_last), 1.0)
        yield Case(op, words, "one pass", launches, bytes_moved, bytes_moved)


def cases(full: bool) -> Iterator[Case]:
    """NCSN++'s larger resampling; with `full` the smaller, other dtypes, and channels that fill no tile."""
    yield from _cases(512, 256, 32, torch.bfloat16)
    if full:
        yield from _cases(512, 256, 16, torch.bfloat16)
        for dtype in (torch.float16, torch.float32):
            yield from _cases(512, 256, 32, dtype)
        yield from _cases(64, 72, 64, torch.bfloat16)
        yield from _cases(96, 32, 8, torch.float32)
