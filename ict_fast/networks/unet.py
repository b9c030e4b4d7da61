"""The U-Net that NCSN++ and ADM have in common: levels of residual blocks, and how activations run through.

The two differ in what ncsnpp.py and adm.py pass in: resampling, scaling, embedding, where attention sits, and
the residual pyramid, which NCSN++ alone has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ict_fast.config import NetworkConfig
from ict_fast.networks.convolution import halving_weight
from ict_fast.networks.layers import (
    FirDownsample,
    FullPrecisionConv2d,
    Output,
    ResidualBlock,
    Seed,
    check_inputs,
    to_trunk,
    without_autocast,
)
from ict_fast.networks.tf32 import TrunkConv2d
from ict_kernels.philox import layer_seeds


class UNet(nn.Module):
    """The network F of a consistency model.

    Initial weights come from torch's global generator. `blocks()` are the units to compile one by one.

    Args:
        config: what both networks share.
        embedding: module (noise (N,), labels (N,) or None) -> (N, 4 * channels), in the dtype of its weights.
        input_width: channels after the input convolution.
        eps: of every norm.
        down, up: make the resamplers.
        project_skip, skip_scale: see ResidualBlock.
        pyramid: add downsampled convolutions of the image to the encoder, each made from the one before.
        attend_last: in the decoder, attention in a level's last block only (True) or in every block.
    """

    def __init__(
        self,
        config: NetworkConfig,
        embedding: nn.Module,
        *,
        input_width: int,
        eps: float,
        down: Callable[[], nn.Module],
        up: Callable[[], nn.Module],
        project_skip: bool,
        skip_scale: float,
        pyramid: bool,
        attend_last: bool,
    ) -> None:
        super().__init__()
        self.config = config

        def block(
            in_width: int,
            out_width: int,
            resolution: int,
            *,
            attention: bool = False,
            resample: nn.Module | None = None,
        ) -> ResidualBlock:
            dropped = not config.dropout_max_resolution or resolution <= config.dropout_max_resolution
            return ResidualBlock(
                in_width,
                out_width,
                embedding_channels=4 * config.channels,
                eps=eps,
                adaptive_norm=config.adaptive_norm,
                dropout=config.dropout if dropped else 0.0,
                resample=resample,
                project_skip=project_skip,
                skip_scale=skip_scale,
                attention=attention,
                head_channels=config.head_channels,
            )

        self.embedding = embedding
        self.input = FullPrecisionConv2d(config.image_channels, input_width, 3, padding=1)
        width, pyramid_width, skip_widths = input_width, config.image_channels, [input_width]

        self.encoder = nn.ModuleList()
        for level, multiplier in enumerate(config.channel_mult):
            resolution = config.resolution >> level
            attention = resolution in config.attention_resolutions
            down_block, pyramid_step = None, None
            if level > 0:
                down_block = block(width, width, resolution, resample=down())
                if pyramid:
                    pyramid_step = Pyramid(pyramid_width, width, reads_image=level == 1)
                    pyramid_width = width
                skip_widths.append(width)
            blocks = []
            for _ in range(config.num_blocks):
                in_width, width = width, config.channels * multiplier
                blocks.append(block(in_width, width, resolution, attention=attention))
                skip_widths.append(width)
            self.encoder.append(EncoderLevel(down_block, pyramid_step, blocks))

        self.middle = nn.ModuleList(
            [block(width, width, resolution, attention=True), block(width, width, resolution)]
        )

        # Kept in the order of the encoder, so that decoder.0 too is the finest level; run from the last.
        self.decoder = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(config.channel_mult))):
            resolution = config.resolution >> level
            attention = resolution in config.attention_resolutions
            up_block = None
            if level < len(config.channel_mult) - 1:
                up_block = block(width, width, resolution, resample=up())
            blocks = []
            for index in range(config.num_blocks + 1):
                attends = attention and (index == config.num_blocks or not attend_last)
                in_width, width = width + skip_widths.pop(), config.channels * multiplier
                blocks.append(block(in_width, width, resolution, attention=attends))
            self.decoder.insert(0, DecoderLevel(up_block, blocks))

        self.output = Output(width, config.image_channels, eps)
        self.block_count = sum(1 for _ in self.blocks())

    def blocks(self) -> Iterator[ResidualBlock]:
        """Every residual block, with its resampling and attention."""
        return (module for module in self.modules() if isinstance(module, ResidualBlock))

    def forward(
        self,
        x: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        *,
        dropout_seed: Seed = None,
        dropout_offset: int | Tensor = 0,
    ) -> Tensor:
        """The raw network output F(c_in x, c_noise).

        Args:
            x: (N, C, H, W), the scaled images c_in * x, fp32.
            noise: (N,) c_noise(sigma), fp32.
            labels: (N,) int64 classes, or None for an unconditional network.
            dropout_seed: None for no dropout, in train() as in eval(); else an int or an int64 tensor
                (run seed, step).
            dropout_offset: index of the first sample in the global batch.
        Returns:
            (N, C, H, W) in the dtype of the parameters, channels_last.
        Raises:
            InputError: for shapes that the network was not built for, or labels missing or not expected.
        """
        check_inputs(self.config, x, noise, labels)
        # Of the blocks, in the order in which they run. Not a number in each block: like blocks of different
        # numbers would be compiled one by one.
        seeds: Iterator[Seed] = itertools.repeat(None)
        if dropout_seed is not None:
            seeds = iter(layer_seeds(dropout_seed, self.block_count, x.device).unbind())
        with without_autocast(x):
            embedding = self.embedding(noise, labels)

        pyramid = x
        x = to_trunk(self.input(x))
        skips = [x]
        for level in self.encoder:
            x, pyramid = level(x, pyramid, skips, embedding, seeds, dropout_offset)
        for block in self.middle:
            x = block(x, embedding, next(seeds), dropout_offset)
        for level in reversed(self.decoder):
            x = level(x, skips, embedding, seeds, dropout_offset)
        return self.output(x).contiguous(memory_format=torch.channels_last)


class EncoderLevel(nn.Module):
    """One resolution on the way down; every activation joins the skips."""

    def __init__(
        self, down: ResidualBlock | None, pyramid: Pyramid | None, blocks: list[ResidualBlock]
    ) -> None:
        super().__init__()
        self.down = down
        self.pyramid = pyramid
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self,
        x_nchw: Tensor,
        pyramid: Tensor,
        skips: list[Tensor],
        embedding: Tensor,
        seeds: Iterator[Seed],
        dropout_offset: int | Tensor,
    ) -> tuple[Tensor, Tensor]:
        if self.down is not None:
            x_nchw = self.down(x_nchw, embedding, next(seeds), dropout_offset)
            if self.pyramid is not None:
                x_nchw = pyramid = self.pyramid(x_nchw, pyramid)
            skips.append(x_nchw)
        for block in self.blocks:
            x_nchw = block(x_nchw, embedding, next(seeds), dropout_offset)
            skips.append(x_nchw)
        return x_nchw, pyramid


class DecoderLevel(nn.Module):
    """One resolution on the way up; every block takes one of the skips."""

    def __init__(self, up: ResidualBlock | None, blocks: list[ResidualBlock]) -> None:
        super().__init__()
        self.up = up
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self,
        x_nchw: Tensor,
        skips: list[Tensor],
        embedding: Tensor,
        seeds: Iterator[Seed],
        dropout_offset: int | Tensor,
    ) -> Tensor:
        if self.up is not None:
            x_nchw = self.up(x_nchw, embedding, next(seeds), dropout_offset)
        for block in self.blocks:
            x_nchw = block(x_nchw, embedding, next(seeds), dropout_offset, skip_nchw=skips.pop())
        return x_nchw


class Pyramid(nn.Module):
    """One step of NCSN++'s residual pyramid: 3x3 convolution and FIR downsampling, added to the activations.

    The convolution computes a border of one pixel more than the image, which is what the filter reads there.
    A GPU computes both as one convolution of 6x6 with stride 2, which spares it what lies between.

    Args:
        in_channels, out_channels: width before and after.
        reads_image: compute in the dtype of the weights whatever autocast says.
    """

    def __init__(self, in_channels: int, out_channels: int, *, reads_image: bool) -> None:
        super().__init__()
        self.reads_image = reads_image
        # What reads the image is an end, whatever the trunk's arithmetic.
        kind = FullPrecisionConv2d if reads_image else TrunkConv2d
        self.conv = kind(in_channels, out_channels, 3, padding=2)
        self.down = FirDownsample(padding=0)

    def forward(self, x_nchw: Tensor, pyramid: Tensor) -> Tensor:
        pyramid = self._at_once(pyramid) if pyramid.is_cuda else self.down(self.conv(pyramid))
        return ((x_nchw + pyramid) * math.sqrt(0.5)).to(x_nchw.dtype)

    def _at_once(self, pyramid: Tensor) -> Tensor:
        with without_autocast(pyramid):
            weight = halving_weight(self.conv.weight)
        return self.conv.convolved(pyramid, weight, self.conv.bias, stride=2)
