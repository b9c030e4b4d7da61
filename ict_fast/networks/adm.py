"""ADM: the network of iCT on ImageNet 64x64.

Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis" (NeurIPS 2021): sinusoids of the noise
level, a learned vector per class, multi-head attention at several resolutions, up- and downsampling inside
residual blocks. With `adaptive_norm` the embedding scales and shifts each second norm, as published; without,
it is added, as iCT needs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ict_fast.config import NetworkConfig
from ict_fast.networks.layers import AverageDownsample, FourierFeatures, NearestUpsample, PositionalFeatures
from ict_fast.networks.unet import UNet


class ADM(UNet):
    """The network F of a consistency model, as ADM. See UNet for how it is called."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(
            config,
            ADMEmbedding(config),
            input_width=config.channels * config.channel_mult[0],
            eps=1e-5,
            down=AverageDownsample,
            up=NearestUpsample,
            project_skip=False,
            skip_scale=1.0,
            pyramid=False,
            attend_last=False,
        )
        self._initialise()

    def _initialise(self) -> None:
        """Uniform in +-1/sqrt(fan in), torch's default; what ends a branch, and the output, is zero."""
        _zero(self.output.conv)
        for block in self.blocks():
            _zero(block.conv1)
            if block.attention is not None:
                _zero(block.attention.projection)


class ADMEmbedding(nn.Module):
    """Noise level and class to (N, 4 * channels): features, two layers, plus the class's vector, SiLU."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = 4 * config.channels
        self.features: nn.Module
        if config.embedding == "fourier":
            self.features = FourierFeatures(config.channels, config.embedding_scale, sine_first=False)
        else:
            self.features = PositionalFeatures(config.channels, sine_first=False, endpoint=False)
        self.linear0 = nn.Linear(config.channels, width)
        self.linear1 = nn.Linear(width, width)
        # Rows from N(0, 1), torch's default and the published initialisation.
        self.label = nn.Embedding(config.num_classes, width) if config.num_classes else None

    def forward(self, noise_n: Tensor, labels_n: Tensor | None) -> Tensor:
        hidden = self.linear1(F.silu(self.linear0(self.features(noise_n))))
        if self.label is not None:
            hidden = hidden + self.label(labels_n)
        return F.silu(hidden)


def _zero(layer: nn.Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
