"""What NCSN++ and ADM are made of: resampling, noise features, attention, the residual block, the ends.

Which arithmetic runs where (METHOD.md, trap 6): the trunk follows autocast, the ends do not. An adjacent pair
of noise levels differs by less than bf16 can express, so the path of the noise embedding (to its projection
in every block), the convolutions that read the image, and the output norm and convolution leave autocast and
compute in the dtype of their parameters. TF32 is a global switch of torch, not a layer's: the caller turns it
off (`switches.configure_torch`), and tf32.py on again inside single operations of the trunk.

Randomness is an argument: dropout happens if and only if a seed is passed, whatever train() and eval() say.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ict_fast.config import NetworkConfig
from ict_fast.errors import InputError
from ict_fast.networks.concatenation import concatenated
from ict_fast.networks.convolution import ImageConv2d, doubling_weight, interleaved, window_products
from ict_fast.networks.tf32 import TrunkConv2d
from ict_kernels import GroupNormSiLU, fir_downsample, fir_upsample

Seed = int | Tensor | None
"""None for no dropout, else an int or an int64 (2,) tensor (run seed, step)."""


def group_count(channels: int) -> int:
    """Groups of a norm: 32, or fewer so that a group has at least four channels.

    Raises:
        InputError: if that many groups do not divide the channels.
    """
    groups = min(32, channels // 4)
    if groups < 1 or channels % groups:
        raise InputError(
            f"--network.channels: a layer of {channels} channels cannot be normalised in {max(groups, 1)}"
            " groups; choose a multiple of 4, and of 32 where a layer is wider than 128"
        )
    return groups


def without_autocast(x: Tensor) -> AbstractContextManager:
    """The context in which an end of the network computes. Autocast does not know the meta device."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def to_trunk(x_nchw: Tensor) -> Tensor:
    """The activations as the trunk takes them: channels_last, in the autocast dtype where autocast is on."""
    device = x_nchw.device.type
    dtype = x_nchw.dtype
    if not x_nchw.is_meta and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return x_nchw.to(dtype=dtype, memory_format=torch.channels_last)


def check_inputs(config: NetworkConfig, x_nchw: Tensor, noise_n: Tensor, labels_n: Tensor | None) -> None:
    """Refuses what the network was not built for.

    Raises:
        InputError: naming the shape or type seen and the one expected. To look for a class that there is not
            would be to wait for the device; `ConsistencyModel` does it.
    """
    expected = (config.image_channels, config.resolution, config.resolution)
    if x_nchw.ndim != 4 or tuple(x_nchw.shape[1:]) != expected:
        raise InputError(
            f"images of shape {tuple(x_nchw.shape)}; this network takes (N, {', '.join(map(str, expected))})"
        )
    count = x_nchw.shape[0]
    if noise_n.shape != (count,):
        raise InputError(f"noise of shape {tuple(noise_n.shape)}; {count} images need ({count},)")
    if labels_n is None:
        if config.num_classes:
            raise InputError(f"no labels; this network is conditional on {config.num_classes} classes")
    elif not config.num_classes:
        raise InputError("labels given; this network was built without classes")
    elif labels_n.shape != (count,):
        raise InputError(f"labels of shape {tuple(labels_n.shape)}; {count} images need ({count},)")
    elif labels_n.dtype not in (torch.int32, torch.int64):
        dtype = str(labels_n.dtype).removeprefix("torch.")
        raise InputError(f"labels of type {dtype}; they are class numbers, int64")


class FirDownsample(nn.Module):
    """Halves the resolution after low-pass filtering with [1, 3, 3, 1] in both directions."""

    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x_nchw: Tensor) -> Tensor:
        return fir_downsample(x_nchw, padding=self.padding)


class FirUpsample(nn.Module):
    """Doubles the resolution: zeros between the pixels, then the filter [1, 3, 3, 1] with gain 4."""

    def forward(self, x_nchw: Tensor) -> Tensor:
        return fir_upsample(x_nchw)


class AverageDownsample(nn.Module):
    """Halves the resolution: the mean of each 2x2."""

    def forward(self, x_nchw: Tensor) -> Tensor:
        return F.avg_pool2d(x_nchw, 2)


class NearestUpsample(nn.Module):
    """Doubles the resolution: each pixel four times. The result is channels_last.

    Not by F.interpolate: Inductor takes its backward pass to atomic additions in fp32, which are slow, and
    whose sums depend on their order. Here it is a sum of four values.
    """

    def forward(self, x_nchw: Tensor) -> Tensor:
        count, channels, height, width = x_nchw.shape
        pixels = x_nchw.permute(0, 2, 3, 1)
        # One direction after the other: backward, a CPU's sum over both takes five times as long (measured).
        pixels = pixels[:, :, :, None].expand(-1, -1, -1, 2, -1)
        pixels = pixels[:, :, None].expand(-1, -1, 2, -1, -1, -1)
        return pixels.reshape(count, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


class FourierFeatures(nn.Module):
    """Cosines and sines of the noise level at random frequencies, drawn once and saved with the weights.

    Args:
        count: number of features, half of them cosines.
        scale: standard deviation of the frequencies.
        sine_first: the order of the halves; NCSN++ has the sines first.
    """

    frequencies: Tensor

    def __init__(self, count: int, scale: float, sine_first: bool) -> None:
        super().__init__()
        self.sine_first = sine_first
        self.register_buffer("frequencies", torch.randn(count // 2) * scale)

    def forward(self, noise_n: Tensor) -> Tensor:
        frequencies = 2 * math.pi * self.frequencies
        return _sinusoids(noise_n.to(frequencies.dtype)[:, None] * frequencies, self.sine_first)


class PositionalFeatures(nn.Module):
    """Cosines and sines of the noise level at fixed frequencies, geometric from 1 to 1/10000.

    Args:
        count: number of features, half of them cosines.
        sine_first: the order of the halves; NCSN++ has the sines first.
        endpoint: whether the last frequency is 1/10000 itself or one ratio short of it.
    """

    frequencies: Tensor

    def __init__(self, count: int, sine_first: bool, endpoint: bool) -> None:
        super().__init__()
        self.sine_first = sine_first
        exponents = torch.arange(count // 2, dtype=torch.float64) / (count // 2 - endpoint)
        self.register_buffer("frequencies", (10000.0**-exponents).float(), persistent=False)

    def forward(self, noise_n: Tensor) -> Tensor:
        return _sinusoids(noise_n.to(self.frequencies.dtype)[:, None] * self.frequencies, self.sine_first)


class FullPrecisionConv2d(nn.Conv2d):
    """A convolution of an image that computes in the dtype of its weights, whatever autocast says."""

    def forward(self, x_nchw: Tensor) -> Tensor:
        return self.convolved(x_nchw, self.weight, self.bias)

    def convolved(self, x_nchw: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1) -> Tensor:
        """With these instead of the layer's own."""
        padding = int(self.padding[0])
        with without_autocast(x_nchw):
            x_nchw = x_nchw.to(weight.dtype)
            if x_nchw.is_cuda:
                return window_products(x_nchw, weight, bias, padding, stride)
            return F.conv2d(x_nchw, weight, bias, stride, padding)


class Output(nn.Module):
    """Norm, SiLU and the last convolution, in the dtype of their weights whatever autocast says."""

    def __init__(self, in_channels: int, image_channels: int, eps: float) -> None:
        super().__init__()
        self.norm = GroupNormSiLU(group_count(in_channels), in_channels, eps=eps)
        self.conv = ImageConv2d(in_channels, image_channels)

    def forward(self, x_nchw: Tensor) -> Tensor:
        with without_autocast(x_nchw):
            return self.conv(self.norm(x_nchw.to(self.conv.weight.dtype)))


# Of keys: cuDNN's kernels on Hopper. See `attend`.
_TILE = 128
_NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k / sqrt d) v by torch's kernels, all (N, heads, pixels, channels of a head).

    Not by cuDNN's where the pixels do not fill its tiles: of 64 they do not, and there its gradients by the
    query have been NaN for rows whose scores are all low (pytorch issue 196678, with a mask; the cause that
    is reported has none: the empty half of a tile counts as scores of 0).
    """
    if not _leaves_tiles_unfilled(query):
        return F.scaled_dot_product_attention(query, key, value)
    with sdpa_kernel(_NOT_CUDNN):
        return F.scaled_dot_product_attention(query, key, value)


def _leaves_tiles_unfilled(query: Tensor) -> bool:
    return query.is_cuda and query.shape[2] % _TILE != 0


class SelfAttention(nn.Module):
    """What attention adds to the activations: norm, heads of softmax(q k / sqrt d) v over pixels, projection.

    The rows of `qkv` are ordered (query key value, head, channel of the head), as in OpenAI's consistency
    models: the heads are then views of the convolution's output. EDM's are (head, channel, query key value).

    Args:
        channels: of input and output.
        head_channels: channels per head; 0 for a single head.
        eps: of the norm.
    """

    def __init__(self, channels: int, head_channels: int, eps: float) -> None:
        super().__init__()
        self.head_channels = head_channels or channels
        if channels % self.head_channels:
            raise InputError(
                f"--network.head-channels is {head_channels}; it must divide the {channels} channels of an"
                " attention layer"
            )
        self.norm = GroupNormSiLU(group_count(channels), channels, eps=eps, activation=None)
        self.qkv = TrunkConv2d(channels, 3 * channels, 1)
        self.projection = TrunkConv2d(channels, channels, 1)

    def forward(self, x_nchw: Tensor) -> Tensor:
        count, channels, height, width = x_nchw.shape
        qkv = self.qkv(self.norm(x_nchw)).permute(0, 2, 3, 1)
        qkv = qkv.reshape(count, height * width, 3, channels // self.head_channels, self.head_channels)
        query, key, value = qkv.transpose(1, 3).unbind(2)  # each (N, heads, pixels, head channels)
        mixed = attend(query, key, value)
        mixed = mixed.transpose(1, 2).reshape(count, height, width, channels)
        return self.projection(mixed.permute(0, 3, 1, 2))


class ResidualBlock(nn.Module):
    """The U-Net block of both networks: two norm-SiLU-convolutions beside a skip path, then attention.

    The noise embedding enters before or in the second norm. Both resamplings act before their convolution.

    Args:
        in_channels, out_channels: width before and after.
        embedding_channels: width of the noise embedding.
        resample: up- or downsampling of both paths, or None.
        project_skip: a 1x1 convolution on a resampled skip path although the width stays (NCSN++).
        skip_scale: factor after each residual sum.
        eps: of the norms.
        attention: self-attention at the end.
        head_channels: channels per attention head; 0 for a single head.
        adaptive_norm: embedding as scale and shift of the second norm (True), or added before it (False).
        dropout: probability, after the second SiLU; active if a seed is passed, one for this block alone.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_channels: int,
        eps: float,
        adaptive_norm: bool,
        dropout: float,
        resample: nn.Module | None = None,
        project_skip: bool = False,
        skip_scale: float = 1.0,
        attention: bool = False,
        head_channels: int = 0,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.adaptive_norm = adaptive_norm
        self.skip_scale = skip_scale
        self.resample = resample
        self.norm0 = GroupNormSiLU(group_count(in_channels), in_channels, eps=eps)
        self.conv0 = TrunkConv2d(in_channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(embedding_channels, out_channels * (2 if adaptive_norm else 1))
        self.norm1 = GroupNormSiLU(group_count(out_channels), out_channels, eps=eps, dropout=dropout)
        self.conv1 = TrunkConv2d(out_channels, out_channels, 3, padding=1)
        self.skip = None
        if in_channels != out_channels or (resample is not None and project_skip):
            self.skip = TrunkConv2d(in_channels, out_channels, 1)
        self.attention = SelfAttention(out_channels, head_channels, eps) if attention else None

    def forward(
        self,
        x_nchw: Tensor,
        embedding: Tensor,
        dropout_seed: Seed = None,
        dropout_offset: int | Tensor = 0,
        *,
        skip_nchw: Tensor | None = None,
    ) -> Tensor:
        """The activations after this block, in the dtype of `x_nchw`; the embedding is fp32.

        `skip_nchw` is what a block of the decoder has from the encoder: further channels of the input.
        """
        if skip_nchw is not None:
            x_nchw = concatenated(x_nchw, skip_nchw)
        with without_autocast(x_nchw):
            condition = self.embedding(embedding)
        # The convolution's bias goes into the norm that follows: alone it would cost a pass over memory.
        hidden = self._resampled_and_convolved(self.norm0(x_nchw))
        assert self.conv0.bias is not None
        if self.adaptive_norm:
            scale, shift = condition.chunk(2, dim=1)
            pre_bias = self.conv0.bias
        else:
            scale, shift = None, None
            pre_bias = self.conv0.bias + condition
        hidden = self.norm1(
            hidden, scale=scale, shift=shift, pre_bias=pre_bias, seed=dropout_seed, offset=dropout_offset
        )
        skip = self._resampled(x_nchw)
        if self.skip is not None:
            skip = self.skip(skip)
        x_nchw = self._scaled(skip + self.conv1(hidden))
        if self.attention is not None:
            x_nchw = self._scaled(x_nchw + self.attention(x_nchw))
        return x_nchw

    def _resampled_and_convolved(self, x_nchw: Tensor) -> Tensor:
        if not self._convolves_before_upsampling(x_nchw):
            return self.conv0(self._resampled(x_nchw), with_bias=False)
        with without_autocast(x_nchw):
            weight = doubling_weight(self.conv0.weight)
        return interleaved(self.conv0.convolved(x_nchw, weight, None))

    def _convolves_before_upsampling(self, x_nchw: Tensor) -> bool:
        """A GPU multiplies by 4 taps for each pixel, where of the upsampled activations there are 9."""
        return x_nchw.is_cuda and isinstance(self.resample, NearestUpsample)

    def _resampled(self, x_nchw: Tensor) -> Tensor:
        return x_nchw if self.resample is None else self.resample(x_nchw)

    def _scaled(self, x_nchw: Tensor) -> Tensor:
        return x_nchw if self.skip_scale == 1 else x_nchw * self.skip_scale


def _sinusoids(angles: Tensor, sine_first: bool) -> Tensor:
    halves = (angles.sin(), angles.cos()) if sine_first else (angles.cos(), angles.sin())
    return torch.cat(halves, dim=1)
