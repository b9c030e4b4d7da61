# mypy: disable-error-code="no-untyped-def"
"""What both algorithms of group norm + SiLU do: loads, affine parameters, dropout, SiLU and its gradient."""

from .philox import interleave4, philox_call
from .triton_support import jit, tl

# Elements of a tile of which a thread may have one row: 8 for each thread of 16 warps.
FEW = tl.constexpr(4096)

# What changes from call to call, or from layer to layer, is no reason to compile again.
VARYING = ["offset", "philox_stream", "threshold", "start"]


@jit
def _sigmoid(z, share):
    """sigmoid(z) / share."""
    # 1 / u as rsqrt(u)^2: two instructions, where a division takes eight. exp2 may overflow; then this is 0.
    root = tl.rsqrt(share + share * tl.exp2(z * -1.4426950408889634))
    return root * root


@jit
def load(pointers, mask, FULL: tl.constexpr):
    if FULL:
        return tl.load(pointers).to(tl.float32)
    else:
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@jit
def store(pointers, values, mask, FULL: tl.constexpr):
    if FULL:
        tl.store(pointers, values.to(pointers.dtype.element_ty))
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@jit
def vector(ptr, offsets, inside, DEFAULT: tl.constexpr):
    """fp32 values of an optional tensor."""
    if ptr is None:
        return (offsets * 0).to(tl.float32) + DEFAULT
    else:
        return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@jit
def vector_again(ptr, offsets, inside, DEFAULT: tl.constexpr):
    """`vector`, with a policy of its own: else it is taken for the earlier load, and registers hold that."""
    if ptr is None:
        return (offsets * 0).to(tl.float32) + DEFAULT
    else:
        return tl.load(ptr + offsets, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)


@jit
def store_vector(ptr, offsets, values, inside):
    if ptr is not None:
        tl.store(ptr + offsets, values.to(ptr.dtype.element_ty), mask=inside)


@jit
def affine_of(n, c, inside, affine):
    """(q, b), with z = q x_hat + b, per channel."""
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride = affine
    gain = 1.0 + vector(scale_ptr, n * scale_stride + c, inside, 0.0)
    b = vector(bias_ptr, c, inside, 0.0) * gain + vector(shift_ptr, n * shift_stride + c, inside, 0.0)
    return vector(weight_ptr, c, inside, 1.0) * gain, b


@jit
def pair_of_group(ptr, n, c, inside, GROUP: tl.constexpr, CHANNELS: tl.constexpr):
    """Of (N, groups, 2), both values of each channel's group; 0 outside."""
    ptr += (n * (CHANNELS // GROUP) + c // GROUP) * 2
    return tl.load(ptr, mask=inside, other=0.0), tl.load(ptr + 1, mask=inside, other=0.0)


@jit
def biased(x, x_ptr, pre):
    """x + pre, where x is fp32: of a pre-bias that takes most of x away, the mean of x would not keep enough.

    16 bits are left alone, since they are further apart than what their mean loses.
    """
    if x_ptr.dtype.element_ty == tl.float32:
        x += pre[None, :]
    return x


@jit
def pre_of_means(x_ptr, pre):
    """The pre-bias where `biased` does not add it: it goes to the means of the channels then."""
    if x_ptr.dtype.element_ty == tl.float32:
        pre = tl.zeros_like(pre)
    return pre


@jit
def centred(
    x, x_ptr, stats_ptr, pre_ptr, pre_stride, n, c, inside, GROUP: tl.constexpr, CHANNELS: tl.constexpr,
    AGAIN: tl.constexpr = False,
):  # fmt: skip
    """x_hat / rstd of a tile, and rstd per channel. AGAIN: as `vector_again`."""
    mean, rstd = pair_of_group(stats_ptr, n, c, inside, GROUP, CHANNELS)
    if pre_ptr is not None:
        if AGAIN:
            pre = vector_again(pre_ptr, n * pre_stride + c, inside, 0.0)
        else:
            pre = vector(pre_ptr, n * pre_stride + c, inside, 0.0)
        x = biased(x, x_ptr, pre)
        mean -= pre_of_means(x_ptr, pre)
    return x - mean[None, :], rstd


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
def dropped(values, n, p, first, draw, CHANNELS: tl.constexpr, DROP: tl.constexpr):
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
def dropout_scale(draw, DROP: tl.constexpr):
    """By which dropout multiplies what it keeps: in a gradient, sums and coefficients instead of elements."""
    return 1.0 / _kept_share(draw, DROP)


@jit
def activated(z, n, p, first, draw, CHANNELS: tl.constexpr, SILU: tl.constexpr, DROP: tl.constexpr):
    """dropout(silu(z)). A factor of z is dropped: of the product the compiler would do it in 16 bits, one by
    one, and of z it takes more registers."""
    if SILU:
        factor = _sigmoid(z, _kept_share(draw, DROP))
    else:
        factor = tl.full(z.shape, 1.0, tl.float32) * dropout_scale(draw, DROP)
    return z * dropped(factor, n, p, first, draw, CHANNELS, DROP)


@jit
def silu_backward(z, dy, SILU: tl.constexpr):
    if SILU:
        s = _sigmoid(z, 1.0)
        dy *= s + s * (z - z * s)
    return dy


@jit
def store_gradients_of_affine(n, c, inside, s1, s2, affine, outputs, CHANNELS: tl.constexpr):
    """What s1 = sum dz and s2 = sum dz x_hat over the pixels of a sample say, per (n, c)."""
    weight_ptr, bias_ptr, scale_ptr, _, scale_stride, _ = affine
    dweight_ptr, dbias_ptr, dscale_ptr, dshift_ptr = outputs
    at = n * CHANNELS + c
    gain = 1.0 + vector_again(scale_ptr, n * scale_stride + c, inside, 0.0)
    weight, bias = vector_again(weight_ptr, c, inside, 1.0), vector_again(bias_ptr, c, inside, 0.0)
    store_vector(dweight_ptr, at, s2 * gain, inside)
    store_vector(dbias_ptr, at, s1 * gain, inside)
    store_vector(dscale_ptr, at, s2 * weight + s1 * bias, inside)
    store_vector(dshift_ptr, at, s1, inside)


@jit
def rounded(products):
    """Products that a sum must not be fused with. Lanes that add theirs to each other's would each round all
    but their own: the sum would differ from lane to lane, and it would be a race which of them stores it."""
    return products + 0.0


@jit
def rounded_if_few(products):
    """`rounded`, where a thread may have one row: else it adds its own first, and those may be fused."""
    if products.numel <= FEW:
        products = rounded(products)
    return products


@jit
def squared(x):
    square = x * x
    if x.numel <= FEW:  # `rounded` would be left out: a square is never -0
        square = tl.where(square >= 0.0, square, float("nan"))
    return square


@jit
def sum_of_squares(x, mask, FULL: tl.constexpr):
    return tl.sum(squared(x) if FULL else tl.where(mask, squared(x), 0.0), axis=0)
