# mypy: disable-error-code="no-untyped-def"
"""RAdam and the average of the weights: the three kernels of a step and their launches.

For a cohort whose tables are a `Plan`: the sums of the gradients' squares, one per chunk; the step's scalars,
and with them whether it happens; the new values. The formulas are in radam_ema.py, with the definition.
"""

import struct
from typing import Any

import torch
from torch import Tensor

from .radam_ema_tables import CHUNK_SIZE, COLUMNS, Plan
from .triton_support import jit, launch, tl

_CHUNK = tl.constexpr(CHUNK_SIZE)
_COLUMNS = tl.constexpr(COLUMNS)
_NORM_BLOCK = 4096
_UPDATE_BLOCK = 1024

_HEALTHY = tl.constexpr(0)
_UNSCALE = tl.constexpr(1)
_SIZE = tl.constexpr(2)
_RECTIFIED = tl.constexpr(3)
_DECAY = tl.constexpr(4)
_REST = tl.constexpr(5)
_STEP = tl.constexpr(6)
_NUM_SCALARS = 8


@jit
def _this_chunk(tensors_ptr, chunks_ptr):
    """(tensor, first element, number of elements) of this program's chunk; 0 elements in an empty tensor."""
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks_ptr + 2 * program).to(tl.int64)
    start = tl.load(chunks_ptr + 2 * program + 1).to(tl.int64) * _CHUNK
    numel = tl.load(tensors_ptr + tensor * _COLUMNS + 5)
    return tensor, start, tl.minimum(numel - start, _CHUNK).to(tl.int32)


@jit
def _pointer(address, ALIGNED: tl.constexpr):
    """To the fp32 at an address; `ALIGNED`, which is to 16 bytes, lets a thread load 128 bits at once."""
    if ALIGNED:
        # The rounding keeps the compiler from merging this pointer with an unaligned one to the same address.
        return tl.multiple_of((address // 16 * 16).to(tl.pointer_type(tl.float32)), 16)
    return address.to(tl.pointer_type(tl.float32))


@jit
def _norm_kernel(partials_ptr, gradients_ptr, tensors_ptr, chunks_ptr, BLOCK: tl.constexpr):
    """The sum of squares of each chunk of the gradients."""
    tensor, start, count = _this_chunk(tensors_ptr, chunks_ptr)
    address = tl.load(gradients_ptr + tensor)
    offsets = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    squares = tl.zeros((BLOCK,), tl.float32)
    if address % 16 == 0:
        g_ptr = _pointer(address, True) + start
        for block in range(0, whole, BLOCK):
            g = tl.load(g_ptr + block + offsets)
            squares += g * g
    else:
        g_ptr = _pointer(address, False) + start
        for block in range(0, whole, BLOCK):
            g = tl.load(g_ptr + block + offsets)
            squares += g * g
    if whole < count:
        g_ptr = _pointer(address, False) + start + whole
        g = tl.load(g_ptr + offsets, mask=offsets < count - whole, other=0.0)
        squares += g * g
    tl.store(partials_ptr + tl.program_id(0), tl.sum(squares, axis=0))


@jit
def _float64(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@jit
def _one_minus_power(beta, step):
    """1 - beta^step in fp64; the floor stands for beta = 0."""
    return 1.0 - tl.exp(step * tl.log(tl.maximum(beta, 1e-300)))


# A schedule changes these: no value of them, nor its width, may ask for machine code of its own.
@jit(do_not_specialize=["lr_bits", "decay_bits", "beta1_bits", "beta2_bits"])
def _scalars_kernel(
    scalars_ptr,
    step_ptr,
    lr_ptr,
    lr_bits: tl.int64,
    decay_ptr,
    decay_bits: tl.int64,
    beta1_bits: tl.int64,
    beta2_bits: tl.int64,
    max_norm_bits,
    grad_scale_ptr,
    found_inf_ptr,
    partials_ptr,
    num_partials,
    grad_norm_ptr,
    last_step_skipped_ptr,
    skipped_ptr,
    BLOCK: tl.constexpr,
):
    """The verdict of `RAdamEMA._inspect`, if there are sums to judge by, and `step_size`; one program.

    Python's floats come as the bits of their fp64 value, since a launch would round them to fp32.
    """
    one = tl.full((), 1.0, tl.float64)
    unscale = one
    if grad_scale_ptr is not None:
        unscale = one / tl.load(grad_scale_ptr).to(tl.float64)
    if partials_ptr is not None:
        offsets = tl.arange(0, BLOCK)
        squares = tl.zeros((BLOCK,), tl.float32)
        for block in range(0, num_partials, BLOCK):
            squares += tl.load(partials_ptr + block + offsets, mask=block + offsets < num_partials, other=0.0)
        norm = tl.sqrt(tl.sum(squares, axis=0).to(tl.float64)) * unscale
        norm = norm.to(tl.float32)
        healthy = tl.abs(norm) < float("inf")
        if found_inf_ptr is not None:
            healthy = healthy & (tl.load(found_inf_ptr) == 0.0)
        skip = 1 - healthy.to(tl.int32)
        tl.store(grad_norm_ptr, norm)
        tl.store(last_step_skipped_ptr, skip.to(tl.int1))
        tl.store(skipped_ptr, tl.load(skipped_ptr) + skip)
    else:
        norm = tl.load(grad_norm_ptr)
        healthy = tl.load(last_step_skipped_ptr).to(tl.int32) == 0
    if max_norm_bits is not None:
        max_norm = _float64(max_norm_bits)
        unscale *= max_norm / tl.maximum(norm.to(tl.float64), max_norm)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float64)
    else:
        lr = _float64(lr_bits)
    if decay_ptr is not None:
        decay = tl.load(decay_ptr).to(tl.float64)
    else:
        decay = _float64(decay_bits)

    step = tl.load(step_ptr).to(tl.float64) + 1.0
    beta2 = _float64(beta2_bits)
    correction1 = _one_minus_power(_float64(beta1_bits), step)
    correction2 = _one_minus_power(beta2, step)
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * step * (1.0 - correction2) / correction2
    rectified = rho > 5.0
    variance = (rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho)
    adaptive = tl.sqrt(tl.where(rectified, variance, one)) * tl.sqrt(correction2)
    size = lr / correction1 * tl.where(rectified, adaptive, one)

    tl.store(scalars_ptr + _HEALTHY, healthy.to(tl.float32))
    tl.store(scalars_ptr + _UNSCALE, unscale.to(tl.float32))
    tl.store(scalars_ptr + _SIZE, size.to(tl.float32))
    tl.store(scalars_ptr + _RECTIFIED, rectified.to(tl.float32))
    tl.store(scalars_ptr + _DECAY, decay.to(tl.float32))
    tl.store(scalars_ptr + _REST, (1.0 - decay).to(tl.float32))
    tl.store(scalars_ptr + _STEP, step.to(tl.float32))


@jit
def _update_block(
    p_ptr, m_ptr, v_ptr, ema_ptr, g_ptr, offsets, mask,
    unscale, size, rectified, decay, rest, weight1, beta2, weight2, eps, penalty,
    PENALTY: tl.constexpr, FROM_G: tl.constexpr,
):  # fmt: skip
    """`RAdamEMA._update` of one block."""
    p = tl.load(p_ptr + offsets, mask)
    m = tl.load(m_ptr + offsets, mask)
    v = tl.load(v_ptr + offsets, mask)
    ema = tl.load(ema_ptr + offsets, mask)
    g = tl.load(g_ptr + offsets, mask) * unscale
    if PENALTY:
        g += penalty * p
    # As torch.lerp.
    if FROM_G:
        m = g - (g - m) * (1.0 - weight1)
    else:
        m += weight1 * (g - m)
    v = v * beta2 + weight2 * g * g
    denominator = tl.where(rectified, tl.sqrt_rn(v) + eps, 1.0)
    p -= size * tl.div_rn(m, denominator)
    # As torch.lerp: ema * decay, rounded, would be off to the same side in every step.
    ema = tl.where(rest < 0.5, ema, p) + tl.where(rest < 0.5, rest, -decay) * (p - ema)
    tl.store(p_ptr + offsets, p, mask)
    tl.store(m_ptr + offsets, m, mask)
    tl.store(v_ptr + offsets, v, mask)
    tl.store(ema_ptr + offsets, ema, mask)


@jit
def _update_kernel(
    scalars_ptr, gradients_ptr, tensors_ptr, chunks_ptr, weight1, beta2, weight2, eps, penalty,
    PENALTY: tl.constexpr, FROM_G: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk's new p, m, v and ema, and with a tensor's first chunk its step; nothing if unhealthy."""
    if tl.load(scalars_ptr + _HEALTHY) == 0.0:
        return
    unscale = tl.load(scalars_ptr + _UNSCALE)
    size = tl.load(scalars_ptr + _SIZE)
    rectified = tl.load(scalars_ptr + _RECTIFIED) != 0.0
    decay = tl.load(scalars_ptr + _DECAY)
    rest = tl.load(scalars_ptr + _REST)
    weight1 = tl.full((), weight1, tl.float32)
    beta2 = tl.full((), beta2, tl.float32)
    weight2 = tl.full((), weight2, tl.float32)
    eps = tl.full((), eps, tl.float32)
    penalty = tl.full((), penalty, tl.float32)

    tensor, start, count = _this_chunk(tensors_ptr, chunks_ptr)
    row_ptr = tensors_ptr + tensor * _COLUMNS
    p_ptr = _pointer(tl.load(row_ptr), ALIGNED) + start
    m_ptr = _pointer(tl.load(row_ptr + 1), ALIGNED) + start
    v_ptr = _pointer(tl.load(row_ptr + 2), ALIGNED) + start
    ema_ptr = _pointer(tl.load(row_ptr + 3), ALIGNED) + start
    if start == 0:
        tl.store(_pointer(tl.load(row_ptr + 4), False), tl.load(scalars_ptr + _STEP))
    address = tl.load(gradients_ptr + tensor)
    offsets = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    # Gradients in the buckets of DDP begin anywhere. A branch inside the loop would be merged into one load.
    if address % 16 == 0:
        for block in range(0, whole, BLOCK):
            _update_block(
                p_ptr, m_ptr, v_ptr, ema_ptr, _pointer(address, True) + start, block + offsets, None,
                unscale, size, rectified, decay, rest, weight1, beta2, weight2, eps, penalty, PENALTY, FROM_G,
            )  # fmt: skip
    else:
        for block in range(0, whole, BLOCK):
            _update_block(
                p_ptr, m_ptr, v_ptr, ema_ptr, _pointer(address, False) + start, block + offsets, None,
                unscale, size, rectified, decay, rest, weight1, beta2, weight2, eps, penalty, PENALTY, FROM_G,
            )  # fmt: skip
    if whole < count:
        _update_block(
            p_ptr, m_ptr, v_ptr, ema_ptr, _pointer(address, False) + start, whole + offsets,
            whole + offsets < count,
            unscale, size, rectified, decay, rest, weight1, beta2, weight2, eps, penalty, PENALTY, FROM_G,
        )  # fmt: skip


def launch_norm(plan: Plan, gradients: Tensor, partials: Tensor) -> None:
    """One sum of squares per chunk, into the first places of `partials`."""
    launch(
        _norm_kernel,
        (len(plan.chunks),),
        partials_ptr=partials,
        gradients_ptr=gradients,
        tensors_ptr=plan.tensors,
        chunks_ptr=plan.chunks,
        BLOCK=_NORM_BLOCK,
        elements=_NORM_BLOCK,
    )


def launch_scalars(
    group: dict[str, Any],
    plan: Plan,
    partials: Tensor | None,
    grad_norm: Tensor,
    last_step_skipped: Tensor,
    skipped: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Tensor:
    """The step's scalars of a cohort; with `partials`, also the verdict on it and the optimizer's figures.

    Args:
        group: the optimizer's group, for lr, betas, ema_decay and max_norm.
        partials: the sums of squares of all chunks of all cohorts; None once the step has been judged.
        grad_norm, last_step_skipped, skipped: 0-dim, see RAdamEMA; written with `partials`, else read.
        grad_scale, found_inf: 0-dim or None, see RAdamEMA.
    Returns:
        fp32 (8,), by the places from _HEALTHY to _STEP.
    """
    device = grad_norm.device
    lr, decay = group["lr"], group["ema_decay"]
    scalars = grad_norm.new_empty(_NUM_SCALARS)
    launch(
        _scalars_kernel,
        (1,),
        scalars_ptr=scalars,
        step_ptr=plan.first_step,
        lr_ptr=lr.to(device) if isinstance(lr, Tensor) else None,
        lr_bits=0 if isinstance(lr, Tensor) else _bits(lr),
        decay_ptr=decay.to(device) if isinstance(decay, Tensor) else None,
        decay_bits=0 if isinstance(decay, Tensor) else _bits(decay),
        beta1_bits=_bits(group["betas"][0]),
        beta2_bits=_bits(group["betas"][1]),
        max_norm_bits=None if group["max_norm"] is None else _bits(group["max_norm"]),
        grad_scale_ptr=None if grad_scale is None else grad_scale.to(device, torch.float32),
        found_inf_ptr=None if found_inf is None else found_inf.to(device, torch.float32),
        partials_ptr=partials,
        num_partials=0 if partials is None else len(partials),
        grad_norm_ptr=grad_norm,
        last_step_skipped_ptr=last_step_skipped,
        skipped_ptr=skipped,
        BLOCK=4096,
        num_warps=8,
    )
    return scalars


def launch_update(group: dict[str, Any], plan: Plan, gradients: Tensor, scalars: Tensor) -> None:
    """The new values, by the scalars of `launch_scalars`."""
    beta1, beta2 = group["betas"]
    launch(
        _update_kernel,
        (len(plan.chunks),),
        scalars_ptr=scalars,
        gradients_ptr=gradients,
        tensors_ptr=plan.tensors,
        chunks_ptr=plan.chunks,
        weight1=1.0 - beta1,
        beta2=float(beta2),
        weight2=1.0 - beta2,
        eps=float(group["eps"]),
        penalty=float(group["weight_decay"]),
        PENALTY=group["weight_decay"] != 0.0,
        FROM_G=1.0 - beta1 >= 0.5,
        ALIGNED=plan.aligned,
        BLOCK=_UPDATE_BLOCK,
        elements=_UPDATE_BLOCK,
    )


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])
