# mypy: disable-error-code="no-untyped-def"
"""Group norm + SiLU in one pass: the kernels whose programs hold all pixels of a bundle of groups."""

import torch

from .group_norm_shared import (
    VARYING,
    activated,
    affine_of,
    biased,
    centred,
    dropout_scale,
    dropped,
    load,
    pre_of_means,
    rounded,
    rounded_if_few,
    silu_backward,
    squared,
    store,
    store_gradients_of_affine,
    store_vector,
    vector,
    vector_again,
)
from .triton_support import INTERPRETED, jit, tl

# Neither the interpreter nor AMD's GPUs have what `_again` is made of.
_HOLDS = tl.constexpr(INTERPRETED or torch.version.hip is not None)


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
def _to_groups(values, member):
    return tl.sum(tl.where(member, rounded(values)[:, None], 0.0), axis=0)


@jit
def _to_channels(values, member):
    return tl.sum(tl.where(member, rounded(values)[None, :], 0.0), axis=1)


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
def _biased_slices(
    slices, x_ptr, pre, p, inside, PIXELS: tl.constexpr, FULL: tl.constexpr, SLICES: tl.constexpr
):  # fmt: skip
    """The slices as `biased` has them, 0 where no pixel is; and `pre_of_means`."""
    if x_ptr.dtype.element_ty == tl.float32:
        found = ()
        for i in tl.static_range(SLICES):
            x = biased(slices[i], x_ptr, pre)
            if not FULL:
                x = tl.where((p + i * p.shape[0] < PIXELS)[:, None] & inside[None, :], x, 0.0)
            found += (x,)  # type: ignore[assignment]
        slices = found
    return slices, pre_of_means(x_ptr, pre)


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
        mean = first + distance
        # Where the squares overflow, the difference would be NaN, which a GPU's maximum takes for 0.
        squares = tl.where(squares < float("inf"), tl.maximum(squares - sums * distance, 0.0), squares)
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
    sums = mean if SLICES == 1 else rounded_if_few(mean * count)
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
        square = squared(distance) if FULL else tl.where(count > 0.0, squared(distance), 0.0)
    return _by_group(square, member, FILLED)


@jit
def _store_y(
    y_ptr, slices, n, p, c, inside, first, mean, rstd, pre, member, affine, draw, PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr, FULL: tl.constexpr, SLICES: tl.constexpr, SILU: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Stores y of one part of a tile."""
    weight_ptr, _, scale_ptr, _, scale_stride, _ = affine
    gain = (1.0 + vector(scale_ptr, n * scale_stride + c, inside, 0.0)) * _to_channels(rstd, member)
    q = vector(weight_ptr, c, inside, 1.0) * gain
    _, b = affine_of(n, c, inside, affine)
    centre = _to_channels(mean, member) - pre
    at = p[:, None] * CHANNELS + c[None, :]
    for i in tl.static_range(SLICES):
        # A load keeps the stores above it there: else they are put off to the end, and registers hold all y.
        # With dropout a slice loads its seed.
        if i > 0 and i % 4 == 0 and not DROP:
            q = vector_again(weight_ptr, c, inside, 1.0) * gain
        x = (_again(slices[i]) if SLICES > 1 else slices[i]).to(tl.float32)
        z = (x - centre[None, :]) * q[None, :] + b[None, :]
        rows = p + i * p.shape[0]
        y = activated(z, n, rows, first, draw, CHANNELS, SILU, DROP)
        mask = (rows < PIXELS)[:, None] & inside[None, :]
        store(y_ptr + at + i * p.shape[0] * CHANNELS, y, mask, FULL)


@jit(do_not_specialize=VARYING)
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

    pre0 = vector(pre_ptr, n * pre_stride + c0, inside0, 0.0)
    if pre_ptr is not None:
        x0, pre0 = _biased_slices(x0, x_ptr, pre0, p0, inside0, PIXELS, FULL0, SLICES0)
    mean0, squares0, count0 = _moments(x0, p0, inside0, PIXELS, FULL0, SLICES0)
    total = _total(mean0, count0, pre0, member0, PIXELS, FILLED, SLICES0)
    if WIDTH1 > 0:
        pre1 = vector(pre_ptr, n * pre_stride + c1, inside1, 0.0)
        if pre_ptr is not None:
            x1, pre1 = _biased_slices(x1, x_ptr, pre1, p1, inside1, PIXELS, FULL1, SLICES1)
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
    x_ptr,
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
    dy = dropped(dy, n, p, first, draw, CHANNELS, DROP)
    x, rstd = centred(x, x_ptr, stats_ptr, pre_ptr, pre_stride, n, c, inside, GROUP, CHANNELS)
    q, b = affine_of(n, c, inside, affine)
    z = x * (q * rstd)[None, :] + b[None, :]
    dz = silu_backward(z, dy, SILU)
    s1, s2 = tl.split(tl.sum(tl.join(rounded_if_few(dz), rounded_if_few(dz * x)), axis=0))
    scale = dropout_scale(draw, DROP)
    s1 *= scale
    s2 *= rstd * scale
    of_channels = rounded(tl.join(q * s1, q * s2))
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
    q, _ = affine_of(n, c, inside, affine)
    # Without a policy of its own the load would be taken for the first one, and x be held.
    if FULL:
        x = tl.load(x_ptr + at, eviction_policy="evict_first").to(tl.float32)
    else:
        x = tl.load(x_ptr + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    again: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    x, rstd = centred(x, x_ptr, stats_ptr, pre_ptr, pre_stride, n, c, inside, GROUP, CHANNELS, again)
    of_channels = tl.sum(tl.where(member[:, :, None], rounded(means)[None, :, :], 0.0), axis=1)
    u, v = tl.split(of_channels)
    dx = dz * (q * (rstd * dropout_scale(draw, DROP)))[None, :] - (
        x * (v * rstd * rstd)[None, :] + (u * rstd)[None, :]
    )
    store(dx_ptr + at, dx, mask, FULL)
    if dpre_ptr is not None:
        store_vector(
            dpre_ptr, n * CHANNELS + c, tl.sum(dx if FULL else tl.where(mask, dx, 0.0), axis=0), inside
        )
    # Last, as the threads of a program meet for each of them.
    store_gradients_of_affine(n, c, inside, s1, s2, affine, outputs, CHANNELS)


@jit(do_not_specialize=VARYING)
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
    x0, dy0 = load(x_ptr + at0, mask0, FULL0), load(dy_ptr + at0, mask0, FULL0)
    if WIDTH1 > 0:
        c1, inside1, at1, mask1, member1 = _part(
            p, first, WIDTH0, WIDTH1, PIXELS, CHANNELS, GROUP, BUNDLE, GROUPS
        )
        x1, dy1 = load(x_ptr + at1, mask1, FULL1), load(dy_ptr + at1, mask1, FULL1)
    # All loads are under way before the first is waited for: else the compiler spreads them. With dropout
    # that would take the registers of a third program on a processor, where there is room for one.
    if not DROP or ROWS >= 1024:
        tl.debug_barrier()

    dz0, s10, s20, means = _first_half(
        x_ptr, x0, dy0, n, p, c0, inside0, first, member0, stats_ptr, pre_ptr, pre_stride, affine, draw,
        CHANNELS, GROUP, SILU, DROP,
    )  # fmt: skip
    if WIDTH1 > 0:
        dz1, s11, s21, means1 = _first_half(
            x_ptr, x1, dy1, n, p, c1, inside1, first + WIDTH0, member1, stats_ptr, pre_ptr, pre_stride,
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
