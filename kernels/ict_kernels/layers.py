"""Layers for Hugging Face's `kernelize`, which puts their forward pass into layers of the same name.

A layer there has no state and no constructor: what it reads, the layer that it is put into must have.
"""

from torch import Tensor, nn

from .group_norm_silu import group_norm_silu


class GroupNormSiLU(nn.Module):
    """silu(group_norm(x)) for a layer with torch.nn.GroupNorm's attributes."""

    has_backward = True
    can_torch_compile = True
    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, eps=self.eps)


class GroupNorm(nn.Module):
    """group_norm(x) for torch.nn.GroupNorm; statistics in fp32, channels_last kept."""

    has_backward = True
    can_torch_compile = True
    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, eps=self.eps, activation=None)
