"""Convolutions that a GPU computes faster in another form, most of them as products of matrices.

On an H200, in ADM-64's training step of 128 images (benchmarks/results/analysis.md, step-floor), its 1 x 1
convolutions take 10.5 ms forward and 13.6 backward as products, by cuDNN 25.7 and 16.2. To an image's three
channels cuDNN computes 32 in fp32: 2.2 ms forward and 2.6 backward; products with sums over neighbours take
0.44 and 0.56. The products of windows have not been timed by themselves.

The convolutions of what nearest upsampling gives took 14.0 ms of that step, two forward passes and a backward
one (384 channels at 64 x 64 7.34, 576 at 32 x 32 4.84, 768 at 16 x 16 1.83: the floor's calls in
step-NVIDIA-H200-20261127-122218.json). Computed before the upsampling they have 4 taps for 9 and a row and a
column more, 0.47, 0.50 and 0.56 of the work, and a pass that puts the results in place. With that the three
blocks take 25.1 ms for 29.8, called one by one: 13.4 for 16.1, 7.9 for 9.8, and 3.7 for 3.9, of which the
teacher's forward pass is the slower, 1.05 for 0.92 (norm-plans-NVIDIA-H200-20261128.json).

On a CPU products took up to twice as long as oneDNN's convolutions. The gradients of one in fp16, of 16
images with 64 channels at 32 x 32, took oneDNN 11 s: of fp16 a CPU makes fp32, in 27 ms, and rounds the
results.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ict_kernels.backend import convolves_well
from ict_kernels.fir_resampling import fir_taps


def convolution(x_nchw: Tensor, weight: Tensor, bias: Tensor | None, padding: int, stride: int = 1) -> Tensor:
    """torch's conv2d; of a channels_last image, the result is channels_last."""
    if _is_product(x_nchw, weight, padding, stride):
        return pixel_products(x_nchw, weight, bias)
    if not convolves_well(x_nchw):
        # As a tensor core does: exact products, sums in fp32, results in 16 bits. Autograd does so too.
        dtype = x_nchw.dtype
        x_nchw, weight = (each.to(dtype).float() for each in (x_nchw, weight))
        bias = None if bias is None else bias.to(dtype).float()
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(x_nchw, weight, bias, stride, padding).to(dtype)
    return F.conv2d(x_nchw, weight, bias, stride, padding)


def convolution_gradients(
    grad_nchw: Tensor, x_nchw: Tensor, weight: Tensor, padding: int, stride: int = 1
) -> tuple[Tensor, Tensor]:
    """The gradients of `convolution` by x and by the weight."""
    if _is_product(x_nchw, weight, padding, stride):
        return pixel_product_gradients(grad_nchw, x_nchw, weight)
    sizes = ([stride, stride], [padding, padding], [1, 1], False, [0, 0], 1)
    by_x, by_weight, _ = torch.ops.aten.convolution_backward(
        grad_nchw, x_nchw, weight, None, *sizes, [True, True, False]
    )
    return by_x, by_weight


def _is_product(x: Tensor, weight: Tensor, padding: int, stride: int) -> bool:
    return x.is_cuda and weight.shape[2:] == (1, 1) and (padding, stride) == (0, 1)


def pixel_products(x_nchw: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 1 x 1 convolution; the gradient of a channels_last weight has its strides, as DDP wants them."""
    matrix = weight.permute(0, 2, 3, 1).flatten(1)
    return F.linear(x_nchw.permute(0, 2, 3, 1), matrix, bias).permute(0, 3, 1, 2)


def pixel_product_gradients(grad_nchw: Tensor, x_nchw: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `pixel_products` by x and by the weight."""
    grad = grad_nchw.permute(0, 2, 3, 1)
    by_x = (grad @ weight.flatten(1)).permute(0, 3, 1, 2)
    by_weight = grad.flatten(0, 2).t() @ x_nchw.permute(0, 2, 3, 1).flatten(0, 2)
    return by_x, by_weight.unflatten(1, (1, 1, -1)).permute(0, 3, 1, 2)


def folded_products(x_nchw: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The 3 x 3 convolution, padded by 1: what each pixel adds to its neighbours, then the sums of that."""
    # Once for every image: so is the weight's gradient, where one product would be a few rows and columns of
    # half a million terms each.
    pixels = x_nchw.permute(0, 2, 3, 1).flatten(1, 2)
    neighbours = torch.bmm(pixels, to_neighbours(weight).expand(len(pixels), -1, -1))
    image: Tensor = _Fold.apply(neighbours, *x_nchw.shape[2:])
    return image + bias.view(-1, 1, 1)


def to_neighbours(weight: Tensor) -> Tensor:
    """From a pixel's channels to (channel, row, column) of its neighbourhood in the result.

    A pixel is its lower neighbour's upper one: the weights are turned around.
    """
    return weight.flip(2, 3).permute(1, 0, 2, 3).flatten(1)


class _Fold(torch.autograd.Function):
    """(N, H W, 9 C) to (N, C, H, W): torch's fold, whose own gradient is a launch for every image."""

    generate_vmap_rule = True

    @staticmethod
    def forward(neighbours: Tensor, height: int, width: int) -> Tensor:
        return F.fold(neighbours.transpose(1, 2), (height, width), 3, padding=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        ctx.size = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return neighbourhoods(gradient), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _Fold.forward(tangent, *ctx.size)


def neighbourhoods(image_nchw: Tensor) -> Tensor:
    """(N, C, H, W) to (N, H W, 9 C): each pixel's neighbours, zero outside; the adjoint of the fold."""
    return _windows(image_nchw, 3, 1, 1).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def _windows(image_nchw: Tensor, size: int, padding: int, stride: int) -> Tensor:
    """(N, C, H, W) to views (N, C, (H + 2 padding - size) // stride + 1, the same of W, row, column)."""
    padded = F.pad(image_nchw, 4 * (padding,))
    return padded.unfold(2, size, stride).unfold(3, size, stride)


def window_products(
    image_nchw: Tensor, weight: Tensor, bias: Tensor | None, padding: int, stride: int = 1
) -> Tensor:
    """A convolution of an image's few channels, each window of it a row; the result is channels_last.

    The gradient of a channels_last weight has its strides, as DDP wants them.
    """
    rows = _windows(image_nchw, weight.shape[2], padding, stride).permute(0, 2, 3, 4, 5, 1).flatten(3)
    return F.linear(rows, weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)


def halving_weight(weight: Tensor) -> Tensor:
    """What a 3 x 3 convolution is with NCSN++'s halving filter after it: one of 6 x 6, with stride 2.

    Args:
        weight: (O, I, 3, 3), of a convolution that computes a border of one pixel more than its image, for
            the filter to read.
    Returns:
        (O, I, 6, 6), channels_last, for the padding of that convolution; the bias is the same, since the
        filter keeps constants.
    """
    taps = fir_taps(weight)
    along = torch.stack([F.pad(taps, (shift, 2 - shift)) for shift in range(3)])
    both = torch.einsum("oirc,rs,ct->oist", weight, along, along)
    return both.to(memory_format=torch.channels_last)


def doubling_weight(weight: Tensor) -> Tensor:
    """What a 3 x 3 convolution is with nearest upsampling before it: one of 2 x 2 for each of four phases.

    Of a row x the doubled one is y[2i - 1] = (w0 + w1) x[i - 1] + w2 x[i] in its odd places, and in its even
    ones y[2i] = w0 x[i - 1] + (w1 + w2) x[i].

    Args:
        weight: (O, I, 3, 3), of a convolution with padding 1.
    Returns:
        (4 O, I, 2, 2), channels_last, for padding 1: the first O channels are of odd rows and columns, the
        next of odd rows and even columns, then come even rows. `interleaved` puts their results in place.
    """
    taps = weight.permute(0, 2, 3, 1)
    # Along a row w0, w0 + w1, w1 + w2 and w2. Always padded in both directions: a padding behind one of them
    # alone Inductor makes a concatenation, with launches of its own.
    corners = [F.pad(taps, (0, 0, left, 1 - left, up, 1 - up)) for up in (0, 1) for left in (0, 1)]
    sums = corners[0] + corners[1] + corners[2] + corners[3]
    phases = sums.unflatten(2, (2, 2)).unflatten(1, (2, 2)).flip(2, 4)
    return phases.permute(2, 4, 0, 1, 3, 5).flatten(0, 2).permute(0, 3, 1, 2)


def interleaved(phases_nchw: Tensor) -> Tensor:
    """The results of the convolution by `doubling_weight`, each in its place.

    Compiled, it is a gather that reads and writes 4 O H W values of an image. So is its gradient, which reads
    as many and writes 4 O (H + 1) (W + 1).

    Args:
        phases_nchw: (N, 4 O, H + 1, W + 1), for images of H x W.
    Returns:
        (N, O, 2 H, 2 W), channels_last.
    """
    count, channels, height, width = phases_nchw.shape
    phases = phases_nchw.permute(0, 2, 3, 1).unflatten(3, (2, 2, channels // 4))
    pixels = phases.transpose(2, 3).reshape(count, 2 * height, 2 * width, channels // 4)
    # The first row and column lie before the image, the last behind it.
    return F.pad(pixels, (0, 0, -1, -1, -1, -1)).permute(0, 3, 1, 2)


class ImageConv2d(nn.Conv2d):
    """The 3 x 3 convolution, padded by 1, from many channels to an image's few."""

    def __init__(self, in_channels: int, image_channels: int) -> None:
        super().__init__(in_channels, image_channels, 3, padding=1)

    def forward(self, x_nchw: Tensor) -> Tensor:
        assert self.bias is not None
        return folded_products(x_nchw, self.weight, self.bias) if x_nchw.is_cuda else super().forward(x_nchw)
