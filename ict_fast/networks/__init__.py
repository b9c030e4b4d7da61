"""The networks F: NCSN++ and ADM."""

from ict_fast.networks.build import build_network
from ict_fast.networks.unet import UNet

__all__ = ["UNet", "build_network"]
