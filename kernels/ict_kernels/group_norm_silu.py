"""Group norm with what stands around it: a bias before, scale and shift, SiLU and dropout after.

    y = dropout(silu(((x + pre_bias) normalised by group * weight + bias) * (1 + scale) + shift))

Statistics and everything between are fp32 for fp16, bf16 and fp32 inputs (float64 for float64); the output
has the input's dtype and memory layout. Dropout's mask is a function of (seed, step, sample, element, layer),
see philox.py: no generator state, no stored mask needed, and student and teacher share one by sharing the
seed.

Group norm: Wu & He, "Group Normalization", ECCV 2018. SiLU: x sigmoid(x).

Bytes per bf16 element, at least: 4 forward, 6 backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .philox import Seed, dropout_keep_mask, dropout_threshold

# --------------------------------------------------------------------------------------- the eager definition


def _definition(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    pre_bias: Tensor | None,
    activation: str | None,
    dropout: float,
    seed: Seed,
    offset: int | Tensor,
    layer: int,
) -> Tensor:
    def wide(t: Tensor) -> Tensor:
        return t.to(torch.float64 if x.dtype == torch.float64 else torch.float32)

    def per_channel(t: Tensor) -> Tensor:  # (C,) or (N, C), to broadcast against (N, C, *spatial)
        return wide(t).reshape(*t.shape, *[1] * (x.dim() - 2))

    y = wide(x)
    if pre_bias is not None:
        y = y + per_channel(pre_bias)
    if y.device.type == "cpu" and torch.is_grad_enabled() and not y.requires_grad:
        # torch 2.13's backward crashes (segmentation fault) on a channels-last input that needs no gradient.
        y = y.contiguous()
    # Not F.group_norm, which refuses a single value per group; its normalised value is 0.
    y = torch.group_norm(
        y, num_groups, None if weight is None else wide(weight), None if bias is None else wide(bias), eps
    )
    if scale is not None:
        y = y * (1.0 + per_channel(scale))
    if shift is not None:
        y = y + per_channel(shift)
    if activation == "silu":
        y = F.silu(y)
    if dropout > 0.0:
        keep = dropout_keep_mask(x, dropout, seed, offset, layer)
        # Through uint8: bool -> fp32 takes 84 us where uint8 takes 11 (147,456 elements, one core).
        y = y * (wide(keep.view(torch.uint8)) * (1.0 / (1.0 - dropout_threshold(dropout) / 65536)))
    return y.to(x.dtype)


# -------------------------------------------------------------------------------------------- public function


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    pre_bias: Tensor | None = None,
    activation: str | None = "silu",
    dropout: float = 0.0,
    seed: Seed = None,
    offset: int | Tensor = 0,
    layer: int = 0,
) -> Tensor:
    """Group norm, then scale and shift, SiLU and dropout, as one op.

    Args:
        x: (N, C, *spatial), fp16, bf16, fp32 or float64; its memory layout is kept.
        num_groups: divides C.
        weight, bias: (C,) or None for 1 and 0, as in torch.nn.functional.group_norm.
        eps: added to the variance.
        scale, shift: (N, C); y (1 + scale) + shift after the norm (adaptive group norm).
        pre_bias: (C,) or (N, C), added to x before the norm: a convolution's bias, or an embedding.
        activation: "silu" or None.
        dropout: probability p of dropping an element, rounded to round(65536 p) / 65536; 0 draws nothing.
        seed: an int, an int64 tensor (run seed, step), or None: drawn from torch's generator. Not read if
            dropout is 0.
        offset: number of x's first sample in the global batch.
        layer: number of this norm in the network, so that no two layers share a mask.
    Returns:
        The shape, dtype and memory layout of x.
    Raises:
        ValueError: for arguments whose shapes do not fit x, an unknown activation, or dropout outside [0, 1).
    """
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating point (N, C, ...), got {x.dtype} of shape {tuple(x.shape)}")
    count, channels = x.shape[:2]
    if num_groups < 1 or channels % num_groups != 0:
        raise ValueError(f"num_groups must divide the {channels} channels of x, got {num_groups}")
    for name, value, shapes in (
        ("weight", weight, ((channels,),)),
        ("bias", bias, ((channels,),)),
        ("scale", scale, ((count, channels),)),
        ("shift", shift, ((count, channels),)),
        ("pre_bias", pre_bias, ((channels,), (count, channels))),
    ):
        if value is not None and tuple(value.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(
                f"{name} must have shape {expected} for x {tuple(x.shape)}, got {tuple(value.shape)}"
            )
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    dropout_threshold(dropout)
    y = _definition(
        x, num_groups, weight, bias, eps, scale, shift, pre_bias, activation, dropout, seed, offset, layer
    )
    return _with_layout_of(x, y)


def _with_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """y in x's memory format; free where the definition already kept it."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return y.contiguous(memory_format=torch.channels_last)
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return y.contiguous(memory_format=torch.channels_last_3d)
    return y.contiguous()


class GroupNormSiLU(nn.Module):
    """`group_norm_silu` with its parameters; the state dict is that of torch.nn.GroupNorm.

    Randomness is an argument: dropout is applied if and only if forward gets a seed. There is no train or
    eval mode to forget, and `module.training` is not read.

    Args:
        num_groups, num_channels, eps, affine: as in torch.nn.GroupNorm.
        activation: "silu" or None.
        dropout: probability, in force when a seed is passed.
        layer: number of this norm in the network; see `group_norm_silu`.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        activation: str | None = "silu",
        dropout: float = 0.0,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_groups < 1 or num_channels % num_groups != 0:
            raise ValueError(f"num_groups must divide num_channels, got {num_groups} and {num_channels}")
        dropout_threshold(dropout)
        self.num_groups, self.num_channels, self.eps = num_groups, num_channels, eps
        self.activation, self.dropout, self.layer = activation, dropout, layer
        self.weight: nn.Parameter | None
        self.bias: nn.Parameter | None
        if affine:
            self.weight = nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.zeros(num_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)

    def forward(
        self,
        x: Tensor,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        pre_bias: Tensor | None = None,
        seed: Seed = None,
        offset: int | Tensor = 0,
    ) -> Tensor:
        """See `group_norm_silu`; without a seed there is no dropout."""
        return group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            eps=self.eps,
            scale=scale,
            shift=shift,
            pre_bias=pre_bias,
            activation=self.activation,
            dropout=0.0 if seed is None else self.dropout,
            seed=seed,
            offset=offset,
            layer=self.layer,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.weight is not None}, "
            f"activation={self.activation}, dropout={self.dropout}, layer={self.layer}"
        )
