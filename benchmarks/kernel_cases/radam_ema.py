"""RAdam + EMA: the launches of one step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ict_kernels import RAdamEMA
from ict_kernels.triton_support import record_launches

from . import Case

# A convolution and its bias, and a tensor of no whole block.
_SHAPES = ((256, 128, 3, 3), (256,), (7,))


def _case(shape: str, grad_scaler: bool = False, **settings: float | Tensor) -> Case:
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in _SHAPES]
    optimizer = RAdamEMA(params, **settings)
    if grad_scaler:
        optimizer.grad_scale = optimizer.found_inf = torch.empty((), device="meta")
    for p in params:
        p.grad = torch.empty_like(p)
    with record_launches() as launches, torch.no_grad():
        optimizer._step_by_kernels([(optimizer.param_groups[0], params)], [True])
    assert len(launches) == 3
    return Case("radam_ema step", shape, "norm, scalars, update", launches, 40, 36)


def cases(full: bool) -> Iterator[Case]:
    """A step as the trainer takes it; all switches with `full`."""
    tensor = torch.empty((), dtype=torch.float64, device="meta")
    yield _case("fp32, decay on the device", ema_decay=tensor)
    if full:
        yield _case("fp32, lr and decay as numbers")
        yield _case("fp32, weight decay, GradScaler", True, lr=tensor, ema_decay=tensor, weight_decay=0.1)
