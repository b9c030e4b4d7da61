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
from .philox import (
    DROPOUT,
    Seed,
    _stream,
    dropout_keep_mask,
    dropout_threshold,
    interleave4,
    offset_arguments,
    philox_call,
    seed_tensor,
)
from .triton_support import (
    INTERPRETED,
    is_transformed,
    jit,
    launch,
    refuse_forward_ad,
    tl,
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


# ----------------------------------------------------------------------------------- kernels: what they share

_FEW = tl.constexpr(4096)  # elements of a tile of which a thread may have one row: 8 for each of 16 warps

# Neither the interpreter nor AMD's GPUs have what `_again` is made of.
_HOLDS = tl.constexpr(INTERPRETED or torch.version.hip is not None)

# What changes from call to call, or from layer to layer, is no reason to compile again.
_VARYING = ["offset", "philox_stream", "threshold", "start"]


@jit
def _sigmoid(z, share):
    """sigmoid(z) / share."""
    # 1 / u as rsqrt(u)^2: two instructions, where a division takes eight. exp2 may overflow; then this is 0.
    root = tl.rsqrt(share + share * tl.exp2(z * -1.4426950408889634))
    return root * root


@jit
def _load(pointers, mask, FULL: tl.constexpr):
    if FULL:
        return tl.load(pointers).to(tl.float32)
    else:
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@jit
def _store(pointers, values, mask, FULL: tl.constexpr):
    if FULL:
        tl.store(pointers, values.to(pointers.dtype.element_ty))
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@jit
def _vector(ptr, offsets, inside, DEFAULT: tl.constexpr):
    """fp32 values of an optional tensor."""
    if ptr is None:
        return (offsets * 0).to(tl.float32) + DEFAULT
    else:
        return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@jit
def _vector_again(ptr, offsets, inside, DEFAULT: tl.constexpr):
    """`_vector`, with a policy of its own: else it is taken for the earlier load, and registers hold that."""
    if ptr is None:
        return (offsets * 0).to(tl.float32) + DEFAULT
    else:
        return tl.load(ptr + offsets, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)


@jit
def _store_vector(ptr, offsets, values, inside):
    if ptr is not None:
        tl.store(ptr + offsets, values.to(ptr.dtype.element_ty), mask=inside)


@jit
def _affine_of(n, c, inside, affine):
    """(q, b), with z = q x_hat + b, per channel."""
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride = affine
    gain = 1.0 + _vector(scale_ptr, n * scale_stride + c, inside, 0.0)
    b = _vector(bias_ptr, c, inside, 0.0) * gain + _vector(shift_ptr, n * shift_stride + c, inside, 0.0)
    return _vector(weight_ptr, c, inside, 1.0) * gain, b


@jit
def _pair_of_group(ptr, n, c, inside, GROUP: tl.constexpr, CHANNELS: tl.constexpr):
    """Of (N, groups, 2), both values of each channel's group; 0 outside."""
    ptr += (n * (CHANNELS // GROUP) + c // GROUP) * 2
    return tl.load(ptr, mask=inside, other=0.0), tl.load(ptr + 1, mask=inside, other=0.0)


@jit
def _centre_of(stats_ptr, pre_ptr, pre_stride, n, c, inside, GROUP: tl.constexpr, CHANNELS: tl.constexpr):
    """(m, rstd) with x_hat = (x - m) rstd, per channel."""
    mean, rstd = _pair_of_group(stats_ptr, n, c, inside, GROUP, CHANNELS)
    return mean - _vector(pre_ptr, n * pre_stride + c, inside, 0.0), rstd


@jit
def _eight_lanes(n, p, eighth, draw, CHANNELS: tl.constexpr):
    """The words of one call for each 8 neighbouring channels."""
    call = p.to(tl.uint32)[:, None] * (CHANNELS // 8) + eighth.to(tl.uint32)[None, :]
    return philox_call(draw[0], _number_in_run(n, draw), call, draw[3])


@jit
def _number_in_run(n, draw):
    _, offset_ptr, offset, _, _ = draw
    number = n + offset
    if offset_ptr is not None:
        number += tl.load(offset_ptr)
    return number


@jit
def _dropped(values, n, p, first, draw, CHANNELS: tl.constexpr, DROP: tl.constexpr):
    """With DROP, 0 for what dropout_keep_mask drops of pixels p and channels first, first + 1, ...; what it
    keeps is not scaled yet."""
    if DROP:
        WIDTH: tl.constexpr = values.shape[1]
        # Drawn lanes are compared in the upper halves of words: what stands below changes nothing.
        least = draw[4].to(tl.uint32) << 16
        if CHANNELS % 8 == 0:  # and so it divides `first` and WIDTH
            w0, w1, w2, w3 = _eight_lanes(n, p, first // 8 + tl.arange(0, WIDTH // 8), draw, CHANNELS)
            words = interleave4(w0, w1, w2, w3)
            keep = tl.reshape(tl.join(words << 16, words), values.shape) >= least
        else:
            element = p.to(tl.int64)[:, None] * CHANNELS + (first + tl.arange(0, WIDTH))[None, :]
            w0, w1, w2, w3 = philox_call(draw[0], _number_in_run(n, draw), element >> 3, draw[3])
            lane = (element & 7).to(tl.int32)
            words = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
            keep = tl.where((lane & 1) == 1, words, words << 16) >= least
        values = tl.where(keep, values, 0.0)
    return values


@jit
def _kept_share(draw, DROP: tl.constexpr):
    """The share that dropout keeps."""
    return (65536 - draw[4]).to(tl.float32) * (1.0 / 65536) if DROP else 1.0


@jit
def _scale(draw, DROP: tl.constexpr):
    """By which dropout multiplies what it keeps: in a gradient, sums and coefficients instead of elements."""
    return 1.0 / _kept_share(draw, DROP)


@jit
def _activation(z, n, p, first, draw, CHANNELS: tl.constexpr, SILU: tl.constexpr, DROP: tl.constexpr):
    """dropout(silu(z)). A factor of z is dropped: of the product the compiler would do it in 16 bits, one by
    one, and of z it takes more registers."""
    if SILU:
        factor = _sigmoid(z, _kept_share(draw, DROP))
    else:
        factor = tl.full(z.shape, 1.0, tl.float32) * _scale(draw, DROP)
    return z * _dropped(factor, n, p, first, draw, CHANNELS, DROP)


@jit
def _silu_backward(z, dy, SILU: tl.constexpr):
    if SILU:
        s = _sigmoid(z, 1.0)
        dy *= s + s * (z - z * s)
    return dy


@jit
def _store_gradients_of_affine(n, c, inside, s1, s2, affine, outputs, CHANNELS: tl.constexpr):
    """What s1 = sum dz and s2 = sum dz x_hat over the pixels of a sample say, per (n, c)."""
    weight_ptr, bias_ptr, scale_ptr, _, scale_stride, _ = affine
    dweight_ptr, dbias_ptr, dscale_ptr, dshift_ptr = outputs
    at = n * CHANNELS + c
    gain = 1.0 + _vector_again(scale_ptr, n * scale_stride + c, inside, 0.0)
    weight, bias = _vector_again(weight_ptr, c, inside, 1.0), _vector_again(bias_ptr, c, inside, 0.0)
    _store_vector(dweight_ptr, at, s2 * gain, inside)
    _store_vector(dbias_ptr, at, s1 * gain, inside)
    _store_vector(dscale_ptr, at, s2 * weight + s1 * bias, inside)
    _store_vector(dshift_ptr, at, s1, inside)


# ----------------------------------------------------------------------------------- kernels: resident tiles


@jit
def _part(
    p,
    first,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    BUNDLE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One part of a tile: its channels, which of them count, offsets and mask [ROWS, WIDTH], and which
    channels belong to which of the tile's groups, [WIDTH, GROUPS]."""
    j = START + tl.arange(0, WIDTH)
    at = p[:, None] * CHANNELS + (first + j)[None, :]
    mask = (p < PIXELS)[:, None] & (j < BUNDLE)[None, :]
    return first + j, j < BUNDLE, at, mask, (j // GROUP)[:, None] == tl.arange(0, GROUPS)[None, :]


@jit
def _rounded(products):
    """Products that a sum must not be fused with. Lanes that add theirs to each other's would each round all
    but their own: the sum would differ from lane to lane, and it would be a race which of them stores it."""
    return products + 0.0


@jit
def _rounded_if_few(products):
    """`_rounded`, where a thread may have one row: else it adds its own first, and those may be fused."""
    if products.numel <= _FEW:
        products = _rounded(products)
    return products


@jit
def _square(x):
    square = x * x
    if x.numel <= _FEW:  # `_rounded` would be left out: a square is never -0
        square = tl.where(square >= 0.0, square, float("nan"))
    return square


@jit
def _to_groups(values, member):
    return tl.sum(tl.where(member, _rounded(values)[:, None], 0.0), axis=0)


@jit
def _to_channels(values, member):
    return tl.sum(tl.where(member, _rounded(values)[None, :], 0.0), axis=1)


@jit
def _sum_of_squares(x, mask, FULL: tl.constexpr):
    return tl.sum(_square(x) if FULL else tl.where(mask, _square(x), 0.0), axis=0)


@jit
def _sums_of_groups(x, GROUPS: tl.constexpr):
    """Sums over a tile [ROWS, WIDTH] that whole groups fill. First over a group's channels, which are mostly
    one thread's: of each channel by itself, eight times as many would go from thread to thread."""
    x = tl.reshape(x, (x.shape[0], GROUPS, x.shape[1] // GROUPS))
    return tl.sum(tl.sum(x, axis=2), axis=0)


@jit
def _again(x):
    """x itself, of which the compiler knows nothing: what it made of x is made anew, not held until then."""
    return x if _HOLDS else tl.inline_asm_elementwise("", "=r,0", [x], dtype=x.dtype, is_pure=False, pack=2)


@jit
def _slices_of(
    ptr, p, c, inside, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, FULL: tl.constexpr, SLICES: tl.constexpr
):
    """A part of a tile as it stands in memory, cut by rows: those of p, those p.shape[0] further on, ..."""
    at = p[:, None] * CHANNELS + c[None, :]
    found = ()
    for i in tl.static_range(SLICES):
        here = ptr + at + i * p.shape[0] * CHANNELS
        if FULL:
            found += (tl.load(here),)  # type: ignore[assignment]
        else:
            mask = (p + i * p.shape[0] < PIXELS)[:, None] & inside[None, :]
            found += (tl.load(here, mask=mask, other=0.0),)  # type: ignore[assignment]
    return found


@jit
def _moments(slices, p, inside, PIXELS: tl.constexpr, FULL: tl.constexpr, SLICES: tl.constexpr):
    """Of each place in the slices, over them: mean, sum of squares about it, and how many have a value there.

    Sums are of distances from the first of them: of the squares' bits log2(SLICES) are lost at most. Of one
    slice there is no sum of squares.
    """
    first = slices[0].to(tl.float32)
    if FULL:
        count = SLICES
    else:
        rows = tl.maximum(0, tl.minimum(SLICES, (PIXELS - p + p.shape[0] - 1) // p.shape[0]))
        count = tl.where(inside[None, :], rows[:, None], 0).to(tl.float32)
    if SLICES == 1:
        mean, squares = first, first
    else:
        sums, squares = tl.zeros_like(first), tl.zeros_like(first)
        for i in tl.static_range(1, SLICES):
            distance = slices[i].to(tl.float32) - first
            if not FULL:
                distance = tl.where((p + i * p.shape[0] < PIXELS)[:, None], distance, 0.0)
            sums += distance
            squares += distance * distance
        distance = sums / (count if FULL else tl.maximum(count, 1.0))
        mean, squares = first + distance, tl.maximum(squares - sums * distance, 0.0)
    return mean, squares, count


@jit
def _by_group(values, member, FILLED: tl.constexpr):
    """Sums of a tile by group; FILLED: whole groups fill it."""
    if FILLED:
        return _sums_of_groups(values, member.shape[1])
    else:
        return _to_groups(tl.sum(values, axis=0), member)


@jit
def _total(mean, count, pre, member, PIXELS: tl.constexpr, FILLED: tl.constexpr, SLICES: tl.constexpr):
    """Sums by group, pre-bias added. Of one slice, what is not there is 0 in the mean."""
    sums = mean if SLICES == 1 else _rounded_if_few(mean * count)
    return _by_group(sums, member, FILLED) + _to_groups(PIXELS * pre, member)


@jit
def _squares_about(
    of_groups, mean, squares, count, pre, member,
    FULL: tl.constexpr, FILLED: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Sums of squares about the means of the groups."""
    distance = mean - (_to_channels(of_groups, member) - pre)[None, :]
    if SLICES > 1:
        square = squares + distance * distance * count
    else:
        square = _square(distance) if FULL else tl.where(count > 0.0, _square(distance), 0.0)
    return _by_group(square, member, FILLED)


@jit
def _store_y(
    y_ptr, slices, n, p, c, inside, first, mean, rstd, pre, member, affine, draw, PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr, FULL: tl.constexpr, SLICES: tl.constexpr, SILU: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Stores y of one part of a tile."""
    weight_ptr, _, scale_ptr, _, scale_stride, _ = affine
    gain = (1.0 + _vector(scale_ptr, n * scale_stride + c, inside, 0.0)) * _to_channels(rstd, member)
    q = _vector(weight_ptr, c, inside, 1.0) * gain
    _, b = _affine_of(n, c, inside, affine)
    centre = _to_channels(mean, member) - pre
    at = p[:, None] * CHANNELS + c[None, :]
    if SLICES > 1:  # for fewer registers; as exact as 16 bits are
        b -= centre * q
    for i in tl.static_range(SLICES):
        # A load keeps the stores above it there: else they are put off to the end, and registers hold all y.
        # With dropout a slice loads its seed.
        if i > 0 and i % 4 == 0 and not DROP:
            q = _vector_again(weight_ptr, c, inside, 1.0) * gain
        if SLICES > 1:
            z = _again(slices[i]).to(tl.float32) * q[None, :] + b[None, :]
        else:
            z = (slices[i].to(tl.float32) - centre[None, :]) * q[None, :] + b[None, :]
        rows = p + i * p.shape[0]
        y = _activation(z, n, rows, first, draw, CHANNELS, SILU, DROP)
        mask = (rows < PIXELS)[:, None] & inside[None, :]
        _store(y_ptr + at + i * p.shape[0] * CHANNELS, y, mask, FULL)


@jit(do_not_specialize=_VARYING)
def resident_forward(
    x_ptr,
    y_ptr,
    stats_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    pre_ptr,
    seed_ptr,
    offset_ptr,
    scale_stride,
    shift_stride,
    pre_stride,
    offset,
    philox_stream,
    threshold,
    eps,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    BUNDLE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    GROUPS: tl.constexpr,
    SLICES0: tl.constexpr,
    SLICES1: tl.constexpr,
    SILU: tl.constexpr,
    DROP: tl.constexpr,
):
    """One program: all PIXELS of BUNDLE channels of a sample. GROUPS: a power of two >= BUNDLE / GROUP.

    A part of the tile that is cut into several SLICES is held in x's 16 bits: one slice after the other is
    made fp32 for the statistics, and again for y.
    """
    FULL0: tl.constexpr = PIXELS == ROWS and WIDTH0 <= BUNDLE
    FULL1: tl.constexpr = PIXELS == ROWS and WIDTH0 + WIDTH1 <= BUNDLE
    FILLED: tl.constexpr = FULL0 and WIDTH1 == 0 and WIDTH0 == GROUPS * GROUP
    affine = (weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride)
    draw = (seed_ptr, offset_ptr, offset, philox_stream, threshold)
    program = tl.program_id(0)
    n = (program // (CHANNELS // BUNDLE)).to(tl.int64)
    first = (program % (CHANNELS // BUNDLE)) * BUNDLE
    x_ptr += n * (PIXELS * CHANNELS)
    y_ptr += n * (PIXELS * CHANNELS)

    p0 = tl.arange(0, ROWS // SLICES0)
    c0, inside0, _, _, member0 = _part(p0, first, 0, WIDTH0, PIXELS, CHANNELS, GROUP, BUNDLE, GROUPS)
    x0 = _slices_of(x_ptr, p0, c0, inside0, PIXELS, CHANNELS, FULL0, SLICES0)
    if WIDTH1 > 0:
        p1 = tl.arange(0, ROWS // SLICES1)
        c1, inside1, _, _, member1 = _part(p1, first, WIDTH0, WIDTH1, PIXELS, CHANNELS, GROUP, BUNDLE, GROUPS)
        x1 = _slices_of(x_ptr, p1, c1, inside1, PIXELS, CHANNELS, FULL1, SLICES1)

    pre0 = _vector(pre_ptr, n * pre_stride + c0, inside0, 0.0)
    mean0, squares0, count0 = _moments(x0, p0, inside0, PIXELS, FULL0, SLICES0)
    total = _total(mean0, count0, pre0, member0, PIXELS, FILLED, SLICES0)
    if WIDTH1 > 0:
        pre1 = _vector(pre_ptr, n * pre_stride + c1, inside1, 0.0)
        mean1, squares1, count1 = _moments(x1, p1, inside1, PIXELS, FULL1, SLICES1)
        total += _total(mean1, count1, pre1, member1, PIXELS, False, SLICES1)
    mean = total / (PIXELS * GROUP)
    squares = _squares_about(mean, mean0, squares0, count0, pre0, member0, FULL0, FILLED, SLICES0)
    if WIDTH1 > 0:
        squares += _squares_about(mean, mean1, squares1, count1, pre1, member1, FULL1, False, SLICES1)
    rstd = tl.rsqrt(squares / (PIXELS * GROUP) + tl.full((), eps, tl.float32))

    group = tl.arange(0, GROUPS)
    stats_ptr += (n * (CHANNELS // GROUP) + first // GROUP + group) * 2
    tl.store(stats_ptr, mean, mask=group < BUNDLE // GROUP)
    tl.store(stats_ptr + 1, rstd, mask=group < BUNDLE // GROUP)

    _store_y(
        y_ptr, x0, n, p0, c0, inside0, first, mean, rstd, pre0, member0, affine, draw, PIXELS, CHANNELS,
        FULL0, SLICES0, SILU, DROP,
    )  # fmt: skip
    if WIDTH1 > 0:
        _store_y(
            y_ptr, x1, n, p1, c1, inside1, first + WIDTH0, mean, rstd, pre1, member1, affine, draw, PIXELS,
            CHANNELS, FULL1, SLICES1, SILU, DROP,
        )  # fmt: skip


@jit
def _first_half(
    x,
    dy,
    n,
    p,
    c,
    inside,
    first,
    member,
    stats_ptr,
    pre_ptr,
    pre_stride,
    affine,
    draw,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    SILU: tl.constexpr,
    DROP: tl.constexpr,
):
    """Of one part of a tile: dz, not scaled yet; the sums over its pixels of dz and of dz x_hat; by group,
    [GROUPS, 2], those of q dz and q dz x_hat. Each pair is summed side by side, so that threads wait for each
    other once."""
    dy = _dropped(dy, n, p, first, draw, CHANNELS, DROP)
    centre, rstd = _centre_of(stats_ptr, pre_ptr, pre_stride, n, c, inside, GROUP, CHANNELS)
    q, b = _affine_of(n, c, inside, affine)
    x -= centre[None, :]
    z = x * (q * rstd)[None, :] + b[None, :]
    dz = _silu_backward(z, dy, SILU)
    s1, s2 = tl.split(tl.sum(tl.join(_rounded_if_few(dz), _rounded_if_few(dz * x)), axis=0))
    scale = _scale(draw, DROP)
    s1 *= scale
    s2 *= rstd * scale
    of_channels = _rounded(tl.join(q * s1, q * s2))
    of_groups = tl.sum(tl.where(member[:, :, None], of_channels[:, None, :], 0.0), axis=0)
    return dz, s1, s2, of_groups


@jit
def _second_half(
    x_ptr,
    dx_ptr,
    dpre_ptr,
    dz,
    s1,
    s2,
    means,
    n,
    c,
    inside,
    at,
    mask,
    member,
    stats_ptr,
    pre_ptr,
    pre_stride,
    affine,
    draw,
    outputs,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    FULL: tl.constexpr,
    DROP: tl.constexpr,
):
    """Stores dx of one part of a tile, its sums over the pixels, dweight and so on.

    x, read again, comes from L1 or L2: held with dz, the largest tiles spill.
    """
    centre, rstd = _centre_of(stats_ptr, pre_ptr, pre_stride, n, c, inside, GROUP, CHANNELS)
    q, _ = _affine_of(n, c, inside, affine)
    # Without a policy of its own the load would be taken for the first one, and x be held.
    if FULL:
        x = tl.load(x_ptr + at, eviction_policy="evict_first").to(tl.float32)
    else:
        x = tl.load(x_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    x -= centre[None, :]
    of_channels = tl.sum(tl.where(member[:, :, None], _rounded(means)[None, :, :], 0.0), axis=1)
    u, v = tl.split(of_channels)
    dx = dz * (q * (rstd * _scale(draw, DROP)))[None, :] - (
        x * (v * rstd * rstd)[None, :] + (u * rstd)[None, :]
    )
    _store(dx_ptr + at, dx, mask, FULL)
    if dpre_ptr is not None:
        _store_vector(
            dpre_ptr, n * CHANNELS + c, tl.sum(dx if FULL else tl.where(mask, dx, 0.0), axis=0), inside
        )
    # Last, as the threads of a program meet for each of them.
    _store_gradients_of_affine(n, c, inside, s1, s2, affine, outputs, CHANNELS)


@jit(do_not_specialize=_VARYING)
def resident_backward(
    x_ptr,
    dy_ptr,
    dx_ptr,
    stats_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    pre_ptr,
    seed_ptr,
    offset_ptr,
    dweight_ptr,
    dbias_ptr,
    dscale_ptr,
    dshift_ptr,
    dpre_ptr,
    scale_stride,
    shift_stride,
    pre_stride,
    offset,
    philox_stream,
    threshold,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    BUNDLE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    GROUPS: tl.constexpr,
    SILU: tl.constexpr,
    DROP: tl.constexpr,
):
    """One program: all PIXELS of BUNDLE channels of a sample; what it stores per channel is the sample's."""
    FULL0: tl.constexpr = PIXELS == ROWS and WIDTH0 <= BUNDLE
    FULL1: tl.constexpr = PIXELS == ROWS and WIDTH0 + WIDTH1 <= BUNDLE
    affine = (weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride)
    draw = (seed_ptr, offset_ptr, offset, philox_stream, threshold)
    outputs = (dweight_ptr, dbias_ptr, dscale_ptr, dshift_ptr)
    program = tl.program_id(0)
    n = (program // (CHANNELS // BUNDLE)).to(tl.int64)
    first = (program % (CHANNELS // BUNDLE)) * BUNDLE
    p = tl.arange(0, ROWS)
    x_ptr += n * (PIXELS * CHANNELS)
    dy_ptr += n * (PIXELS * CHANNELS)
    dx_ptr += n * (PIXELS * CHANNELS)

    c0, inside0, at0, mask0, member0 = _part(p, first, 0, WIDTH0, PIXELS, CHANNELS, GROUP, BUNDLE, GROUPS)
    x0, dy0 = _load(x_ptr + at0, mask0, FULL0), _load(dy_ptr + at0, mask0, FULL0)
    if WIDTH1 > 0:
        c1, inside1, at1, mask1, member1 = _part(
            p, first, WIDTH0, WIDTH1, PIXELS, CHANNELS, GROUP, BUNDLE, GROUPS
        )
        x1, dy1 = _load(x_ptr + at1, mask1, FULL1), _load(dy_ptr + at1, mask1, FULL1)
    # All loads are under way before the first is waited for: else the compiler spreads them. With dropout
    # that would take the registers of a third program on a processor, where there is room for one.
    if not DROP or ROWS >= 1024:
        tl.debug_barrier()

    dz0, s10, s20, means = _first_half(
        x0, dy0, n, p, c0, inside0, first, member0, stats_ptr, pre_ptr, pre_stride, affine, draw,
        CHANNELS, GROUP, SILU, DROP,
    )  # fmt: skip
    if WIDTH1 > 0:
        dz1, s11, s21, means1 = _first_half(
            x1, dy1, n, p, c1, inside1, first + WIDTH0, member1, stats_ptr, pre_ptr, pre_stride,
            affine, draw, CHANNELS, GROUP, SILU, DROP,
        )  # fmt: skip
        means += means1
    means /= PIXELS * GROUP

    _second_half(
        x_ptr, dx_ptr, dpre_ptr, dz0, s10, s20, means, n, c0, inside0, at0, mask0, member0, stats_ptr,
        pre_ptr, pre_stride, affine, draw, outputs, CHANNELS, GROUP, FULL0, DROP,
    )  # fmt: skip
    if WIDTH1 > 0:
        _second_half(
            x_ptr, dx_ptr, dpre_ptr, dz1, s11, s21, means, n, c1, inside1, at1, mask1, member1, stats_ptr,
            pre_ptr, pre_stride, affine, draw, outputs, CHANNELS, GROUP, FULL1, DROP,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------- kernels: split


@jit
def _place(pixels, start, CHANNELS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Of a program: its sample, where its partial sums go, its block of pixels, its first channel."""
    pieces: tl.constexpr = (CHANNELS + WIDTH - 1) // WIDTH
    block, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    local = tl.program_id(1).to(tl.int64)
    blocks = (pixels + ROWS - 1) // ROWS
    return local + start, (local * blocks + block) * CHANNELS, block, piece * WIDTH


@jit
def _tile(pixels, block, first, CHANNELS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Pixels, channels, which of them there are, offsets and mask [ROWS, WIDTH] from the sample's start."""
    p, c = block * ROWS + tl.arange(0, ROWS), first + tl.arange(0, WIDTH)
    base = block.to(tl.int64) * ROWS * CHANNELS
    at = tl.arange(0, ROWS)[:, None] * CHANNELS + c[None, :]
    return p, c, c < CHANNELS, base, at, (p < pixels)[:, None] & (c < CHANNELS)[None, :]


@jit(do_not_specialize=_VARYING)
def split_statistics(
    x_ptr,
    mean_ptr,
    squares_ptr,
    pixels,
    start,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,
):
    """Mean and centred sum of squares of each channel over ROWS pixels."""
    n, place, block, first = _place(pixels, start, CHANNELS, ROWS, WIDTH)
    _, c, inside, base, at, mask = _tile(pixels, block, first, CHANNELS, ROWS, WIDTH)
    x = _load(x_ptr + n * pixels * CHANNELS + base + at, mask, FULL)
    mean = tl.sum(x, axis=0) / tl.minimum(pixels - block * ROWS, ROWS).to(tl.float32)
    squares = _sum_of_squares(x - mean[None, :], mask, FULL)
    tl.store(mean_ptr + place + c, mean, mask=inside)
    tl.store(squares_ptr + place + c, squares, mask=inside)


@jit(do_not_specialize=_VARYING)
def merge_statistics(
    mean_ptr,
    squares_ptr,
    pre_ptr,
    stats_ptr,
    pre_stride,
    pixels,
    start,
    eps,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and rstd of one group from its blocks and channels (Chan, Golub & LeVeque, 1983)."""
    group, local = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = local + start
    blocks = (pixels + ROWS - 1) // ROWS
    entries = blocks * GROUP
    base = local * blocks * CHANNELS + group * GROUP
    count = tl.full((), pixels, tl.float32) * GROUP

    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, entries, BLOCK):
        e = begin + tl.arange(0, BLOCK)
        block, j = e // GROUP, e % GROUP
        at = base + block.to(tl.int64) * CHANNELS + j
        size = tl.minimum(pixels - block * ROWS, ROWS).to(tl.float32)
        mean = tl.load(mean_ptr + at, mask=e < entries, other=0.0)
        mean += _vector(pre_ptr, n * pre_stride + group * GROUP + j, e < entries, 0.0)
        total += tl.where(e < entries, mean * size, 0.0)
    group_mean = tl.sum(total, axis=0) / count

    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, entries, BLOCK):
        e = begin + tl.arange(0, BLOCK)
        block, j = e // GROUP, e % GROUP
        at = base + block.to(tl.int64) * CHANNELS + j
        size = tl.minimum(pixels - block * ROWS, ROWS).to(tl.float32)
        mean = tl.load(mean_ptr + at, mask=e < entries, other=0.0)
        mean += _vector(pre_ptr, n * pre_stride + group * GROUP + j, e < entries, 0.0)
        squares = tl.load(squares_ptr + at, mask=e < entries, other=0.0)
        mean -= group_mean
        total += tl.where(e < entries, squares + mean * mean * size, 0.0)
    rstd = tl.rsqrt(tl.sum(total, axis=0) / count + tl.full((), eps, tl.float32))
    at = (n * (CHANNELS // GROUP) + group) * 2
    tl.store(stats_ptr + at, group_mean)
    tl.store(stats_ptr + at + 1, rstd)


@jit(do_not_specialize=_VARYING)
def split_apply(
    x_ptr,
    y_ptr,
    stats_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    pre_ptr,
    seed_ptr,
    offset_ptr,
    scale_stride,
    shift_stride,
    pre_stride,
    offset,
    philox_stream,
    threshold,
    pixels,
    start,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,
    SILU: tl.constexpr,
    DROP: tl.constexpr,
):
    """y, from the statistics of the groups."""
    affine = (weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride)
    draw = (seed_ptr, offset_ptr, offset, philox_stream, threshold)
    n, _, block, first = _place(pixels, start, CHANNELS, ROWS, WIDTH)
    p, c, inside, base, at, mask = _tile(pixels, block, first, CHANNELS, ROWS, WIDTH)
    base += n * pixels * CHANNELS
    x = _load(x_ptr + base + at, mask, FULL)
    centre, rstd = _centre_of(stats_ptr, pre_ptr, pre_stride, n, c, inside, GROUP, CHANNELS)
    q, b = _affine_of(n, c, inside, affine)
    z = (x - centre[None, :]) * (q * rstd)[None, :] + b[None, :]
    _store(y_ptr + base + at, _activation(z, n, p, first, draw, CHANNELS, SILU, DROP), mask, FULL)


@jit(do_not_specialize=_VARYING)
def split_backward(
    x_ptr,
    dy_ptr,
    dx_ptr,
    stats_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    pre_ptr,
    seed_ptr,
    offset_ptr,
    s1_ptr,
    s2_ptr,
    sx_ptr,
    means_ptr,
    scale_stride,
    shift_stride,
    pre_stride,
    offset,
    philox_stream,
    threshold,
    pixels,
    start,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,
    SILU: tl.constexpr,
    DROP: tl.constexpr,
):
    """Without dx: sums over ROWS pixels of dz, dz x_hat and (with sx) x_hat. With dx: dx, by their means."""
    affine = (weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride)
    draw = (seed_ptr, offset_ptr, offset, philox_stream, threshold)
    n, place, block, first = _place(pixels, start, CHANNELS, ROWS, WIDTH)
    p, c, inside, base, at, mask = _tile(pixels, block, first, CHANNELS, ROWS, WIDTH)
    base += n * pixels * CHANNELS
    x, dy = _load(x_ptr + base + at, mask, FULL), _load(dy_ptr + base + at, mask, FULL)
    tl.debug_barrier()  # see resident_backward
    dy = _dropped(dy, n, p, first, draw, CHANNELS, DROP)
    centre, rstd = _centre_of(stats_ptr, pre_ptr, pre_stride, n, c, inside, GROUP, CHANNELS)
    q, b = _affine_of(n, c, inside, affine)
    x -= centre[None, :]
    z = x * (q * rstd)[None, :] + b[None, :]
    dz = _silu_backward(z, dy, SILU)
    if dx_ptr is None:
        s1, s2 = tl.split(tl.sum(tl.join(_rounded_if_few(dz), _rounded_if_few(dz * x)), axis=0))
        scale = _scale(draw, DROP)
        tl.store(s1_ptr + place + c, s1 * scale, mask=inside)
        tl.store(s2_ptr + place + c, s2 * (rstd * scale), mask=inside)
        if sx_ptr is not None:
            sx = tl.sum(x if FULL else tl.where(mask, x, 0.0), axis=0)
            tl.store(sx_ptr + place + c, sx * rstd, mask=inside)
    else:
        m1, m2 = _pair_of_group(means_ptr, n - start, c, inside, GROUP, CHANNELS)
        dx = dz * (q * (rstd * _scale(draw, DROP)))[None, :] - (
            x * (m2 * rstd * rstd)[None, :] + (m1 * rstd)[None, :]
        )
        _store(dx_ptr + base + at, dx, mask, FULL)


@jit
def _over_blocks(
    ptr, base, c, inside, blocks, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr
):
    """Sums of one channel's partials over the blocks of pixels."""
    total = tl.zeros((BLOCKS, WIDTH), tl.float32)
    for begin in range(0, blocks, BLOCKS):
        block = begin + tl.arange(0, BLOCKS)
        at = base + block.to(tl.int64)[:, None] * CHANNELS + c[None, :]
        total += tl.load(ptr + at, mask=(block < blocks)[:, None] & inside[None, :], other=0.0)
    return tl.sum(total, axis=0)


@jit(do_not_specialize=_VARYING)
def merge_backward(
    s1_ptr,
    s2_ptr,
    sx_ptr,
    means_ptr,
    stats_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    dweight_ptr,
    dbias_ptr,
    dscale_ptr,
    dshift_ptr,
    dpre_ptr,
    scale_stride,
    pixels,
    start,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One group of a sample: the means of q dz and q dz x_hat that dx needs, and gradients per channel."""
    affine = (weight_ptr, bias_ptr, scale_ptr, None, scale_stride, 0)
    outputs = (dweight_ptr, dbias_ptr, dscale_ptr, dshift_ptr)
    group, local = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = local + start
    blocks = (pixels + ROWS - 1) // ROWS
    base = local * blocks * CHANNELS
    m1, m2 = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for begin in range(0, GROUP, WIDTH):
        j = begin + tl.arange(0, WIDTH)
        inside, c = j < GROUP, group * GROUP + j
        s1 = _over_blocks(s1_ptr, base, c, inside, blocks, CHANNELS, BLOCKS, WIDTH)
        s2 = _over_blocks(s2_ptr, base, c, inside, blocks, CHANNELS, BLOCKS, WIDTH)
        q, _ = _affine_of(n, c, inside, affine)
        m1 += q * s1
        m2 += q * s2
        _store_gradients_of_affine(n, c, inside, s1, s2, affine, outputs, CHANNELS)
    count = tl.full((), pixels, tl.float32) * GROUP
    mean1, mean2 = tl.sum(m1, axis=0) / count, tl.sum(m2, axis=0) / count
    at = (local * (CHANNELS // GROUP) + group) * 2
    tl.store(means_ptr + at, mean1)
    tl.store(means_ptr + at + 1, mean2)
    if dpre_ptr is not None:  # the sum of dx over the pixels
        rstd = tl.load(stats_ptr + (n * (CHANNELS // GROUP) + group) * 2 + 1)
        for begin in range(0, GROUP, WIDTH):
            j = begin + tl.arange(0, WIDTH)
            inside, c = j < GROUP, group * GROUP + j
            s1 = _over_blocks(s1_ptr, base, c, inside, blocks, CHANNELS, BLOCKS, WIDTH)
            sx = _over_blocks(sx_ptr, base, c, inside, blocks, CHANNELS, BLOCKS, WIDTH)
            q, _ = _affine_of(n, c, inside, affine)
            dpre = rstd * (q * s1 - pixels * mean1 - mean2 * sx)
            _store_vector(dpre_ptr, n * CHANNELS + c, dpre, inside)


@jit
def sum_samples(
    from_ptr,
    to0_ptr,
    to1_ptr,
    to2_ptr,
    rows,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """(k, rows, CHANNELS) -> k times (CHANNELS,), k up to 3: the second axis of the grid.

    WIDTH is one sector of memory, for many programs; all rows of a batch are in flight at once (up to ROWS).
    """
    k = tl.program_id(1)
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    from_ptr += k.to(tl.int64) * rows * CHANNELS
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for begin in range(0, rows, ROWS):
        row = begin + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * CHANNELS + c[None, :]
        total += tl.load(from_ptr + at, mask=(row < rows)[:, None] & (c < CHANNELS)[None, :], other=0.0)
    result = tl.sum(total, axis=0)
    # Each mask is one comparison of vectors: Triton 3.9's interpreter takes no (c < CHANNELS) & (k == 0).
    _store_vector(to0_ptr, c, result, c < tl.where(k == 0, CHANNELS, 0))
    _store_vector(to1_ptr, c, result, c < tl.where(k == 1, CHANNELS, 0))
    _store_vector(to2_ptr, c, result, c < tl.where(k == 2, CHANNELS, 0))


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
    over_tiles: dict[str, Any] = {
        "num_warps": plan.num_warps,
        "maxnreg": plan.maxnreg,
        "elements": elements,
        "like": like,
    }
    statistics: dict[str, Any] = {
        "x_ptr": x,
        "mean_ptr": partial[0],
        "squares_ptr": partial[1],
        **{name: value for name, value in tile.items() if name != "GROUP"},
        **over_tiles,
    }
    merge: dict[str, Any] = {
        "num_warps": 2,
        "like": like,
        "mean_ptr": partial[0],
        "squares_ptr": partial[1],
        "pre_ptr": pre_bias,
        "stats_ptr": stats,
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
        launch(split_apply, (blocks * pieces, samples), start=start, **arguments, **over_tiles)
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
