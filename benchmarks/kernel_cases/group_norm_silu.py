"""Group norm + SiLU: its launches at every shape of the networks of presets cifar10 and imagenet64.

Bytes: a resident tile is read once. Split reads its input twice and writes and reads partial statistics; the
second read is meant to come from L2, and is counted here as if it did not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import ict_kernels
from ict_kernels import group_norm_plan
from ict_kernels.philox import DROPOUT
from ict_kernels.triton_support import record_launches

from . import Case

norm: Any = sys.modules[f"{ict_kernels.__name__}.group_norm_silu"]  # the function has its module's name


@dataclass(frozen=True, order=True)
class Norm:
    """One norm of a network: x (N, channels, size, size) and what comes with it."""

    size: int
    channels: int
    num_groups: int
    silu: bool = True
    dropout: bool = False
    pre_bias: bool = False
    scale_shift: bool = False
    fp32: bool = False

    def __str__(self) -> str:
        options = ("dropout", "pre_bias", "scale_shift")
        given = [name for name in options if getattr(self, name)] + ([] if self.silu else ["no activation"])
        dtype = "fp32" if self.fp32 else "bf16"
        shape = f"{self.channels} x {self.size} x {self.size}, {self.num_groups} groups, {dtype}"
        return ", ".join([shape, *given])


def norms_of(preset: str) -> set[Norm]:
    """The distinct norms of a preset's network, from a forward pass on the meta device.

    The output's norm computes in fp32 whatever the precision of the trunk.
    """
    from ict_fast import presets
    from ict_fast.networks import build_network

    config = presets.get(preset).network
    with torch.device("meta"):
        network = build_network(config)
        x = torch.empty(2, config.image_channels, config.resolution, config.resolution)
        labels = torch.zeros(2, dtype=torch.int64) if config.num_classes else None
        seed = torch.empty(2, dtype=torch.int64)
    found = set()

    def noting(module: Any) -> Callable[..., torch.Tensor]:
        """In place of the norm, which has its input's shape."""

        def forward(x: torch.Tensor, **given: Any) -> torch.Tensor:
            dropout = given.get("seed") is not None and module.dropout > 0
            options = [given.get(name) is not None for name in ("pre_bias", "scale")]
            silu, fp32 = module.activation == "silu", module is network.output.norm
            found.add(Norm(x.shape[2], x.shape[1], module.num_groups, silu, dropout, *options, fp32))
            return x

        return forward

    for module in network.modules():
        if isinstance(module, ict_kernels.GroupNormSiLU):
            module.forward = noting(module)
    network(x, torch.empty(2, device="meta"), labels, dropout_seed=seed)
    return found


def plan_of(each: Norm, backward: bool, count: int = 64) -> group_norm_plan.Plan:
    """What `group_norm_plan` says of a norm."""
    itemsize = 4 if each.fp32 else 2
    pixels = each.size**2
    return group_norm_plan.plan_of(
        count, each.channels, pixels, each.num_groups, itemsize, backward, each.dropout
    )


def case_of(each: Norm, backward: bool) -> Case:
    """Its launches, for one chunk of samples."""
    plan = plan_of(each, backward)
    count, itemsize = plan.chunk, 4 if each.fp32 else 2

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(
        count, each.channels, each.size, each.size, dtype=torch.float32 if each.fp32 else torch.bfloat16
    )
    x = x.contiguous(memory_format=torch.channels_last)
    weight = empty(each.channels)
    scale, shift = empty(count, 2 * each.channels).chunk(2, dim=1) if each.scale_shift else (None, None)
    pre_bias = empty(count, each.channels) if each.pre_bias else None
    seed = empty(2, dtype=torch.int64) if each.dropout else None
    offset = empty(dtype=torch.int64) if each.dropout else None
    threshold = round(0.3 * 65536) if each.dropout else 0
    tensors = (each.num_groups, weight, weight, scale, shift, pre_bias, seed, offset)
    numbers = (0, DROPOUT << 16, threshold)
    with record_launches() as launches:
        if backward:
            stats = empty(count, each.num_groups, 2)
            wanted = [True, True, each.scale_shift, each.scale_shift, each.pre_bias]
            norm._backward(x, x, stats, *tensors, *numbers, each.silu, wanted)
        else:
            norm._forward(x, *tensors, *numbers, 1e-5, each.silu)
    minimum = (3 if backward else 2) * itemsize
    moved: float = minimum
    if not plan.resident:
        partials = 2 + each.pre_bias if backward else 2
        moved += (2 if backward else 1) * itemsize + partials * 2 * 4 / plan.rows
    return Case(
        op=f"group_norm_silu {'backward' if backward else 'forward'}",
        shape=str(each),
        algorithm="resident" if plan.resident else "split",
        launches=launches,
        bytes_per_element=moved,
        minimum_bytes_per_element=minimum,
    )


def cases(full: bool) -> Iterator[Case]:
    """Both directions of every norm; without `full`, one of each algorithm, with everything switched on, and
    backward one of another network, whose channels 8 does not divide; and forward, of resident tiles, that
    which has most elements and one that is held in fp32."""
    norms = {
        Norm(16, 768, 32, dropout=True, pre_bias=True),
        Norm(32, 384, 32, dropout=True, pre_bias=True, scale_shift=True),
        Norm(65, 33, 11, dropout=True),
    }
    if full:
        norms = norms_of("cifar10") | norms_of("imagenet64") | norms_of("imagenet64-ct2023")
        # Of no network here: 16-bit tiles with rows beyond the image, and the widths of others.
        norms |= {Norm(31, 256, 32, dropout=True, pre_bias=True, scale_shift=True), Norm(31, 256, 32)}
        norms |= {Norm(16, 640, 32, dropout=True, pre_bias=True), Norm(16, 640, 32, pre_bias=True)}
        # A pre-bias of fp32 is added in another place; the first of these takes all registers there are.
        norms |= {Norm(8, 576, 32, dropout=True, pre_bias=True, fp32=True)}
        norms |= {Norm(64, 192, 32, pre_bias=True, scale_shift=True, fp32=True)}
    for each in sorted(norms):
        if full or each.channels % 8 == 0:
            yield case_of(each, backward=False)
        yield case_of(each, backward=True)
    if not full:
        yield case_of(Norm(32, 256, 32), backward=False)
        yield case_of(Norm(16, 384, 32, pre_bias=True, scale_shift=True), backward=False)
