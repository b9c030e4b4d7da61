"""The trunk's convolutions in TF32: fp32 tensors, products of operands with 10 bits of mantissa.

TF32 is a switch of the whole process, and the network's ends must not see it (METHOD, trap 6: it makes
neighbouring noise levels identical). The ends lie between the trunk's layers, forward and backward, and
autograd calls backward functions in an order, and a thread, of its own. So the switch is turned for the
length of one operation, inside it: forward and backward are operations that torch.compile does not look into,
and whatever runs between two of them finds IEEE arithmetic. Attention's softmax and its two products, a
twentieth of ADM's, stay in fp32: torch's fused kernels do as they like with the switch.

A CPU has no TF32. Here it rounds the operands instead, to nearest, and accumulates in fp32, which is what a
tensor core does up to the order of the sums.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ict_fast.networks.convolution import convolution, convolution_gradients

# Autograd's thread for a device and the main thread never compute at once, but a second device's might.
_TURNING = threading.RLock()

_DROPPED_BITS = 13  # of fp32's 23 bits of mantissa TF32 keeps 10


@contextmanager
def tf32_allowed() -> Iterator[None]:
    """TF32 for the convolutions and matrix products inside, and what was before afterwards."""
    with _TURNING:
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def round_to_tf32(x: Tensor) -> Tensor:
    """fp32 rounded to TF32's 10 bits of mantissa, to nearest, ties away from zero; inf and nan stay."""
    assert x.dtype == torch.float32, x.dtype
    bits = x.view(torch.int32)
    half, mask = 1 << (_DROPPED_BITS - 1), -1 << _DROPPED_BITS
    # In integers the mantissa carries into the exponent by itself; inf and nan must not.
    return torch.where(x.isfinite(), ((bits + half) & mask).view(torch.float32), x)


def _operand(x: Tensor) -> Tensor:
    return x if x.is_cuda else round_to_tf32(x)


# ---- the operations ----


@torch.library.custom_op("ict_fast::conv2d_tf32", mutates_args=())
def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, stride: int) -> Tensor:
    with tf32_allowed():
        return convolution(_operand(x), _operand(weight), bias, padding, stride)


@_conv2d.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, stride: int) -> Tensor:
    return convolution(x, weight, bias, padding, stride)


@torch.library.custom_op("ict_fast::conv2d_tf32_backward", mutates_args=())
def _conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, padding: int, stride: int
) -> tuple[Tensor, Tensor]:
    with tf32_allowed():
        return convolution_gradients(_operand(grad), _operand(x), _operand(weight), padding, stride)


@_conv2d_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, padding: int, stride: int) -> tuple[Tensor, Tensor]:
    return convolution_gradients(grad, x, weight, padding, stride)


def _keep_operands(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, *sizes = inputs
    ctx.save_for_backward(x, weight)
    ctx.sizes, ctx.has_bias = sizes, bias is not None  # type: ignore[attr-defined]


def _backward_of_conv2d(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
    by_x, by_weight = _conv2d_backward(grad, x, weight, *ctx.sizes)  # type: ignore[attr-defined]
    # A sum, not a product: as exact as any other of the trunk's fp32 sums.
    by_bias = grad.sum((0, 2, 3)) if ctx.has_bias else None  # type: ignore[attr-defined]
    return by_x, by_weight, by_bias, None, None


_conv2d.register_autograd(_backward_of_conv2d, setup_context=_keep_operands)


# ---- what the layers call ----


class _WithGradientOf(torch.autograd.Function):
    """A cast of a parameter, whose gradient is the parameter's."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, cast: Tensor, parameter: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype  # type: ignore[attr-defined]
        return cast.view_as(cast)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient.to(ctx.dtype)  # type: ignore[attr-defined]


class TrunkConv2d(nn.Conv2d):
    """A convolution of the trunk: it follows autocast, and computes in TF32 if `tf32` is set.

    Attributes:
        cast_weight, cast_bias: what autocast would make of the parameters, if that is kept; see casts.py.
    """

    tf32 = False
    cast_weight: Tensor | None = None
    cast_bias: Tensor | None = None

    def forward(self, x_nchw: Tensor, *, with_bias: bool = True) -> Tensor:
        weight, bias = self.weight, self.bias if with_bias else None
        if self.cast_weight is not None and x_nchw.dtype == self.cast_weight.dtype:
            weight = _WithGradientOf.apply(self.cast_weight, weight)
            if bias is not None and self.cast_bias is not None:
                bias = _WithGradientOf.apply(self.cast_bias, bias)
        return self.convolved(x_nchw, weight, bias)

    def __getstate__(self) -> dict[str, Any]:
        """Without the casts: a copy computes with its own weights."""
        return {name: held for name, held in self.__dict__.items() if not name.startswith("cast_")}

    def convolved(self, x_nchw: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
        """With these instead of the layer's own."""
        padding = int(self.padding[0])
        if not self.tf32:
            return convolution(x_nchw, weight, bias, padding, stride)
        if bias is None or weight.shape[2:] == (1, 1):  # of a product cuBLAS adds it
            return _conv2d(x_nchw, weight, bias, padding, stride)
        # cuDNN would add it in a pass over memory, which compiled code has anyway for what comes next.
        return _conv2d(x_nchw, weight, None, padding, stride) + bias.view(-1, 1, 1)


def set_tf32(network: nn.Module, enabled: bool) -> None:
    """Computes the network's trunk in TF32 from now on, or no longer."""
    for module in network.modules():
        if isinstance(module, TrunkConv2d):
            module.tf32 = enabled
