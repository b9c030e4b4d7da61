# mypy: disable-error-code="no-untyped-def"
"""How far apart the student's and the teacher's images are: Pseudo-Huber over the whole image, and the loss.

    d(a, b) = sqrt(||a - b||^2 + c^2) - c = s / (sqrt(s + c^2) + c),   s = ||a - b||^2
    loss_n  = weight_n d(f(x + sigma_next z, sigma_next), stopgrad f(x + sigma z, sigma))

(Song & Dhariwal, "Improved Techniques for Training Consistency Models", ICLR 2024, equation 8 and section
3.3). The second form of d loses no digits where s << c^2, and is 0 with gradient 0 at s = 0 for any c. For
the method of 2023 d may be the mean of (a - b)^2 or of |a - b| over the image's elements, as its authors'
code has it; the paper's equations have the sum, with which their learning rate for CIFAR-10 diverges within
five steps (seen at half the network's width). The consistency function comes from the network's raw output F
and its scaled input y = c_in(sigma) x_noisy, so that neither images nor noise are needed again:

    f = c_skip x_noisy + c_out F = (c_skip / c_in) y + c_out F
    c_skip = sd^2 / ((s - smin)^2 + sd^2)
    c_out  = sd (s - smin) / sqrt(s^2 + sd^2)
    c_in   = 1 / sqrt(s^2 + sd^2)

Everything is computed and summed in fp32 (float64 for float64 inputs), under autocast too: a bf16 rounding of
F alone moves the difference by twice c.

Bytes per element: 16 read forward (two outputs, two inputs, fp32), and where a gradient is to follow 4
written, the difference, so that backward reads 4 instead of those 16, and writes 4. The kernels read each
tensor once, in whatever layout the student's output has; one in another layout is copied first.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .backend import use_triton, without_autocast
from .noise_levels import NoiseLevels
from .triton_support import jit, launch, refuse_forward_ad, tl, triton

# --------------------------------------------------------------------------------------- the eager definition


def c_skip(sigma: Tensor, *, sigma_data: float = 0.5, sigma_min: float = 0.002) -> Tensor:
    """Weight of the noisy image in f: sd^2 / ((sigma - sigma_min)^2 + sd^2); exactly 1 at sigma_min.

    Args:
        sigma: noise level, any shape; float64 is computed in float64, everything else in fp32.
    """
    return sigma_data**2 / ((_wide(sigma) - sigma_min).square() + sigma_data**2)


def c_out(sigma: Tensor, *, sigma_data: float = 0.5, sigma_min: float = 0.002) -> Tensor:
    """Weight of the network in f: sd (sigma - sigma_min) / sqrt(sigma^2 + sd^2); exactly 0 at sigma_min."""
    sigma = _wide(sigma)
    return sigma_data * (sigma - sigma_min) / (sigma.square() + sigma_data**2).sqrt()


def c_in(sigma: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """Scale of the network's input: 1 / sqrt(sigma^2 + sd^2), so that it has unit variance."""
    return (_wide(sigma).square() + sigma_data**2).rsqrt()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def default_huber_c(elements: int) -> float:
    """c = 0.00054 sqrt(d) for images of d elements (Song & Dhariwal 2024): 0.0299 for CIFAR-10."""
    return 0.00054 * math.sqrt(elements)


def _pseudo_huber(squared_norm: Tensor, c: float | Tensor) -> Tensor:
    """sqrt(s + c^2) - c without cancellation; the clamp keeps 0/0 away where s and c^2 both vanish."""
    root = (squared_norm + c * c).clamp_min(torch.finfo(squared_norm.dtype).tiny).sqrt()
    return squared_norm / (root + c)


# ------------------------------------------------------------------------------------------------ the kernels

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Elements of a block, 8 per thread. Up to _LONGEST a program takes a whole sample; longer ones are split
# among programs of _SPAN, whose sums a second kernel adds. (At 8 blocks per program ptxas spilled on sm_90.)
_BLOCK = 2048
_LEAST_BLOCK = 256  # 16 bytes for each thread of a warp, of any dtype
_LONGEST = 6 * _BLOCK
_SPAN = 4 * _BLOCK


@jit
def _preconditioning(sigma_ptr, sample, sigma_data, sigma_min):
    """(c_skip / c_in, c_out) at a sample's level, every operation rounded once."""
    sigma = tl.load(sigma_ptr + sample).to(tl.float32)
    deviation = tl.full((), sigma_data, tl.float32)
    above = sigma - tl.full((), sigma_min, tl.float32)
    variance = deviation * deviation
    root = tl.sqrt_rn(sigma * sigma + variance)
    return tl.div_rn(variance, above * above + variance) * root, tl.div_rn(deviation * above, root)


@jit
def _read(student_ptr, teacher_ptr, student_input_ptr, teacher_input_ptr, position, valid):
    """A block of each tensor; of `pseudo_huber_loss`, which has no inputs, the first two again."""
    student = tl.load(student_ptr + position, mask=valid, other=0.0)
    teacher = tl.load(teacher_ptr + position, mask=valid, other=0.0)
    student_input, teacher_input = student, teacher
    if student_input_ptr is not None:
        student_input = tl.load(student_input_ptr + position, mask=valid, other=0.0)
        teacher_input = tl.load(teacher_input_ptr + position, mask=valid, other=0.0)
    return student, teacher, student_input, teacher_input


@jit
def _difference(block, skip_s, out_s, skip_t, out_t, PRECONDITIONED: tl.constexpr):
    """f_student - f_teacher of a block that was read; or prediction - target."""
    student, teacher = block[0].to(tl.float32), block[1].to(tl.float32)
    if PRECONDITIONED:
        # Fused by name, so that equal arguments give equal values: a compiler could fuse the two differently.
        student = tl.fma(skip_s, block[2].to(tl.float32), out_s * student)
        teacher = tl.fma(skip_t, block[3].to(tl.float32), out_t * teacher)
    return student - teacher


@jit
def _clamped(squared, c):
    """(s + c^2, the same but at least the smallest normal number)."""
    inner = squared + c * c
    return inner, tl.maximum(inner, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL)


@jit
def _huber(squared, c):
    _, clamped = _clamped(squared, c)
    return tl.div_rn(squared, tl.sqrt_rn(clamped) + c)


@jit
def _huber_slope(squared, c):
    """Twice the derivative of `_huber` by its first argument: 1 / root, where the clamp does not act.

    Where the sum of squares overflows the loss is NaN, and so is its gradient: 0 would hide it.
    """
    inner, clamped = _clamped(squared, c)
    root = tl.sqrt_rn(clamped)
    slope = tl.where(inner == clamped, 1.0 / root, 2.0 / (root + c))
    return tl.where(squared < float("inf"), slope, float("nan"))


@jit
def _finish(
    total, distance_ptr, loss_ptr, weight_ptr, sample, c, METRIC: tl.constexpr, ELEMENTS: tl.constexpr
):
    if METRIC == "pseudo-huber":
        loss = _huber(total, c)
    else:
        loss = total * (1.0 / ELEMENTS)
    if weight_ptr is not None:
        loss *= tl.load(weight_ptr + sample).to(tl.float32)
    tl.store(distance_ptr + sample, total)
    tl.store(loss_ptr + sample, loss)


@jit
def _forward_kernel(
    student_ptr,
    teacher_ptr,
    student_input_ptr,
    teacher_input_ptr,
    sigma_next_ptr,
    sigma_ptr,
    weight_ptr,
    partial_ptr,
    difference_ptr,
    distance_ptr,
    loss_ptr,
    sigma_data,
    sigma_min,
    c,
    METRIC: tl.constexpr,
    ELEMENTS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum over SPAN elements of a sample, into partial_ptr; into the loss where that is all of them."""
    sample = (tl.program_id(0) // SPLITS).to(tl.int64)
    element = (tl.program_id(0) % SPLITS).to(tl.int64) * SPAN + tl.arange(0, BLOCK)
    position = sample * ELEMENTS + element
    # Each block is read before the last one is used, and the first before the preconditioning, whose rounded
    # operations are branches that no load is moved across.
    block = _read(
        student_ptr, teacher_ptr, student_input_ptr, teacher_input_ptr, position, element < ELEMENTS
    )
    skip_s, out_s, skip_t, out_t = 0.0, 0.0, 0.0, 0.0
    if student_input_ptr is not None:
        skip_s, out_s = _preconditioning(sigma_next_ptr, sample, sigma_data, sigma_min)
        skip_t, out_t = _preconditioning(sigma_ptr, sample, sigma_data, sigma_min)
    c = tl.full((), c, tl.float32)
    accumulator = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(BLOCK, SPAN + BLOCK, BLOCK):
        ready = block
        if start < SPAN:
            block = _read(
                student_ptr,
                teacher_ptr,
                student_input_ptr,
                teacher_input_ptr,
                position + start,
                element + start < ELEMENTS,
            )
        difference = _difference(ready, skip_s, out_s, skip_t, out_t, student_input_ptr is not None)
        if difference_ptr is not None:
            at = position + (start - BLOCK)
            tl.store(difference_ptr + at, difference, mask=element + (start - BLOCK) < ELEMENTS)
        if METRIC == "l1":
            accumulator += tl.abs(difference)
        elif METRIC == "elementwise pseudo-huber":
            accumulator += _huber(difference * difference, c)
        else:
            accumulator += difference * difference
    total = tl.sum(accumulator, axis=0)
    if SPLITS == 1:
        _finish(total, distance_ptr, loss_ptr, weight_ptr, sample, c, METRIC, ELEMENTS)
    else:
        tl.store(partial_ptr + tl.program_id(0), total)


@jit
def _reduce_kernel(
    partial_ptr,
    distance_ptr,
    loss_ptr,
    weight_ptr,
    c,
    METRIC: tl.constexpr,
    ELEMENTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of a sample's partial sums, and its loss."""
    sample = tl.program_id(0).to(tl.int64)
    accumulator = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, SPLITS, BLOCK):
        split = start + tl.arange(0, BLOCK)
        accumulator += tl.load(partial_ptr + sample * SPLITS + split, mask=split < SPLITS, other=0.0)
    c = tl.full((), c, tl.float32)
    _finish(tl.sum(accumulator, axis=0), distance_ptr, loss_ptr, weight_ptr, sample, c, METRIC, ELEMENTS)


@jit(do_not_specialize=["grad_stride"])
def _backward_kernel(
    grad_loss_ptr,
    difference_ptr,
    sigma_next_ptr,
    weight_ptr,
    distance_ptr,
    grad_ptr,
    grad_stride,
    sigma_data,
    sigma_min,
    c,
    METRIC: tl.constexpr,
    ELEMENTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d loss / d student_output of one block: (grad_loss weight c_out) times the metric's slope."""
    sample = (tl.program_id(0) // BLOCKS).to(tl.int64)
    element = (tl.program_id(0) % BLOCKS).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    position = sample * ELEMENTS + element
    valid = element < ELEMENTS
    difference = tl.load(difference_ptr + position, mask=valid, other=0.0)
    scale = tl.load(grad_loss_ptr + sample * grad_stride).to(tl.float32)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + sample).to(tl.float32)
    if sigma_next_ptr is not None:
        _, out = _preconditioning(sigma_next_ptr, sample, sigma_data, sigma_min)
        scale *= out
    c = tl.full((), c, tl.float32)
    if METRIC == "pseudo-huber":
        scale *= _huber_slope(tl.load(distance_ptr + sample), c)
    elif METRIC == "l2":
        scale *= 2.0 / ELEMENTS
    else:
        scale *= 1.0 / ELEMENTS
    if METRIC == "l1":
        positive, negative = (difference > 0).to(tl.float32), (difference < 0).to(tl.float32)
        gradient = scale * tl.where(difference != difference, difference, positive - negative)
    elif METRIC == "elementwise pseudo-huber":
        gradient = scale * (difference * _huber_slope(difference * difference, c))
    else:
        gradient = scale * difference
    tl.store(grad_ptr + position, gradient.to(grad_ptr.dtype.element_ty), mask=valid)


def _memory_format(x: Tensor) -> torch.memory_format:
    """The dense layout nearest to a tensor's own, in which all tensors of an op are read."""
    if not x.is_contiguous() and x.dim() in (4, 5) and x.stride(1) < x.stride(-1):
        return torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format


def _dense(x: Tensor | None, layout: torch.memory_format) -> Tensor | None:
    return None if x is None else x.contiguous(memory_format=layout)


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def launch_loss(
    student_output: Tensor,
    teacher_output: Tensor,
    student_input: Tensor | None,
    teacher_input: Tensor | None,
    sigma_next: Tensor | None,
    sigma: Tensor | None,
    weight: Tensor | None,
    sigma_data: float,
    sigma_min: float,
    c: float,
    metric: str,
    for_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, distance before weight and square root), each (N,) fp32; and f_student - f_teacher.

    The difference is (N, ...) fp32, in the layout of student_output made dense; (0,) if not `for_gradient`.
    """
    layout = _memory_format(student_output)
    count = student_output.shape[0]
    elements = math.prod(student_output.shape[1:])
    loss, distance, difference = _empty_results(student_output, for_gradient)
    splits = 1 if elements <= _LONGEST else triton.cdiv(elements, _SPAN)
    block = min(_BLOCK, max(_LEAST_BLOCK, triton.next_power_of_2(elements)))
    span = block * max(1, triton.cdiv(triton.cdiv(elements, splits), block))
    partial = distance.new_empty(count, splits) if splits > 1 else None
    reduced: dict[str, Any] = {
        "distance_ptr": distance,
        "loss_ptr": loss,
        "weight_ptr": _flat(weight),
        "c": c,
    }
    launch(
        _forward_kernel,
        (count * splits,),
        num_warps=_warps(block),
        maxnreg=128,  # left to itself, ptxas stays below 48 in one case for sm_100, and spills
        elements=span,
        student_ptr=_dense(student_output, layout),
        teacher_ptr=_dense(teacher_output, layout),
        student_input_ptr=_dense(student_input, layout),
        teacher_input_ptr=_dense(teacher_input, layout),
        sigma_next_ptr=_flat(sigma_next),
        sigma_ptr=_flat(sigma),
        partial_ptr=partial,
        difference_ptr=difference if for_gradient else None,
        sigma_data=sigma_data,
        sigma_min=sigma_min,
        METRIC=metric,
        ELEMENTS=elements,
        SPLITS=splits,
        SPAN=span,
        BLOCK=block,
        **reduced,
    )
    if partial is not None:
        launch(
            _reduce_kernel,
            (count,),
            num_warps=1,
            partial_ptr=partial,
            METRIC=metric,
            ELEMENTS=elements,
            SPLITS=splits,
            BLOCK=min(1024, triton.next_power_of_2(splits)),
            **reduced,
        )
    return loss, distance, difference


def launch_loss_backward(
    grad_loss: Tensor,
    student_output: Tensor,
    difference: Tensor,
    sigma_next: Tensor | None,
    weight: Tensor | None,
    distance: Tensor,
    sigma_data: float,
    sigma_min: float,
    c: float,
    metric: str,
) -> Tensor:
    """The gradient of student_output, in its dtype and its layout made dense.

    student_output itself is not read: as an argument it makes autograd ask for second derivatives, and fail.
    """
    gradient = torch.empty_like(difference, dtype=student_output.dtype)
    elements = math.prod(difference.shape[1:])
    block = min(_BLOCK, max(_LEAST_BLOCK, triton.next_power_of_2(elements)))
    blocks = triton.cdiv(elements, block)
    launch(
        _backward_kernel,
        (difference.shape[0] * blocks,),
        num_warps=_warps(block),
        elements=block,
        grad_loss_ptr=grad_loss,
        difference_ptr=difference,
        sigma_next_ptr=_flat(sigma_next),
        weight_ptr=_flat(weight),
        distance_ptr=distance,
        grad_ptr=gradient,
        grad_stride=grad_loss.stride(0),
        sigma_data=sigma_data,
        sigma_min=sigma_min,
        c=c,
        METRIC=metric,
        ELEMENTS=elements,
        BLOCKS=blocks,
        BLOCK=block,
    )
    return gradient


def _warps(block: int) -> int:
    return max(1, block // 256)


def _empty_results(student_output: Tensor, for_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    loss, distance = (student_output.new_empty(student_output.shape[:1], dtype=torch.float32) for _ in "ab")
    if not for_gradient:
        return loss, distance, loss.new_empty(0)
    layout = _memory_format(student_output)
    return loss, distance, torch.empty_like(student_output, dtype=torch.float32, memory_format=layout)


# ---------------------------------------------------------------------------------------------------- the ops

_loss_op = torch.library.custom_op(add_op_namespace_prefix("consistency_loss"), launch_loss, mutates_args=())
_backward_op = torch.library.custom_op(
    add_op_namespace_prefix("consistency_loss_backward"), launch_loss_backward, mutates_args=()
)


@_loss_op.register_fake
def _(student_output, *args):
    return _empty_results(student_output, args[-1])


@_backward_op.register_fake
def _(grad_loss, student_output, difference, *args):
    return torch.empty_like(difference, dtype=student_output.dtype)


def _save(ctx, inputs, output):
    student_output, _, _, _, sigma_next, _, weight, *ctx.numbers, _ = inputs
    _, distance, difference = output
    ctx.mark_non_differentiable(distance, difference)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(student_output, difference, sigma_next, weight, distance)


def _backward(ctx, grad_loss, *_):
    gradient = None
    if grad_loss is not None and ctx.needs_input_grad[0]:
        gradient = _backward_op(grad_loss, *ctx.saved_tensors, *ctx.numbers)
    return gradient, *[None] * 11


_loss_op.register_autograd(_backward, setup_context=_save)


# ------------------------------------------------------------------------------------------- public functions


def pseudo_huber_loss(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    c: float | None = None,
    norm: str = "sample",
    reduction: str = "none",
    keepdim: bool = False,
) -> Tensor:
    """Pseudo-Huber distance of each sample, sqrt(||prediction - target||_2^2 + c^2) - c, times its weight.

    Args:
        prediction: (N, ...), any floating dtype and layout.
        target: the same shape; receives no gradient.
        weight: (N,), or (N, 1, ..., 1) with as many dimensions as prediction, or None for 1.
        c: the distance at which quadratic turns linear, a number and no tensor; None: 0.00054 sqrt(d), d the
            elements of one sample.
        norm: "sample", the norm over the whole sample, as the paper has it; "element": sqrt(e^2 + c^2) - c of
            each element, averaged over the sample: parity with public code, not the paper's metric.
        reduction: "none", "mean" or "sum" over the samples, after weighting.
        keepdim: with reduction "none", return (N, 1, ..., 1).
    Returns:
        (N,), (N, 1, ..., 1) or a scalar; fp32, or float64 if an argument is float64. Computed so under
        autocast too.
    Raises:
        ValueError: for shapes that differ, a weight of another shape, a negative or tensor c, an unknown norm
            or reduction, or keepdim with a reduction, which leaves no samples to keep.
    Source:
        Song & Dhariwal 2024, equation 8.
    """
    _same_shapes(prediction=prediction, target=target)
    if norm not in ("sample", "element"):
        raise ValueError(f"norm must be 'sample' or 'element', got {norm!r}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if keepdim and reduction != "none":
        raise ValueError(f"keepdim=True is for reduction='none', got reduction={reduction!r}")
    elements = math.prod(prediction.shape[1:])
    c = _checked_c(c, elements)
    weight_n = None if weight is None else _per_sample(weight, prediction)
    with without_autocast(prediction):
        if _takes(prediction, target, weight_n):
            refuse_forward_ad("pseudo_huber_loss", prediction, weight_n)
            metric = "pseudo-huber" if norm == "sample" else "elementwise pseudo-huber"
            outside = weight_n is not None and weight_n.requires_grad  # the op has no gradient for it
            inside_n = None if outside else weight_n
            for_gradient = torch.is_grad_enabled() and prediction.requires_grad
            loss_n, _, _ = _loss_op(
                prediction, target.detach(), *[None] * 4, inside_n, 0.0, 0.0, c, metric, for_gradient
            )
            weight_n = weight_n if outside else None
        else:
            difference = (_wide(prediction) - _wide(target.detach())).flatten(1)
            if norm == "sample":
                loss_n = _pseudo_huber(difference.square().sum(1), c)
            else:
                loss_n = _pseudo_huber(difference.square(), c).mean(1)
        if weight_n is not None:
            loss_n = loss_n * _wide(weight_n)
        if reduction == "mean":
            return loss_n.mean()
        if reduction == "sum":
            return loss_n.sum()
        return loss_n.reshape(-1, *[1] * (prediction.dim() - 1)) if keepdim else loss_n


def consistency_loss(
    student_output: Tensor,
    teacher_output: Tensor,
    student_input: Tensor,
    teacher_input: Tensor,
    levels: NoiseLevels,
    *,
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
    c: float | None = None,
    metric: str = "pseudo-huber",
) -> Tensor:
    """The weighted consistency loss of each sample, from raw network outputs and the scaled inputs.

    Args:
        student_output, teacher_output: (N, ...) raw outputs F at sigma_next and sigma, any floating dtype and
            layout.
        student_input, teacher_input: the same shape: what `noise_images` returned, c_in applied.
        levels: of `sample_noise_levels`; sigma, sigma_next and weight are (N,).
        sigma_data, sigma_min: of the preconditioning.
        c: of the Pseudo-Huber metric, a number and no tensor; None: 0.00054 sqrt(d).
        metric: "pseudo-huber" over the whole image; or, of consistency training of 2023, "l2" or "l1": the
            mean square or mean magnitude of its elements, as in the authors' code. The paper's equations have
            their sum.
    Returns:
        (N,), fp32 (float64 if an output is float64). The gradient goes to student_output alone.
    Raises:
        ValueError: for shapes that differ, levels of another shape, a negative or tensor c or an unknown
            metric.
    Source:
        Song & Dhariwal 2024, equations 5 and 8.
    """
    _same_shapes(
        student_output=student_output,
        teacher_output=teacher_output,
        student_input=student_input,
        teacher_input=teacher_input,
    )
    if metric not in ("pseudo-huber", "l2", "l1"):
        raise ValueError(f"metric must be 'pseudo-huber', 'l2' or 'l1', got {metric!r}")
    c = _checked_c(c, math.prod(student_output.shape[1:]))
    sigma_next_n, sigma_n, weight_n = (
        _per_sample(t.detach(), student_output, f"levels.{name}")
        for t, name in ((levels.sigma_next, "sigma_next"), (levels.sigma, "sigma"), (levels.weight, "weight"))
    )

    def consistency_function(output: Tensor, scaled_input: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.reshape(-1, *[1] * (output.dim() - 1))
        skip = c_skip(sigma, sigma_data=sigma_data, sigma_min=sigma_min) / c_in(sigma, sigma_data=sigma_data)
        out = c_out(sigma, sigma_data=sigma_data, sigma_min=sigma_min)
        return skip * _wide(scaled_input.detach()) + out * _wide(output)

    if _takes(student_output, teacher_output, student_input, teacher_input, sigma_next_n, sigma_n, weight_n):
        refuse_forward_ad("consistency_loss", student_output)
        loss_n, _, _ = _loss_op(
            student_output,
            teacher_output.detach(),
            student_input.detach(),
            teacher_input.detach(),
            sigma_next_n,
            sigma_n,
            weight_n,
            sigma_data,
            sigma_min,
            c,
            metric,
            torch.is_grad_enabled() and student_output.requires_grad,
        )
        return loss_n

    with without_autocast(student_output):
        student = consistency_function(student_output, student_input, sigma_next_n)
        teacher = consistency_function(teacher_output.detach(), teacher_input, sigma_n)
        difference = (student - teacher).flatten(1)
        if metric == "pseudo-huber":
            distance_n = _pseudo_huber(difference.square().sum(1), c)
        else:
            distance_n = (difference.square() if metric == "l2" else difference.abs()).mean(1)
        return distance_n * _wide(weight_n)


# -------------------------------------------------------------------------------------------------- arguments


def _takes(images: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take these arguments, of which the first has a sample's elements: at least one."""
    tensors = images, *others
    able = use_triton(*tensors) and all(t is None or t.dtype in _DTYPES for t in tensors)
    return able and 0 not in images.shape[1:]


def _same_shapes(**tensors: Tensor) -> None:
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    name, tensor = next(iter(tensors.items()))
    if any(shape != shapes[name] for shape in shapes.values()):  # no set: sizes may be symbols
        raise ValueError(f"shapes must be equal, got {', '.join(f'{n} {s}' for n, s in shapes.items())}")
    if tensor.dim() < 2:
        raise ValueError(
            f"{name} must have shape (N, ...) with at least 2 dimensions, got {tuple(tensor.shape)}"
        )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")


def _per_sample(value: Tensor, like: Tensor, name: str = "weight") -> Tensor:
    """(N,) from (N,) or (N, 1, ..., 1); anything else could broadcast to a matrix of losses."""
    count = like.shape[0]
    ones = (count,) + (1,) * (like.dim() - 1)
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor of shape ({count},) or {ones}, got {value!r}")
    if tuple(value.shape) not in ((count,), ones):
        raise ValueError(f"{name} must have shape ({count},) or {ones}, got {tuple(value.shape)}")
    return value.reshape(count)


def _checked_c(c: float | None, elements: int) -> float:
    if c is None:
        return default_huber_c(elements)
    if isinstance(c, Tensor):  # the kernels have no gradient for it
        raise ValueError(f"c must be a number, got a tensor of shape {tuple(c.shape)}")
    if not 0.0 <= c < math.inf:
        raise ValueError(f"c must be at least 0 and finite, got {c}")
    return c
