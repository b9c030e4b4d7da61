# mypy: disable-error-code="no-untyped-def"
"""Group norm with what stands around it: a bias before, scale and shift, SiLU and dropout after.

    y = dropout(silu(((x + pre_bias) normalised by group * weight + bias) * (1 + scale) + shift))

Statistics and everything between are fp32 for fp16, bf16 and fp32 inputs (float64 for float64); the output
has the input's dtype and memory layout. Dropout's mask is a function of (seed, step, sample, element, layer),
see philox.py: no generator state, no stored mask (the backward pass draws it again), and student and teacher
share one by sharing the seed.

Group norm: Wu & He, "Group Normalization", ECCV 2018. SiLU: x sigmoid(x).

Bytes per bf16 element, at least: 4 forward, 6 backward. Two algorithms, chosen by `plan_of`:

- resident: a program holds every pixel of a bundle of neighbouring groups in registers, and reads its input
  once: 4 and 6 bytes. Forward it holds large tiles, and those with dropout, in the input's 16 bits.
- split: a kernel writes partial statistics per block of pixels and channel, a small one merges them, a third
  reads the input again: 6 and 10 bytes. Where L2 is large beside the memory's rate, samples are taken in
  chunks that fit there (`chunk_bytes_of`), and 2 and 4 of the bytes come from it.

On an H200 split reached 84 to 97 % of a copy of its bytes, 78 % with a gradient of pre_bias
(benchmarks/RESULTS.md), and resident forward 79 % at 32 x 32 and 71 with dropout; backward with dropout 31 to
50 %, where instructions and memory take turns. See results/analysis.md, which has shapes further from a copy.

The kernels work on channels_last; other layouts are converted on the way in and back on the way out. No sum
is taken in an order that depends on timing: equal inputs give equal bits.
"""

import math
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import apex_backend
from ._ops import add_op_namespace_prefix
from .backend import get_backend, use_triton
from .group_norm_plan import Plan, chunk_bytes_of, plan_of, power_of_2
from .group_norm_resident import resident_backward, resident_forward
from .group_norm_split import (
    merge_backward,
    merge_statistics,
    split_apply,
    split_backward,
    split_statistics,
    sum_samples,
)
from .philox import (
    DROPOUT,
    Seed,
    _stream,
    dropout_keep_mask,
    dropout_threshold,
    offset_arguments,
    seed_tensor,
)
from .triton_support import (
    is_transformed,
    launch,
    refuse_forward_ad,
    what_is_compiled_for,
)

if TYPE_CHECKING:
    from .replacement import Replacement

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
        y,
        num_groups,
        None if weight is None else wide(weight),
        None if weight is None or bias is None else wide(bias),
        eps,
    )
    if weight is None and bias is not None:  # alone, torch 2.13's backward on a CPU fails on it
        y = y + per_channel(bias)
    if scale is not None:
        y = y * (1.0 + per_channel(scale))
    if shift is not None:
        y = y + per_channel(shift)
    if activation == "silu":
        y = F.silu(y)
    if dropout > 0.0:
        keep = dropout_keep_mask(x, dropout, seed, offset, layer)
        # Through uint8: bool -> fp32 takes 84 us where uint8 takes 11 (147,456 elements, one core). A copy,
        # since torch 2.11 does not compile a view of bool.
        y = y * (wide(keep.to(torch.uint8)) * (1.0 / (1.0 - dropout_threshold(dropout) / 65536)))
    return y.to(x.dtype)


# ------------------------------------------------------------------------------------------------- launchers


def _row_stride(values: Tensor | None) -> int:
    """Elements between samples; 0 for (C,)."""
    return values.stride(0) if values is not None and values.dim() == 2 else 0


def _unit_stride(values: Tensor | None) -> Tensor | None:
    """Its rows may lie apart, as halves of a chunked embedding do; its channels may not."""
    return values if values is None or values.stride(-1) == 1 else values.contiguous()


def _tile_arguments(plan: Plan, channels: int, pixels: int, num_groups: int) -> dict[str, Any]:
    group = channels // num_groups
    if plan.resident:
        return {
            "PIXELS": pixels,
            "CHANNELS": channels,
            "GROUP": group,
            "BUNDLE": plan.groups * group,
            "ROWS": plan.rows,
            "WIDTH0": plan.widths[0],
            "WIDTH1": plan.widths[1],
            "GROUPS": power_of_2(plan.groups),
        }
    full = pixels % plan.rows == 0 and channels % plan.widths[0] == 0
    return {
        "pixels": pixels,
        "CHANNELS": channels,
        "GROUP": group,
        "ROWS": plan.rows,
        "WIDTH": plan.widths[0],
        "FULL": full,
    }


def _like(
    tensors: tuple[Tensor | None, ...], numbers: tuple[int, ...], plan: Plan, *others: Hashable
) -> tuple[Hashable, ...] | None:
    """`launch`'s argument: what the tensors of an op, x first, and the others say about all its launches."""
    compiled_for = what_is_compiled_for(tensors, numbers)
    if compiled_for is None:
        return None
    x = tensors[0]
    assert x is not None
    return (x.shape, x.device, plan, compiled_for, tuple(map(_row_stride, tensors[1:])), *others)


def _forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    pre_bias: Tensor | None,
    seed: Tensor | None,
    offset_tensor: Tensor | None,
    offset: int,
    stream: int,
    threshold: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """y and (N, num_groups, 2) fp32 mean and rstd."""
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias, scale, shift, pre_bias = map(_unit_stride, (weight, bias, scale, shift, pre_bias))
    count, channels, height, width = x.shape
    pixels = height * width
    y = torch.empty_like(x, memory_format=torch.channels_last)
    stats = torch.empty(count, num_groups, 2, dtype=torch.float32, device=x.device)
    dropout, chunk_bytes = threshold > 0, chunk_bytes_of(x.device)
    plan = plan_of(count, channels, pixels, num_groups, x.element_size(), False, dropout, chunk_bytes)
    tensors = (x, weight, bias, scale, shift, pre_bias, seed, offset_tensor)
    like = _like(tensors, (offset, stream), plan, num_groups, silu, dropout)
    elements = plan.rows * sum(plan.widths)
    tile = _tile_arguments(plan, channels, pixels, num_groups)
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "y_ptr": y,
        "stats_ptr": stats,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "scale_ptr": scale,
        "shift_ptr": shift,
        "pre_ptr": pre_bias,
        "seed_ptr": seed,
        "offset_ptr": offset_tensor,
        "scale_stride": _row_stride(scale),
        "shift_stride": _row_stride(shift),
        "pre_stride": _row_stride(pre_bias),
        "offset": offset,
        "philox_stream": stream,
        "threshold": threshold,
        **tile,
        "SILU": silu,
        "DROP": threshold > 0,
    }
    if plan.resident:
        programs = count * (num_groups // plan.groups)
        arguments |= {"SLICES0": plan.slices[0], "SLICES1": plan.slices[1]}
        launch(
            resident_forward,
            (programs,),
            num_warps=plan.num_warps,
            maxnreg=plan.maxnreg,
            elements=elements,
            like=like,
            eps=eps,
            **arguments,
        )
        return y, stats
    blocks, pieces = -(-pixels // plan.rows), -(-channels // plan.widths[0])
    partial = torch.empty(2, plan.chunk, blocks, channels, dtype=torch.float32, device=x.device)
    rest = torch.empty(plan.chunk, num_groups, dtype=torch.float32, device=x.device)
    over_tiles: dict[str, Any] = {
        "num_warps": plan.num_warps,
        "maxnreg": plan.maxnreg,
        "elements": elements,
        "like": like,
    }
    to_x, to_means = (pre_bias, None) if x.dtype == torch.float32 else (None, pre_bias)  # see `biased`
    statistics: dict[str, Any] = {
        "x_ptr": x,
        "mean_ptr": partial[0],
        "squares_ptr": partial[1],
        "pre_ptr": to_x,
        "pre_stride": _row_stride(pre_bias),
        **{name: value for name, value in tile.items() if name != "GROUP"},
        **over_tiles,
    }
    merge: dict[str, Any] = {
        "num_warps": 2,
        "maxnreg": 64,  # else ptxas aims for 32, and spills for it
        "like": like,
        "mean_ptr": partial[0],
        "squares_ptr": partial[1],
        "pre_ptr": to_means,
        "stats_ptr": stats,
        "rest_ptr": rest,
        "pre_stride": _row_stride(pre_bias),
        "pixels": pixels,
        "eps": eps,
        "CHANNELS": channels,
        "GROUP": channels // num_groups,
        "ROWS": plan.rows,
        "BLOCK": min(1024, power_of_2(blocks * (channels // num_groups))),
    }
    for start in range(0, count, plan.chunk):
        samples = min(plan.chunk, count - start)
        launch(split_statistics, (blocks * pieces, samples), start=start, **statistics)
        launch(merge_statistics, (num_groups, samples), start=start, **merge)
        launch(split_apply, (blocks * pieces, samples), start=start, rest_ptr=rest, **arguments, **over_tiles)
    return y, stats


def _backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    pre_bias: Tensor | None,
    seed: Tensor | None,
    offset_tensor: Tensor | None,
    offset: int,
    stream: int,
    threshold: int,
    silu: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and, as far as wanted, of weight, bias, scale, shift, pre_bias; others are empty."""
    x = x.contiguous(memory_format=torch.channels_last)
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx, *gradients = _empty_gradients(x, (weight, bias, scale, shift, pre_bias), wanted)
    weight, bias, scale, shift, pre_bias = map(_unit_stride, (weight, bias, scale, shift, pre_bias))
    count, channels, height, width = x.shape
    pixels = height * width

    # One row per sample: what is (C,) in the end is summed over the samples by a kernel of its own.
    rows: list[Tensor | None] = [each if want else None for each, want in zip(gradients, wanted, strict=True)]
    over_samples = [i for i, each in enumerate(rows) if each is not None and each.dim() == 1]
    if over_samples:
        sums = torch.empty(len(over_samples), count, channels, dtype=torch.float32, device=x.device)
        for i, each in zip(over_samples, sums.unbind(), strict=True):
            rows[i] = each

    dropout, chunk_bytes = threshold > 0, chunk_bytes_of(x.device)
    plan = plan_of(count, channels, pixels, num_groups, x.element_size(), True, dropout, chunk_bytes)
    parameters = (weight, bias, scale, shift, pre_bias)
    kinds = tuple(wanted), tuple([0 if each is None else each.dim() for each in parameters])
    tensors = (x, dy, stats, *parameters, seed, offset_tensor)
    like = _like(tensors, (offset, stream), plan, num_groups, silu, dropout, *kinds)
    elements = plan.rows * sum(plan.widths)
    tile = _tile_arguments(plan, channels, pixels, num_groups)
    outputs: dict[str, Any] = {
        f"{name}_ptr": row
        for name, row in zip(("dweight", "dbias", "dscale", "dshift", "dpre"), rows, strict=True)
    }
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "dy_ptr": dy,
        "stats_ptr": stats,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "scale_ptr": scale,
        "shift_ptr": shift,
        "pre_ptr": pre_bias,
        "seed_ptr": seed,
        "offset_ptr": offset_tensor,
        "scale_stride": _row_stride(scale),
        "shift_stride": _row_stride(shift),
        "pre_stride": _row_stride(pre_bias),
        "offset": offset,
        "philox_stream": stream,
        "threshold": threshold,
        **tile,
        "SILU": silu,
        "DROP": threshold > 0,
    }
    if plan.resident:
        programs = count * (num_groups // plan.groups)
        launch(
            resident_backward,
            (programs,),
            num_warps=plan.num_warps,
            maxnreg=plan.maxnreg,
            elements=elements,
            like=like,
            dx_ptr=dx,
            **outputs,
            **arguments,
        )
    else:
        blocks, pieces = -(-pixels // plan.rows), -(-channels // plan.widths[0])
        group = channels // num_groups
        partial = torch.empty(3, plan.chunk, blocks, channels, dtype=torch.float32, device=x.device)
        s1, s2, sx = partial.unbind()
        means = torch.empty(plan.chunk, num_groups, 2, dtype=torch.float32, device=x.device)
        merged: dict[str, Any] = {
            "s1_ptr": s1,
            "s2_ptr": s2,
            "sx_ptr": None if rows[4] is None else sx,
            "means_ptr": means,
        }
        over_tiles: dict[str, Any] = {
            "num_warps": plan.num_warps,
            "maxnreg": plan.maxnreg,
            "elements": elements,
            **merged,
            **arguments,
        }
        merge: dict[str, Any] = {
            "num_warps": 4,
            "maxnreg": 128,  # left to itself, ptxas takes 32 in one case for sm_80, and spills
            "like": like,
            "stats_ptr": stats,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "scale_ptr": scale,
            "scale_stride": _row_stride(scale),
            "pixels": pixels,
            "CHANNELS": channels,
            "GROUP": group,
            "ROWS": plan.rows,
            "BLOCKS": min(32, power_of_2(blocks)),
            "WIDTH": min(64, power_of_2(group)),
            **merged,
            **outputs,
        }
        # The same kernel with and without dx is compiled twice.
        like_sums, like_apply = like and (*like, "sums"), like and (*like, "apply")
        for start in range(0, count, plan.chunk):
            samples = min(plan.chunk, count - start)
            grid = blocks * pieces, samples
            launch(split_backward, grid, start=start, like=like_sums, dx_ptr=None, **over_tiles)
            launch(merge_backward, (num_groups, samples), start=start, **merge)
            launch(split_backward, grid, start=start, like=like_apply, dx_ptr=dx, **over_tiles)
    if over_samples:
        targets = [gradients[i] for i in over_samples]
        launch(
            sum_samples,
            (-(-channels // 8), len(targets)),
            like=like,
            from_ptr=sums,
            to0_ptr=targets[0],
            to1_ptr=targets[1] if len(targets) > 1 else None,
            to2_ptr=targets[2] if len(targets) > 2 else None,
            rows=count,
            CHANNELS=channels,
            ROWS=min(512, power_of_2(count)),
            WIDTH=8,
        )
    return (dx, *gradients)  # type: ignore[return-value]


def _empty_gradients(x: Tensor, parameters: tuple[Tensor | None, ...], wanted: list[bool]) -> list[Tensor]:
    """Of x and the parameters; (0,) for what is not wanted, as an op cannot return None."""
    gradients = [torch.empty_like(x, memory_format=torch.channels_last)]
    for parameter, want in zip(parameters, wanted, strict=True):
        if parameter is None or not want:
            gradients.append(torch.empty(0, dtype=torch.float32, device=x.device))
        else:
            gradients.append(torch.empty(parameter.shape, dtype=parameter.dtype, device=x.device))
    return gradients


# ---------------------------------------------------------------------------------------------- registration

_forward_op = torch.library.custom_op(add_op_namespace_prefix("group_norm_silu"), _forward, mutates_args=())
_backward_op = torch.library.custom_op(
    add_op_namespace_prefix("group_norm_silu_backward"), _backward, mutates_args=()
)


@_forward_op.register_fake
def _(x, num_groups, *others):
    stats = torch.empty(x.shape[0], num_groups, 2, dtype=torch.float32, device=x.device)
    return torch.empty_like(x, memory_format=torch.channels_last), stats


@_backward_op.register_fake
def _(dy, x, stats, num_groups, weight, bias, scale, shift, pre_bias, *others):
    return tuple(_empty_gradients(x, (weight, bias, scale, shift, pre_bias), others[-1]))


def _save_for_backward(ctx, inputs, output) -> None:
    x, num_groups, weight, bias, scale, shift, pre_bias, seed, offset_tensor, *numbers = inputs
    ctx.save_for_backward(x, output[1], weight, bias, scale, shift, pre_bias, seed, offset_tensor)
    offset, stream, threshold, _eps, silu = numbers
    ctx.num_groups, ctx.numbers = num_groups, (offset, stream, threshold, silu)
    ctx.set_materialize_grads(False)


def _backward_of_forward(ctx, dy, _dstats):
    if dy is None:
        return (None,) * 14
    x, stats, *tensors = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [needs[i] for i in range(2, 7)]
    gradients = _backward_op(dy, x, stats, ctx.num_groups, *tensors, *ctx.numbers, wanted)
    dx, *others = gradients
    return (
        dx if needs[0] else None,
        None,
        *(each if want else None for each, want in zip(others, wanted, strict=True)),
        *(None,) * 7,
    )


_forward_op.register_autograd(_backward_of_forward, setup_context=_save_for_backward)


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
        ValueError: for arguments whose shapes do not fit x, an unknown activation, dropout outside [0, 1), or
            a negative eps.
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
        # Of one length alone: Python compares others by their first numbers, for torch.export a constraint.
        if value is not None and tuple(value.shape) not in [s for s in shapes if len(s) == value.dim()]:
            expected = " or ".join(map(str, shapes))
            raise ValueError(
                f"{name} must have shape {expected} for x {tuple(x.shape)}, got {tuple(value.shape)}"
            )
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    if not 0.0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0 and finite, got {eps}")
    threshold = dropout_threshold(dropout)
    if get_backend() == "apex" and not is_transformed():
        refuse_forward_ad("group_norm_silu", x, weight, bias)
        extras = {"scale": scale, "shift": shift, "pre_bias": pre_bias, "dropout": threshold or None}
        reason = apex_backend.why_not(
            x, num_groups, weight, bias, {name: given is not None for name, given in extras.items()}
        )
        apex_backend.note(x, num_groups, reason)
        if reason is None:
            assert weight is not None
            assert bias is not None
            return apex_backend.group_norm(x, num_groups, weight, bias, eps, activation)
    if not use_triton(x, weight, bias, scale, shift, pre_bias) or x.numel() == 0:
        y = _definition(
            x, num_groups, weight, bias, eps, scale, shift, pre_bias, activation, dropout, seed, offset, layer
        )
        return _with_layout_of(x, y)
    refuse_forward_ad("group_norm_silu", x, weight, bias, scale, shift, pre_bias)
    offset_tensor, offset_int, stream = None, 0, 0
    if threshold > 0:
        seed, stream = seed_tensor(seed, x.device), _stream(DROPOUT, layer)
        offset_tensor, offset_int = offset_arguments(offset, x.device)
    else:
        seed = None
    y, _ = _forward_op(
        _as_channels_last(x),
        num_groups,
        weight,
        bias,
        scale,
        shift,
        pre_bias,
        seed,
        offset_tensor,
        offset_int,
        stream,
        threshold,
        eps,
        activation == "silu",
    )
    return _with_layout_of(x, y.view(x.shape) if x.dim() <= 4 else y.unflatten(3, x.shape[3:]))


def _as_channels_last(x: Tensor) -> Tensor:
    """(N, C, *spatial) as the ops take it: four dimensions, channels last in memory."""
    if x.dim() > 4:
        x = x.flatten(3)
    return x[(...,) + (None,) * (4 - x.dim())].contiguous(memory_format=torch.channels_last)


def _with_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """y in the memory format that x's strides are of; free where the definition or the kernel has kept it."""
    # torch.func.vmap knows no formats.
    if is_transformed():
        return y
    # By strides: some channels of a channels-last tensor have its order, but gaps between pixels.
    if x.dim() in (4, 5) and not x.is_contiguous() and 0 < x.stride(1) < x.stride(-1):
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        return y.contiguous(memory_format=last)
    return y.contiguous()


class GroupNormSiLU(nn.Module):
    """`group_norm_silu` with its parameters; the state dict is that of torch.nn.GroupNorm.

    Randomness is an argument: dropout is applied if and only if forward gets a seed. There is no train or
    eval mode to forget, and `module.training` is not read.

    Args:
        num_groups, num_channels, eps, affine, bias: as in torch.nn.GroupNorm.
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
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if num_groups < 1 or num_channels % num_groups != 0:
            raise ValueError(f"num_groups must divide num_channels, got {num_groups} and {num_channels}")
        dropout_threshold(dropout)
        self.num_groups, self.num_channels, self.eps = num_groups, num_channels, eps
        self.activation, self.dropout, self.layer = activation, dropout, layer
        self.weight: nn.Parameter | None
        self.bias: nn.Parameter | None
        for name, wanted in (("weight", affine), ("bias", affine and bias)):
            empty = torch.empty(num_channels, device=device, dtype=dtype) if wanted else None
            self.register_parameter(name, None if empty is None else nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """1 and 0; what FSDP and others call for a module that was made on the meta device."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

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

    @staticmethod
    def replace_in(network: nn.Module) -> "Replacement":
        """Computes every group norm + SiLU of somebody else's network, where one is recognised, as one op.

        Blocks get another forward pass; parameters, names and state dict stay. What is recognised, and how
        that is made sure of, is said in replacement.py. A dropout layer after the SiLU keeps torch's mask;
        where `seed_dropout` has seeded it, the same kernel draws the mask. Do this before compiling the
        network or wrapping it for distributed training; again, it does nothing. A norm and a SiLU that are
        replaced are called no more: hooks that they are given later (pruning's too) do not run.

        Args:
            network: changed in place; diffusers', guided-diffusion's, EDM's, or with norm and SiLU next to
                each other in an nn.Sequential.
        Returns:
            What was replaced and what not, and why; print it. Its undo() takes everything back.
        """
        from .replacement import replace_in  # which imports this module

        return replace_in(network)

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.weight is not None}, "
            f"activation={self.activation}, dropout={self.dropout}, layer={self.layer}"
        )
