# mypy: disable-error-code="no-untyped-def"
"""The two noisy inputs of a training pair: one image, one noise, two levels.

    student = c_in(sigma_next) (x + sigma_next z)        teacher = c_in(sigma) (x + sigma z)

with x = u / 127.5 - 1 for bytes u, mirrored where asked, and z from Philox at the element's own address.
Everything is fp32: at N = 1281 noising in bf16 makes 41 % of the elements of the two inputs equal.

Bytes per element: 1 read (uint8), 8 written; z is never stored.

It is bound by arithmetic, not by memory: Philox, and for four elements two logarithms, square roots, sines
and cosines, exact to 1e-6, are with the addresses 114 instructions per element (see
benchmarks/results/compiled-kernels.md). On an H200 512 images of 32 x 32 x 3 bytes take 8.4 us, 1.7 times
what a copy of the bytes takes.
"""

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .backend import use_triton
from .consistency_loss import c_in
from .noise_levels import NoiseLevels
from .philox import NOISE, Seed, normal, normal4, offset_arguments, philox_call, seed_tensor
from .triton_support import jit, launch, refuse_forward_ad, tl, triton

# --------------------------------------------------------------------------------------- the eager definition


def _noise(
    images: Tensor,
    levels: NoiseLevels,
    seed: Seed,
    offset: int | Tensor,
    flip: Tensor | None,
    sigma_data: float,
) -> tuple[Tensor, Tensor]:
    if images.dtype == torch.uint8:
        x_nchw = images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0
    else:
        x_nchw = images.to(torch.float32)
    if flip is not None:
        x_nchw = torch.where(flip.to(torch.bool)[:, None, None, None], x_nchw.flip(3), x_nchw)
    z_nchw = normal(x_nchw.shape, seed, offset, NOISE, device=images.device)

    def scaled_input(sigma_n: Tensor) -> Tensor:
        sigma = sigma_n.to(torch.float32)[:, None, None, None]
        noisy = c_in(sigma, sigma_data=sigma_data) * (x_nchw + sigma * z_nchw)
        return noisy.contiguous(memory_format=torch.channels_last)

    return scaled_input(levels.sigma_next), scaled_input(levels.sigma)


# ------------------------------------------------------------------------------------------------ the kernel

_STREAM = NOISE << 16
# Calls per program, of 4 elements each: two per thread. Small images share a program.
_CALLS = 256


@jit(do_not_specialize=["count", "offset"])
def _noise_kernel(
    images_ptr,
    flip_ptr,
    sigma_ptr,
    sigma_next_ptr,
    seed_ptr,
    offset_ptr,
    student_ptr,
    teacher_ptr,
    count,
    offset,
    stride_n,
    stride_h,
    stride_w,
    stride_c,
    sigma_data,
    STREAM: tl.constexpr,
    BYTES: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SAMPLES: tl.constexpr,
    CALLS: tl.constexpr,
):
    """Blocks of CALLS calls of SAMPLES samples; ELEMENTS of a sample are numbered channels-last."""
    block = tl.program_id(0) % BLOCKS
    sample = (tl.program_id(0) // BLOCKS).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    call = block * CALLS + tl.arange(0, CALLS)
    element = (block * (4 * CALLS) + tl.arange(0, 4 * CALLS)).to(tl.uint32)
    inside = sample < count
    valid = inside[:, None] & (element < ELEMENTS)[None, :]

    channel = element % CHANNELS
    column = (element // CHANNELS) % WIDTH
    row = element // (CHANNELS * WIDTH)
    source = (row * stride_h + channel * stride_c).to(tl.int32)[None, :]
    column = column.to(tl.int32)[None, :]
    if flip_ptr is not None:
        mirrored = tl.load(flip_ptr + sample, mask=inside, other=0) != 0
        column = tl.where(mirrored[:, None], WIDTH - 1 - column, column)
    pixels = (images_ptr + sample * stride_n)[:, None] + (source + column * stride_w)
    x = tl.load(pixels, mask=valid, other=0).to(tl.float32)
    if BYTES:
        x = (2.0 * x - 255.0) * 0.003921568859368563  # u / 127.5 - 1, rounded once

    number = sample + offset
    if offset_ptr is not None:
        number += tl.load(offset_ptr)
    w0, w1, w2, w3 = philox_call(seed_ptr, number[:, None], call[None, :], STREAM)
    z = tl.reshape(normal4(w0, w1, w2, w3), (SAMPLES, 4 * CALLS))

    target = sample[:, None] * ELEMENTS + element.to(tl.int32)[None, :]
    deviation = tl.full((), sigma_data, tl.float32)
    variance = deviation * deviation
    # Rounded to the last bit: an error of c_in is the same for all elements and would not average out.
    sigma = tl.load(sigma_next_ptr + sample, mask=inside, other=1.0).to(tl.float32)
    scale = tl.div_rn(1.0, tl.sqrt_rn(sigma * sigma + variance))
    tl.store(student_ptr + target, scale[:, None] * (x + sigma[:, None] * z), mask=valid)
    sigma = tl.load(sigma_ptr + sample, mask=inside, other=1.0).to(tl.float32)
    scale = tl.div_rn(1.0, tl.sqrt_rn(sigma * sigma + variance))
    tl.store(teacher_ptr + target, scale[:, None] * (x + sigma[:, None] * z), mask=valid)


def launch_noise(
    images: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    flip: Tensor | None,
    seed: Tensor,
    offset_tensor: Tensor | None,
    offset: int,
    sigma_data: float,
) -> tuple[Tensor, Tensor]:
    student, teacher = _empty_inputs(images)
    count, channels, height, width = student.shape
    span = sum(
        (size - 1) * stride for size, stride in zip(images.shape[1:], images.stride()[1:], strict=True)
    )
    if span >= 2**31:  # more than the kernel's offsets within a sample hold
        images = images.contiguous()
    strides_nhwc = images.stride()
    if images.dtype != torch.uint8:
        strides_nhwc = tuple(images.stride(dim) for dim in (0, 2, 3, 1))
    elements = channels * height * width
    calls = min(_CALLS, triton.next_power_of_2(max(1, triton.cdiv(elements, 4))))
    samples, blocks = _CALLS // calls, triton.cdiv(elements, 4 * calls)
    launch(
        _noise_kernel,
        (triton.cdiv(count, samples) * blocks,),
        elements=4 * _CALLS,
        images_ptr=images,
        flip_ptr=None if flip is None else flip.contiguous().view(torch.uint8),
        sigma_ptr=sigma.contiguous(),
        sigma_next_ptr=sigma_next.contiguous(),
        seed_ptr=seed.contiguous(),
        offset_ptr=offset_tensor,
        student_ptr=student,
        teacher_ptr=teacher,
        count=count,
        offset=offset,
        stride_n=strides_nhwc[0],
        stride_h=strides_nhwc[1],
        stride_w=strides_nhwc[2],
        stride_c=strides_nhwc[3],
        sigma_data=sigma_data,
        STREAM=_STREAM,
        BYTES=images.dtype == torch.uint8,
        WIDTH=width,
        CHANNELS=channels,
        ELEMENTS=elements,
        BLOCKS=blocks,
        SAMPLES=samples,
        CALLS=calls,
    )
    return student, teacher


_noise_op = torch.library.custom_op(add_op_namespace_prefix("noise_images"), launch_noise, mutates_args=())


@_noise_op.register_fake
def _(images, sigma, sigma_next, flip, seed, offset_tensor, offset, sigma_data):
    return _empty_inputs(images)


def _empty_inputs(images: Tensor) -> tuple[Tensor, Tensor]:
    if images.dtype == torch.uint8:
        count, height, width, channels = images.shape
    else:
        count, channels, height, width = images.shape
    student, teacher = (
        torch.empty(
            (count, channels, height, width),
            dtype=torch.float32,
            device=images.device,
            memory_format=torch.channels_last,
        )
        for _ in range(2)
    )
    return student, teacher


# -------------------------------------------------------------------------------------------- public function


def noise_images(
    images: Tensor,
    levels: NoiseLevels,
    *,
    seed: Seed,
    offset: int | Tensor = 0,
    flip: Tensor | None = None,
    sigma_data: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Noise a batch at both levels of each pair and scale it for the network.

    Args:
        images: uint8 (N, H, W, C), bytes; or floating point (N, C, H, W), already in [-1, 1].
        levels: of `sample_noise_levels`; sigma and sigma_next are (N,), in the units of images in [-1, 1].
        seed, offset: as in `sample_noise_levels` (an int is step 0: in a loop give a tensor); the same pair
            may serve both, their streams differ.
        flip: (N,) uint8 or bool; where set, the image is mirrored left to right before the noise is added.
        sigma_data: standard deviation of the data, for c_in(s) = 1/sqrt(s^2 + sigma_data^2).
    Returns:
        (student_input, teacher_input), fp32 (N, C, H, W), channels last in memory; also under autocast.
    Raises:
        ValueError: for images, levels or flip of another shape or dtype, also for bytes (N, C, H, W).
    """
    if images.dim() != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(
            "images are uint8 (N, H, W, C) or floating point (N, C, H, W); "
            f"got {images.dtype} of shape {tuple(images.shape)}"
        )
    count = images.shape[0]
    if images.dtype == torch.uint8 and images.shape[1] <= 4 < images.shape[3]:
        raise ValueError(
            f"uint8 images are (N, H, W, C); {tuple(images.shape)} looks like (N, C, H, W): give"
            " images.permute(0, 2, 3, 1)"
        )
    for name, value in (
        ("levels.sigma", levels.sigma),
        ("levels.sigma_next", levels.sigma_next),
        ("flip", flip),
    ):
        if value is not None and value.shape != (count,):
            raise ValueError(
                f"{name} must have shape ({count},) for {count} images, got {tuple(value.shape)}"
            )
    if flip is not None and flip.dtype not in (torch.uint8, torch.bool):
        raise ValueError(f"flip must be uint8 or bool, got {flip.dtype}")

    sigma_n, sigma_next_n = levels.sigma, levels.sigma_next
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (images, sigma_n, sigma_next_n))
    # The kernel counts the elements of a sample in 32 bits, and has no gradient.
    if use_triton(images, sigma_n, sigma_next_n, flip) and not differentiable and images[:1].numel() < 2**31:
        refuse_forward_ad("noise_images", images, sigma_n, sigma_next_n)
        device = images.device
        offset_tensor, offset_int = offset_arguments(offset, device)
        return _noise_op(
            images,
            sigma_n,
            sigma_next_n,
            flip,
            seed_tensor(seed, device),
            offset_tensor,
            offset_int,
            sigma_data,
        )
    return _noise(images, levels, seed, offset, flip, sigma_data)
