"""The network of a consistency model trained with ict-fast, for diffusers: NCSN++, DDPM++ or ADM.

This file travels with exported weights, so it needs torch and diffusers alone. It is for inference: no
dropout, no mixed precision inside. The names of its tensors are ict-fast's.
"""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


def _norm(channels, eps):
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class _Resample(nn.Module):
    """Doubles or halves the resolution: [1, 3, 3, 1] (filtered), or repeats and averages pixels."""

    def __init__(self, up, filtered):
        super().__init__()
        self.up, self.filtered = up, filtered

    def forward(self, x, padding=1):
        if not self.filtered:
            return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else F.avg_pool2d(x, 2)
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) / 8
        kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
        if self.up:
            return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=1, groups=x.shape[1])
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=x.shape[1])


class _Attention(nn.Module):
    def __init__(self, channels, head_channels, eps):
        super().__init__()
        self.size = head_channels or channels
        self.norm = _norm(channels, eps)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.projection = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        count, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(count, 3, channels // self.size, self.size, height * width)
        query, key, value = (part.transpose(2, 3) for part in qkv.unbind(1))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.projection(mixed.transpose(2, 3).reshape(x.shape))


class _Block(nn.Module):
    """Norm, SiLU, convolution, twice, beside a skip path; then attention."""

    def __init__(self, in_channels, out_channels, shared, resample=None, attention=False):
        super().__init__()
        eps, self.scale = shared["eps"], shared["skip_scale"]
        self.adaptive, self.resample = shared["adaptive_norm"], resample
        self.norm0 = _norm(in_channels, eps)
        self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(shared["width"], out_channels * (2 if self.adaptive else 1))
        self.norm1 = _norm(out_channels, eps)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        projected = in_channels != out_channels or (resample is not None and shared["project_skip"])
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if projected else None
        self.attention = _Attention(out_channels, shared["head_channels"], eps) if attention else None

    def forward(self, x, embedding):
        hidden = F.silu(self.norm0(x))
        if self.resample is not None:
            hidden, x = self.resample(hidden), self.resample(x)
        hidden = self.conv0(hidden)
        condition = self.embedding(embedding)[:, :, None, None]
        if self.adaptive:
            scale, shift = condition.chunk(2, dim=1)
            hidden = self.norm1(hidden) * (1 + scale) + shift
        else:
            hidden = self.norm1(hidden + condition)
        hidden = self.conv1(F.silu(hidden))
        x = ((x if self.skip is None else self.skip(x)) + hidden) * self.scale
        return x if self.attention is None else (x + self.attention(x)) * self.scale


class _Embedding(nn.Module):
    """Noise level and class to a vector."""

    def __init__(self, is_adm, channels, num_classes, fourier):
        super().__init__()
        self.is_adm, self.num_classes, width = is_adm, num_classes, 4 * channels
        count = 2 * channels if fourier and not is_adm else channels
        self.features = nn.Module()
        if fourier:
            self.features.register_buffer("frequencies", torch.zeros(count // 2))
        else:
            exponents = torch.arange(count // 2, dtype=torch.float64) / (count // 2 - (not is_adm))
            self.fixed = (10000.0**-exponents).float()
        self.fourier = fourier
        self.label = None
        if num_classes:
            self.label = nn.Embedding(num_classes, width) if is_adm else nn.Linear(num_classes, count)
        self.linear0 = nn.Linear(count, width)
        self.linear1 = nn.Linear(width, width)

    def forward(self, noise, labels):
        frequencies = 2 * math.pi * self.features.frequencies if self.fourier else self.fixed.to(noise.device)
        angles = noise.float()[:, None] * frequencies.float()
        halves = (angles.cos(), angles.sin()) if self.is_adm else (angles.sin(), angles.cos())
        hidden = torch.cat(halves, dim=1).to(self.linear0.weight.dtype)
        if self.label is not None and not self.is_adm:
            one_hot = F.one_hot(labels.long(), self.num_classes).to(hidden.dtype)
            hidden = hidden + self.label(one_hot * math.sqrt(self.num_classes))
        hidden = self.linear1(F.silu(self.linear0(hidden)))
        if self.label is not None and self.is_adm:
            hidden = hidden + self.label(labels)
        return F.silu(hidden)


class _Pyramid(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=2)
        self.down = _Resample(up=False, filtered=True)

    def forward(self, x, pyramid):
        pyramid = self.down(self.conv(pyramid), padding=0)
        return (x + pyramid) * math.sqrt(0.5)


class _EncoderLevel(nn.Module):
    def __init__(self, down, pyramid, blocks):
        super().__init__()
        self.down, self.pyramid, self.blocks = down, pyramid, nn.ModuleList(blocks)


class _DecoderLevel(nn.Module):
    def __init__(self, up, blocks):
        super().__init__()
        self.up, self.blocks = up, nn.ModuleList(blocks)


class _Output(nn.Module):
    def __init__(self, channels, image_channels, eps):
        super().__init__()
        self.norm = _norm(channels, eps)
        self.conv = nn.Conv2d(channels, image_channels, 3, padding=1)


class ICTUNet(ModelMixin, ConfigMixin):
    """F of a consistency model. Called as diffusers' pipelines call a UNet2DModel.

    The time step is that of CMStochasticIterativeScheduler, 250 ln(sigma); with `c_noise` "log" the network
    is given ln(sigma) / 4, a thousandth of it.
    """

    @register_to_config
    def __init__(
        self,
        name="ncsnpp",
        sample_size=32,
        in_channels=3,
        out_channels=3,
        num_class_embeds=None,
        channels=128,
        channel_mult=(2, 2, 2),
        num_blocks=4,
        attention_resolutions=(16,),
        head_channels=0,
        adaptive_norm=False,
        noise_embedding="fourier",
        c_noise="log",
        boundary_sigma=None,
        second_sigma=0.821,
        ict_fast=None,
    ):
        super().__init__()
        is_adm, filtered = name == "adm", name == "ncsnpp"
        shared = {
            "eps": 1e-5 if is_adm else 1e-6,
            "skip_scale": 1.0 if is_adm else math.sqrt(0.5),
            "project_skip": not is_adm,
            "adaptive_norm": adaptive_norm,
            "head_channels": head_channels,
            "width": 4 * channels,
        }
        levels = range(len(channel_mult))
        attends = [sample_size >> level in attention_resolutions for level in levels]
        width = channels * (channel_mult[0] if is_adm else 1)
        self.embedding = _Embedding(is_adm, channels, num_class_embeds or 0, noise_embedding == "fourier")
        self.input = nn.Conv2d(in_channels, width, 3, padding=1)

        skips, pyramid_width = [width], in_channels
        self.encoder = nn.ModuleList()
        for level in levels:
            down = pyramid = None
            if level:
                down = _Block(width, width, shared, _Resample(up=False, filtered=filtered))
                if filtered:
                    pyramid, pyramid_width = _Pyramid(pyramid_width, width), width
                skips.append(width)
            blocks = []
            for _ in range(num_blocks):
                blocks.append(_Block(width, channels * channel_mult[level], shared, attention=attends[level]))
                width = channels * channel_mult[level]
                skips.append(width)
            self.encoder.append(_EncoderLevel(down, pyramid, blocks))
        self.middle = nn.ModuleList(
            [_Block(width, width, shared, attention=True), _Block(width, width, shared)]
        )
        self.decoder = nn.ModuleList()
        for level in reversed(levels):
            up = None
            if level < levels[-1]:
                up = _Block(width, width, shared, _Resample(up=True, filtered=filtered))
            blocks = []
            for index in range(num_blocks + 1):
                here = attends[level] and (is_adm or index == num_blocks)
                in_width, width = width + skips.pop(), channels * channel_mult[level]
                blocks.append(_Block(in_width, width, shared, attention=here))
            self.decoder.insert(0, _DecoderLevel(up, blocks))
        self.output = _Output(width, out_channels, shared["eps"])

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        """The raw network output for scaled noisy images (N, C, H, W) at one time step."""
        noise = torch.as_tensor(timestep, device=sample.device).float().reshape(-1).expand(sample.shape[0])
        embedding = self.embedding(noise / 1000 if self.config.c_noise == "log" else noise, class_labels)
        pyramid, x = sample, self.input(sample)
        skips = [x]
        for level in self.encoder:
            if level.down is not None:
                x = level.down(x, embedding)
                if level.pyramid is not None:
                    x = pyramid = level.pyramid(x, pyramid)
                skips.append(x)
            for block in level.blocks:
                x = block(x, embedding)
                skips.append(x)
        for block in self.middle:
            x = block(x, embedding)
        for level in reversed(self.decoder):
            if level.up is not None:
                x = level.up(x, embedding)
            for block in level.blocks:
                x = block(torch.cat([x, skips.pop()], dim=1), embedding)
        x = self.output.conv(F.silu(self.output.norm(x)))
        return {"sample": x} if return_dict else (x,)
