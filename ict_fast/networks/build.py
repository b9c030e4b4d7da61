"""From a configuration to a network, refusing what no network can be built from."""

from __future__ import annotations

import torch

from ict_fast.config import Config, NetworkConfig, validate
from ict_fast.errors import InputError, did_you_mean
from ict_fast.networks.adm import ADM
from ict_fast.networks.ncsnpp import NCSNPP
from ict_fast.networks.unet import UNet

NETWORKS: dict[str, type[NCSNPP] | type[ADM]] = {"ncsnpp": NCSNPP, "ddpmpp": NCSNPP, "adm": ADM}
EMBEDDINGS = ("fourier", "positional")


def build_network(config: NetworkConfig) -> UNet:
    """The network of a configuration, with fresh weights from torch's global generator, in channels_last.

    Raises:
        InputError: if the network cannot take the resolution, a width, the heads or the name.
    """
    if config.name not in NETWORKS:
        raise InputError(f'--network.name is "{config.name}"{did_you_mean(config.name, NETWORKS)}')
    if config.embedding not in EMBEDDINGS:
        raise InputError(
            f'--network.embedding is "{config.embedding}"{did_you_mean(config.embedding, EMBEDDINGS)}'
        )
    if config.channels % 2:
        raise InputError(
            f"--network.channels is {config.channels}; it must be even: half of the features are cosines"
        )
    validate(Config(network=config))
    network = NETWORKS[config.name](config)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network
