"""The draw of noise levels: one launch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ict_kernels.noise_levels import CURRICULUM_SCALES, launch_levels
from ict_kernels.triton_support import record_launches

from . import Case


def _case(batch: int, scales: tuple[int, ...], num_scales: torch.Tensor | None, words: str) -> Case:
    rows, longest = len(scales), max(scales)
    table = (
        torch.empty(rows, dtype=torch.int64, device="meta"),
        torch.empty(rows, longest - 2, dtype=torch.int64, device="meta"),
        torch.empty(rows, longest, device="meta"),
        torch.empty(rows, longest - 1, device="meta"),
    )
    seed = torch.empty(2, dtype=torch.int64, device="meta")
    offset = None if num_scales is None else torch.empty((), dtype=torch.int64, device="meta")
    with record_launches() as launches:
        launch_levels(num_scales, *table, seed, offset, batch, 0)
    return Case("sample_noise_levels", f"{batch} samples, {words}", "table in cache", launches, 20, 20)


def cases(full: bool) -> Iterator[Case]:
    """The whole curriculum's table; with `full` single stages too."""
    tensor = torch.empty((), dtype=torch.int64, device="meta")
    yield _case(512, CURRICULUM_SCALES, tensor, "N on the device")
    if full:
        for scales in (2, 11, 161, 1281):
            yield _case(4096, (scales,), None, f"N = {scales}")
