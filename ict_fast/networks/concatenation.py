"""Activations joined with what a skip connection brings, and the gradient in two parts.

The parts of the gradient that torch.cat hands on are slices of one tensor. The compiled blocks that they go
to are made for what is contiguous, and each slice would be copied before. Here the parts are contiguous:
inside a compiled block, the kernel that adds up its input's gradient becomes one for each part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def concatenated(x_nchw: Tensor, skip_nchw: Tensor) -> Tensor:
    """The channels of both, in this order. Compiled, both gradients are channels_last and no slices."""
    if not torch.compiler.is_compiling():  # where forward-mode derivatives and torch.func are to work too
        return torch.cat([x_nchw, skip_nchw], dim=1)
    joined: Tensor = _Concatenation.apply(x_nchw, skip_nchw)
    return joined


class _Concatenation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nchw: Tensor, skip_nchw: Tensor) -> Tensor:  # not *parts: torch 2.11 loses one
        ctx.widths = x_nchw.shape[1], skip_nchw.shape[1]
        return torch.cat([x_nchw, skip_nchw], dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, skip = gradient.split(ctx.widths, dim=1)
        return _channels_last(x), _channels_last(skip)


def _channels_last(x_nchw: Tensor) -> Tensor:
    return x_nchw.contiguous(memory_format=torch.channels_last)
