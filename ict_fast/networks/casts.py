"""The trunk's weights in the dtype of its activations, cast once a step instead of wherever one is used.

Under autocast a convolution casts its weight in every forward pass, in compiled code again in the backward
pass: thrice for student and teacher, by a launch each, hundreds of the few thousand of a step. Here all
are cast together, when the weights have changed. What is computed is the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ict_fast.networks.tf32 import TrunkConv2d


class TrunkCasts:
    """Casts of the weights of the trunk's convolutions, which use them for activations of that dtype.

    Of the biases those of 1 x 1: these are operands of a product on a GPU. Compiled code adds others in fp32,
    which costs no launch and rounds once less.

    Args:
        networks: whose convolutions get casts; what casts they had, they lose.
        dtype: of the casts; None for none.
    """

    def __init__(self, networks: Iterable[nn.Module], dtype: torch.dtype | None) -> None:
        self._parameters: list[Tensor] = []
        self._casts: list[Tensor] = []
        for network in networks:
            for module in network.modules():
                if isinstance(module, TrunkConv2d):
                    is_product = module.kernel_size == (1, 1)
                    module.cast_weight = self._cast_of(module.weight, dtype)
                    module.cast_bias = self._cast_of(module.bias if is_product else None, dtype)

    def _cast_of(self, parameter: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
        if parameter is None or dtype is None:
            return None
        self._parameters.append(parameter.detach())
        self._casts.append(torch.full_like(self._parameters[-1], torch.nan, dtype=dtype))
        return self._casts[-1]

    def refresh(self) -> None:
        """Casts the weights as they are now: to be called whenever they have changed. Casts begin as NaN."""
        if self._casts:
            torch._foreach_copy_(self._casts, self._parameters)
