# mypy: disable-error-code="no-untyped-def"
"""Group norm + SiLU in several passes: partial sums by blocks of pixels, merging, a second reading."""

from .group_norm_shared import (
    VARYING,
    activated,
    affine_of,
    biased,
    centred,
    dropout_scale,
    dropped,
    load,
    pair_of_group,
    rounded_if_few,
    silu_backward,
    store,
    store_gradients_of_affine,
    store_vector,
    sum_of_squares,
    vector,
)
from .triton_support import jit, tl


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


@jit(do_not_specialize=VARYING)
def split_statistics(
    x_ptr,
    mean_ptr,
    squares_ptr,
    pre_ptr,
    pre_stride,
    pixels,
    start,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FULL: tl.constexpr,
):
    """Mean and centred sum of squares of each channel over ROWS pixels, as `biased` has them."""
    n, place, block, first = _place(pixels, start, CHANNELS, ROWS, WIDTH)
    _, c, inside, base, at, mask = _tile(pixels, block, first, CHANNELS, ROWS, WIDTH)
    x = load(x_ptr + n * pixels * CHANNELS + base + at, mask, FULL)
    if pre_ptr is not None:
        x = biased(x, x_ptr, vector(pre_ptr, n * pre_stride + c, inside, 0.0))
        x = x if FULL else tl.where(mask, x, 0.0)
    mean = tl.sum(x, axis=0) / tl.minimum(pixels - block * ROWS, ROWS).to(tl.float32)
    squares = sum_of_squares(x - mean[None, :], mask, FULL)
    tl.store(mean_ptr + place + c, mean, mask=inside)
    tl.store(squares_ptr + place + c, squares, mask=inside)


@jit(do_not_specialize=VARYING)
def merge_statistics(
    mean_ptr,
    squares_ptr,
    pre_ptr,
    stats_ptr,
    rest_ptr,
    pre_stride,
    pixels,
    start,
    eps,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and rstd of one group from its blocks and channels (Chan, Golub & LeVeque, 1983), and the rest of
    the mean: what it lost when it was rounded."""
    group, local = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = local + start
    blocks = (pixels + ROWS - 1) // ROWS
    entries = blocks * GROUP
    base = local * blocks * CHANNELS + group * GROUP
    count = tl.full((), pixels, tl.float32) * GROUP

    # Sums of distances from one of the means lose fewer bits than sums of means.
    first = tl.load(mean_ptr + base)
    if pre_ptr is not None:
        first += tl.load(pre_ptr + n * pre_stride + group * GROUP).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, entries, BLOCK):
        e = begin + tl.arange(0, BLOCK)
        block, j = e // GROUP, e % GROUP
        at = base + block.to(tl.int64) * CHANNELS + j
        size = tl.minimum(pixels - block * ROWS, ROWS).to(tl.float32)
        mean = tl.load(mean_ptr + at, mask=e < entries, other=0.0)
        mean += vector(pre_ptr, n * pre_stride + group * GROUP + j, e < entries, 0.0)
        total += tl.where(e < entries, (mean - first) * size, 0.0)
    distance = tl.sum(total, axis=0) / count
    group_mean = first + distance
    # Knuth's TwoSum.
    added = group_mean - first
    rest = (first - (group_mean - added)) + (distance - added)
    tl.store(rest_ptr + local * (CHANNELS // GROUP) + group, rest)
    tl.store(stats_ptr + (n * (CHANNELS // GROUP) + group) * 2, group_mean)

    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, entries, BLOCK):
        e = begin + tl.arange(0, BLOCK)
        block, j = e // GROUP, e % GROUP
        at = base + block.to(tl.int64) * CHANNELS + j
        size = tl.minimum(pixels - block * ROWS, ROWS).to(tl.float32)
        mean = tl.load(mean_ptr + at, mask=e < entries, other=0.0)
        mean += vector(pre_ptr, n * pre_stride + group * GROUP + j, e < entries, 0.0)
        squares = tl.load(squares_ptr + at, mask=e < entries, other=0.0)
        mean -= group_mean
        total += tl.where(e < entries, squares + mean * mean * size, 0.0)
    rstd = tl.rsqrt(tl.sum(total, axis=0) / count + tl.full((), eps, tl.float32))
    tl.store(stats_ptr + (n * (CHANNELS // GROUP) + group) * 2 + 1, rstd)


@jit(do_not_specialize=VARYING)
def split_apply(
    x_ptr,
    y_ptr,
    stats_ptr,
    rest_ptr,
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
    """y, from the statistics of the groups.

    Where a group is nearly constant rstd is large, and the rest of its mean shows in 16 bits.
    """
    affine = (weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride)
    draw = (seed_ptr, offset_ptr, offset, philox_stream, threshold)
    n, _, block, first = _place(pixels, start, CHANNELS, ROWS, WIDTH)
    p, c, inside, base, at, mask = _tile(pixels, block, first, CHANNELS, ROWS, WIDTH)
    base += n * pixels * CHANNELS
    x = load(x_ptr + base + at, mask, FULL)
    x, rstd = centred(x, x_ptr, stats_ptr, pre_ptr, pre_stride, n, c, inside, GROUP, CHANNELS)
    q, b = affine_of(n, c, inside, affine)
    q *= rstd
    b -= q * tl.load(rest_ptr + (n - start) * (CHANNELS // GROUP) + c // GROUP, mask=inside, other=0.0)
    z = x * q[None, :] + b[None, :]
    store(y_ptr + base + at, activated(z, n, p, first, draw, CHANNELS, SILU, DROP), mask, FULL)


@jit(do_not_specialize=VARYING)
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
    x, dy = load(x_ptr + base + at, mask, FULL), load(dy_ptr + base + at, mask, FULL)
    tl.debug_barrier()  # see resident_backward
    dy = dropped(dy, n, p, first, draw, CHANNELS, DROP)
    x, rstd = centred(x, x_ptr, stats_ptr, pre_ptr, pre_stride, n, c, inside, GROUP, CHANNELS)
    q, b = affine_of(n, c, inside, affine)
    z = x * (q * rstd)[None, :] + b[None, :]
    dz = silu_backward(z, dy, SILU)
    if dx_ptr is None:
        s1, s2 = tl.split(tl.sum(tl.join(rounded_if_few(dz), rounded_if_few(dz * x)), axis=0))
        scale = dropout_scale(draw, DROP)
        tl.store(s1_ptr + place + c, s1 * scale, mask=inside)
        tl.store(s2_ptr + place + c, s2 * (rstd * scale), mask=inside)
        if sx_ptr is not None:
            sx = tl.sum(x if FULL else tl.where(mask, x, 0.0), axis=0)
            tl.store(sx_ptr + place + c, sx * rstd, mask=inside)
    else:
        m1, m2 = pair_of_group(means_ptr, n - start, c, inside, GROUP, CHANNELS)
        dx = dz * (q * (rstd * dropout_scale(draw, DROP)))[None, :] - (
            x * (m2 * rstd * rstd)[None, :] + (m1 * rstd)[None, :]
        )
        store(dx_ptr + base + at, dx, mask, FULL)


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


@jit(do_not_specialize=VARYING)
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
        q, _ = affine_of(n, c, inside, affine)
        m1 += q * s1
        m2 += q * s2
        store_gradients_of_affine(n, c, inside, s1, s2, affine, outputs, CHANNELS)
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
            q, _ = affine_of(n, c, inside, affine)
            dpre = rstd * (q * s1 - pixels * mean1 - mean2 * sx)
            store_vector(dpre_ptr, n * CHANNELS + c, dpre, inside)


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
    store_vector(to0_ptr, c, result, c < tl.where(k == 0, CHANNELS, 0))
    store_vector(to1_ptr, c, result, c < tl.where(k == 1, CHANNELS, 0))
    store_vector(to2_ptr, c, result, c < tl.where(k == 2, CHANNELS, 0))
