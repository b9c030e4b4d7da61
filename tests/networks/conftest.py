"""Small networks of both kinds, with every feature switched on and no weight at zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ict_fast.config import NetworkConfig
from ict_fast.networks import UNet, build_network

SMALL = {
    "ncsnpp": NetworkConfig(
        name="ncsnpp",
        resolution=8,
        image_channels=3,
        channels=8,
        channel_mult=(1, 2, 2),
        num_blocks=1,
        attention_resolutions=(4,),
        embedding="fourier",
        embedding_scale=0.5,
    ),
    "adm": NetworkConfig(
        name="adm",
        resolution=8,
        image_channels=3,
        num_classes=5,
        channels=8,
        channel_mult=(1, 2, 3),
        num_blocks=1,
        attention_resolutions=(4, 2),
        head_channels=4,
        embedding="positional",
        adaptive_norm=True,
    ),
}


@pytest.fixture(params=sorted(SMALL))
def small_config(request: pytest.FixtureRequest) -> NetworkConfig:
    return SMALL[request.param]


@pytest.fixture
def small_configs() -> dict[str, NetworkConfig]:
    return SMALL


@pytest.fixture
def make_network() -> Callable[[NetworkConfig], UNet]:
    """Builds a network whose every parameter is random: the published initialisations start branches at 0."""

    def make(config: NetworkConfig) -> UNet:
        torch.manual_seed(0)
        network = build_network(config)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "norm" in name or parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
                else:
                    fan_in = parameter[0].numel()
                    parameter.copy_(torch.randn_like(parameter) / fan_in**0.5)
        return network

    return make


@pytest.fixture
def make_inputs() -> Callable[[NetworkConfig, int], tuple[Tensor, Tensor, Tensor | None]]:
    """Random images, noise and labels for a network."""

    def make(config: NetworkConfig, count: int = 3) -> tuple[Tensor, Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(1)
        shape = (count, config.image_channels, config.resolution, config.resolution)
        images = torch.randn(shape, generator=generator)
        noise = torch.randn(count, generator=generator)
        labels = (
            torch.randint(config.num_classes, (count,), generator=generator) if config.num_classes else None
        )
        return images, noise, labels

    return make
