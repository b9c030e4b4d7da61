# mypy: disable-error-code="no-untyped-def"
"""Halving and doubling an image's resolution with the filter [1, 3, 3, 1], as NCSN++ resamples.

    down: y[i] = (x[2i - 1] + 3 x[2i] + 3 x[2i + 1] + x[2i + 2]) / 8, along both axes
    up:   y[2i] = (x[i - 1] + 3 x[i]) / 4 and y[2i + 1] = (3 x[i] + x[i + 1]) / 4, along both axes

with zeros outside. Each is the other's transpose times a constant, and so its gradient: down^T = up / 4.
Sums are fp32 for fp16, bf16 and fp32 inputs (float64 for float64), and autocast changes nothing.

The filter: Zhang, "Making Convolutional Networks Shift-Invariant Again", ICML 2019; in NCSN++: Song et al.,
"Score-Based Generative Modeling through SDEs", ICLR 2021.

Bytes moved: 5/4 of the larger image's. A program takes some columns and channels, and goes from row to row:
within its band every row is read once, and filtered along itself once.

cuDNN's convolutions with a filter for each channel took 55 ms of a step of NCSN++ on CIFAR-10 (512 images, an
H200). In the step's profile these kernels are not among the 25 longest, so below 1.1 ms each
(benchmarks/results/analysis.md, step-floor). By themselves, between 32 x 32 and 16 x 16, they took 0.097 to
0.105 ms, at 76 to 83 % of a copy (kernels-NVIDIA-H200-20261126-214909.json there).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .backend import convolves_well, use_triton, without_autocast
from .triton_support import jit, launch, refuse_forward_ad, tl, triton

# -------------------------------------------------------------------------------------- the eager definitions


def fir_taps(like: Tensor) -> Tensor:
    """[1, 3, 3, 1] / 8 in the dtype and on the device of a tensor; made there, so that nothing waits."""
    return (4.0 - 2.0 * (torch.arange(4, dtype=like.dtype, device=like.device) - 1.5).abs()) / 8.0


def _down(x: Tensor, gain: float, padding: int = 1) -> Tensor:
    with without_autocast(x):
        wide = _wide(x)
        y = F.conv2d(wide, _filter(wide, gain), stride=2, padding=padding, groups=x.shape[1])
    return y.to(x.dtype)


def _up(x: Tensor, gain: float) -> Tensor:
    with without_autocast(x):
        wide = _wide(x)
        y = F.conv_transpose2d(wide, _filter(wide, 4 * gain), stride=2, padding=1, groups=x.shape[1])
    return y.to(x.dtype)


def _filter(x: Tensor, gain: float) -> Tensor:
    """The filter in both directions, once per channel: (C, 1, 4, 4)."""
    taps = fir_taps(x)
    return (torch.outer(taps, taps) * gain).repeat(x.shape[1], 1, 1, 1)


def _wide(x: Tensor) -> Tensor:
    # Not everything: in fp32 autograd keeps twice as much.
    is_wide = convolves_well(x) and x.dtype != torch.float16
    return x if is_wide else x.to(torch.float32)


# ---------------------------------------------------------------------------------------------- the kernels

# A program has this many columns and channels of the smaller image at once: eight values for each thread, 16
# bytes of a 16-bit image. And it goes through as many rows.
_TILE, _COLUMNS, _ROWS = 1024, 16, 16


@jit
def _row_of(
    x_ptr, n, row, column, c, inside, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr
):
    """fp32 pixels (columns, channels) of a row; 0 outside the image."""
    valid = inside & ((column >= 0) & (column < WIDTH))[:, None] & (row >= 0) & (row < HEIGHT)
    x_ptr += (n * HEIGHT + row) * (WIDTH * CHANNELS)
    return tl.load(x_ptr + (column[:, None] * CHANNELS + c[None, :]), mask=valid, other=0.0).to(tl.float32)


@jit
def _filtered_row(
    x_ptr, n, row, column, c, inside, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr
):
    """A row of the larger image at half the columns: 8 times its filtered values."""
    outer = _row_of(x_ptr, n, row, 2 * column - 1, c, inside, HEIGHT, WIDTH, CHANNELS)
    inner = _row_of(x_ptr, n, row, 2 * column, c, inside, HEIGHT, WIDTH, CHANNELS)
    inner += _row_of(x_ptr, n, row, 2 * column + 1, c, inside, HEIGHT, WIDTH, CHANNELS)
    outer += _row_of(x_ptr, n, row, 2 * column + 2, c, inside, HEIGHT, WIDTH, CHANNELS)
    return 3.0 * inner + outer


@jit
def _place(
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Of a program: its sample, its first row, its columns and channels in the smaller image."""
    PIECES: tl.constexpr = (CHANNELS + WIDE - 1) // WIDE
    ACROSS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    BANDS: tl.constexpr = (HEIGHT + ROWS - 1) // ROWS
    program = tl.program_id(0)
    c = program % PIECES * WIDE + tl.arange(0, WIDE)
    program = program // PIECES
    column = program % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    program = program // ACROSS
    return (program // BANDS).to(tl.int64), program % BANDS * ROWS, column, c


@jit(do_not_specialize=["gain"])
def fir_down(
    x_ptr,
    y_ptr,
    gain,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TALL: tl.constexpr,
    BROAD: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x (N, TALL, BROAD, CHANNELS) to y (N, HEIGHT, WIDTH, CHANNELS)."""
    n, first, column, c = _place(HEIGHT, WIDTH, CHANNELS, ROWS, COLUMNS, WIDE)
    scale = tl.full((), gain, tl.float32) * 0.015625
    inside = ((column < WIDTH)[:, None]) & ((c < CHANNELS)[None, :])
    above = _filtered_row(x_ptr, n, 2 * first - 1, column, c, inside, TALL, BROAD, CHANNELS)
    upper = _filtered_row(x_ptr, n, 2 * first, column, c, inside, TALL, BROAD, CHANNELS)
    for row in range(first, min(first + ROWS, HEIGHT)):
        lower = _filtered_row(x_ptr, n, 2 * row + 1, column, c, inside, TALL, BROAD, CHANNELS)
        below = _filtered_row(x_ptr, n, 2 * row + 2, column, c, inside, TALL, BROAD, CHANNELS)
        y = (3.0 * (upper + lower) + (above + below)) * scale
        target = y_ptr + (n * HEIGHT + row) * (WIDTH * CHANNELS)
        target += column[:, None] * CHANNELS + c[None, :]
        tl.store(target, y.to(y_ptr.dtype.element_ty), mask=inside)
        above, upper = lower, below


@jit
def _doubled_row(
    x_ptr, n, row, column, c, inside, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr
):
    """A row of the smaller image at its even and odd columns of the larger: 4 times its filtered values."""
    left = _row_of(x_ptr, n, row, column - 1, c, inside, HEIGHT, WIDTH, CHANNELS)
    middle = 3.0 * _row_of(x_ptr, n, row, column, c, inside, HEIGHT, WIDTH, CHANNELS)
    right = _row_of(x_ptr, n, row, column + 1, c, inside, HEIGHT, WIDTH, CHANNELS)
    return left + middle, middle + right


@jit
def _store_pair(y_ptr, n, row, column, c, even, odd, inside, HEIGHT, WIDTH, CHANNELS):
    """A row of y (N, 2 HEIGHT, 2 WIDTH, CHANNELS)."""
    target = y_ptr + (n * (2 * HEIGHT) + row) * (2 * WIDTH * CHANNELS)
    target += column[:, None] * (2 * CHANNELS) + c[None, :]
    tl.store(target, even.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(target + CHANNELS, odd.to(y_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["gain"])
def fir_up(
    x_ptr,
    y_ptr,
    gain,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x (N, HEIGHT, WIDTH, CHANNELS) to y (N, 2 HEIGHT, 2 WIDTH, CHANNELS)."""
    n, first, column, c = _place(HEIGHT, WIDTH, CHANNELS, ROWS, COLUMNS, WIDE)
    scale = tl.full((), gain, tl.float32) * 0.0625
    inside = (column < WIDTH)[:, None] & (c < CHANNELS)[None, :]
    above_even, above_odd = _doubled_row(x_ptr, n, first - 1, column, c, inside, HEIGHT, WIDTH, CHANNELS)
    even, odd = _doubled_row(x_ptr, n, first, column, c, inside, HEIGHT, WIDTH, CHANNELS)
    for row in range(first, min(first + ROWS, HEIGHT)):
        below_even, below_odd = _doubled_row(x_ptr, n, row + 1, column, c, inside, HEIGHT, WIDTH, CHANNELS)
        upper, upper_odd = (above_even + 3.0 * even) * scale, (above_odd + 3.0 * odd) * scale
        lower, lower_odd = (3.0 * even + below_even) * scale, (3.0 * odd + below_odd) * scale
        _store_pair(y_ptr, n, 2 * row, column, c, upper, upper_odd, inside, HEIGHT, WIDTH, CHANNELS)
        _store_pair(y_ptr, n, 2 * row + 1, column, c, lower, lower_odd, inside, HEIGHT, WIDTH, CHANNELS)
        above_even, above_odd, even, odd = even, odd, below_even, below_odd


def launch_down(x: Tensor, gain: float) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    y = _empty_down(x)
    grid, sizes = _tiles(y)
    launch(
        fir_down,
        grid,
        elements=_TILE,
        x_ptr=x,
        y_ptr=y,
        gain=gain,
        TALL=x.shape[2],
        BROAD=x.shape[3],
        **sizes,
    )
    return y


def launch_up(x: Tensor, gain: float) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    y = _empty_up(x)
    grid, sizes = _tiles(x)
    launch(fir_up, grid, elements=4 * _TILE, x_ptr=x, y_ptr=y, gain=gain, **sizes)
    return y


def _tiles(smaller: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The grid over the smaller image, and the constants that say what each program takes of it."""
    count, channels, height, width = smaller.shape
    columns = min(_COLUMNS, triton.next_power_of_2(width))
    wide = min(_TILE // columns, triton.next_power_of_2(channels))
    rows = min(_ROWS, height)
    programs = count * triton.cdiv(height, rows) * triton.cdiv(width, columns) * triton.cdiv(channels, wide)
    sizes = {"HEIGHT": height, "WIDTH": width, "CHANNELS": channels}
    return (programs,), {**sizes, "ROWS": rows, "COLUMNS": columns, "WIDE": wide}


def _empty_down(x: Tensor) -> Tensor:
    return _empty(x, x.shape[2] // 2, x.shape[3] // 2)


def _empty_up(x: Tensor) -> Tensor:
    return _empty(x, 2 * x.shape[2], 2 * x.shape[3])


def _empty(x: Tensor, height: int, width: int) -> Tensor:
    shape = (*x.shape[:2], height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------- registration

_down_op = torch.library.custom_op(add_op_namespace_prefix("fir_downsample"), launch_down, mutates_args=())
_up_op = torch.library.custom_op(add_op_namespace_prefix("fir_upsample"), launch_up, mutates_args=())
_down_op.register_fake(lambda x, gain: _empty_down(x))
_up_op.register_fake(lambda x, gain: _empty_up(x))


def _keep_gain(ctx, inputs, output) -> None:
    _, ctx.gain = inputs


# Of even sizes, which the public functions see to.
_down_op.register_autograd(lambda ctx, grad: (_up_op(grad, ctx.gain / 4), None), setup_context=_keep_gain)
_up_op.register_autograd(lambda ctx, grad: (_down_op(grad, 4 * ctx.gain), None), setup_context=_keep_gain)


# ------------------------------------------------------------------------------------------- public functions

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fir_downsample(x: Tensor, *, padding: int = 1) -> Tensor:
    """Halves the resolution after low-pass filtering with [1, 3, 3, 1] / 8 along both axes.

    The kernel is for even sizes and a padding of 1. It has no forward-mode derivative; what torch.func
    transforms is computed in PyTorch.

    Args:
        x: (N, C, H, W), fp16, bf16, fp32 or float64.
        padding: zeros around x; 0 for an x that has a border of its own.
    Returns:
        (N, C, (H + 2 padding) // 2 - 1, (W + 2 padding) // 2 - 1) in the dtype of x; from the kernel channels
        last in memory.
    Raises:
        ValueError: for anything else than such an x, of at least four rows and columns with the padding.
    """
    _check(x)
    if min(x.shape[2:]) + 2 * padding < 4:
        raise ValueError(
            f"x of shape {tuple(x.shape)} is too small for a filter of 4 x 4, padded by {padding}"
        )
    takes = padding == 1 and x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0
    return _down_op(x, 1.0) if takes and _by_kernel("fir_downsample", x) else _down(x, 1.0, padding)


def fir_upsample(x: Tensor) -> Tensor:
    """Doubles the resolution: zeros between the pixels, then the filter [1, 3, 3, 1] / 4 along both axes.

    The kernel has no forward-mode derivative; what torch.func transforms is computed in PyTorch.

    Args:
        x: (N, C, H, W), fp16, bf16, fp32 or float64.
    Returns:
        (N, C, 2 H, 2 W) in the dtype of x; from the kernel channels last in memory.
    Raises:
        ValueError: for anything else than such an x.
    """
    _check(x)
    return _up_op(x, 1.0) if _by_kernel("fir_upsample", x) else _up(x, 1.0)


def _check(x: Tensor) -> None:
    if x.dim() != 4 or not x.shape[1] or x.dtype not in _DTYPES:
        raise ValueError(
            f"x must be (N, C, H, W) in fp16, bf16, fp32 or float64, got {x.dtype} of shape {tuple(x.shape)}"
        )


def _by_kernel(op: str, x: Tensor) -> bool:
    # The kernels count the elements of a row of the image in 32 bits.
    if not use_triton(x) or not x.numel() or 2 * x.shape[3] * x.shape[1] >= 2**31:
        return False
    refuse_forward_ad(op, x)
    return True
