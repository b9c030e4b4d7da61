"""How long a host takes to launch a micro-batch's kernels: below that no GPU, however fast, brings a step."""

from __future__ import annotations

from torch import nn

from ict_fast.networks.layers import ResidualBlock

# The solution of two measurements: 60 ms for CIFAR-10's network (33 residual blocks, 6 with attention) and 90
# for ADM-64's (36, 22), on one CPU core with a stand-in for the driver, which launches nothing. No file of
# benchmarks/results keeps them.
_SECONDS_PER_BLOCK = 1.529e-3
_SECONDS_PER_ATTENTION = 1.588e-3


def launch_seconds(network: nn.Module) -> float:
    """Seconds that the kernels of one micro-batch take to launch, in steps that are no CUDA graph.

    An estimate that grows with the residual blocks and their attention; how many images there are does not
    matter.
    """
    blocks = [layer for layer in network.modules() if isinstance(layer, ResidualBlock)]
    attentions = sum(block.attention is not None for block in blocks)
    return _SECONDS_PER_BLOCK * len(blocks) + _SECONDS_PER_ATTENTION * attentions
