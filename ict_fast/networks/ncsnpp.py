"""NCSN++, the network of iCT on CIFAR-10, and DDPM++, its plainer sister, the network of ECT there.

Song et al., "Score-Based Generative Modeling through SDEs" (ICLR 2021), as configured by Karras et al.,
"EDM" (NeurIPS 2022): Fourier features of the noise, FIR resampling, a residual pyramid of the image beside
the encoder, residual sums divided by sqrt 2, attention with one head. DDPM++ has neither the filter nor the
pyramid: it averages and repeats pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ict_fast.config import NetworkConfig
from ict_fast.networks.layers import (
    AverageDownsample,
    FirDownsample,
    FirUpsample,
    FourierFeatures,
    NearestUpsample,
    PositionalFeatures,
)
from ict_fast.networks.unet import UNet


class NCSNPP(UNet):
    """The network F of a consistency model, as NCSN++ or DDPM++. See UNet for how it is called."""

    def __init__(self, config: NetworkConfig) -> None:
        filtered = config.name == "ncsnpp"
        super().__init__(
            config,
            NCSNPPEmbedding(config),
            input_width=config.channels,
            eps=1e-6,
            down=FirDownsample if filtered else AverageDownsample,
            up=FirUpsample if filtered else NearestUpsample,
            project_skip=True,
            skip_scale=math.sqrt(0.5),
            pyramid=filtered,
            attend_last=True,
        )
        self._initialise()

    def _initialise(self) -> None:
        """Glorot's uniform weights, zero biases; what ends a branch, and the output, starts near zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                _glorot(module, gain=1.0)
        _glorot(self.output.conv, gain=1e-5)
        for block in self.blocks():
            _glorot(block.conv1, gain=1e-5)
            if block.attention is not None:
                _glorot(block.attention.qkv, gain=math.sqrt(0.2))
                _glorot(block.attention.projection, gain=1e-5)


class NCSNPPEmbedding(nn.Module):
    """Noise level and class to (N, 4 * channels): features, plus the class's, through two layers with SiLU.

    2 * channels random Fourier features, or `channels` fixed ones (the sinusoids of DDPM++).
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.num_classes = config.num_classes
        width = 4 * config.channels
        self.features: nn.Module
        if config.embedding == "fourier":
            count = 2 * config.channels
            self.features = FourierFeatures(count, config.embedding_scale, sine_first=True)
        else:
            count = config.channels
            self.features = PositionalFeatures(count, sine_first=True, endpoint=True)
        self.label = nn.Linear(config.num_classes, count) if config.num_classes else None
        self.linear0 = nn.Linear(count, width)
        self.linear1 = nn.Linear(width, width)

    def forward(self, noise_n: Tensor, labels_n: Tensor | None) -> Tensor:
        hidden = self.features(noise_n)
        if self.label is not None:
            assert labels_n is not None
            # Scaled so that the inputs of this layer have unit variance.
            # F.one_hot would read the labels on the host to check them.
            one_hot = labels_n[:, None] == torch.arange(self.num_classes, device=labels_n.device)
            hidden = hidden + self.label(one_hot.to(hidden.dtype) * math.sqrt(self.num_classes))
        return F.silu(self.linear1(F.silu(self.linear0(hidden))))


def _glorot(layer: nn.Conv2d | nn.Linear, gain: float) -> None:
    nn.init.xavier_uniform_(layer.weight, gain=gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
