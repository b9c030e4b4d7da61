"""How far apart the student's and the teacher's images are: Pseudo-Huber over the whole image, and the loss.

    d(a, b) = sqrt(||a - b||^2 + c^2) - c = s / (sqrt(s + c^2) + c),   s = ||a - b||^2
    loss_n  = weight_n d(f(x + sigma_next z, sigma_next), stopgrad f(x + sigma z, sigma))

(Song & Dhariwal, "Improved Techniques for Training Consistency Models", ICLR 2024, equation 8 and section
3.3). The second form of d loses no digits where s << c^2, and is 0 with gradient 0 at s = 0 for any c. The
consistency function comes from the network's raw output F and its scaled input y = c_in(sigma) x_noisy, so
that neither images nor noise are needed again:

    f = c_skip x_noisy + c_out F = (c_skip / c_in) y + c_out F
    c_skip = sd^2 / ((s - smin)^2 + sd^2)
    c_out  = sd (s - smin) / sqrt(s^2 + sd^2)
    c_in   = 1 / sqrt(s^2 + sd^2)

Everything is computed and summed in fp32 (float64 for float64 inputs), under autocast too: a bf16 rounding of
F alone moves the difference by twice c.

Bytes per element: 16 read forward (two outputs, two inputs, fp32); 16 read and 4 written backward.
"""

import math

import torch
from torch import Tensor

from .noise_levels import NoiseLevels

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


def _pseudo_huber(squared_norm: Tensor, c: float) -> Tensor:
    """sqrt(s + c^2) - c without cancellation; the clamp keeps 0/0 away where s and c^2 both vanish."""
    root = (squared_norm + c * c).clamp_min(torch.finfo(squared_norm.dtype).tiny).sqrt()
    return squared_norm / (root + c)


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
        c: the distance at which quadratic turns linear; None: 0.00054 sqrt(d), d the elements of one sample.
        norm: "sample", the norm over the whole sample, as the paper has it; "element": sqrt(e^2 + c^2) - c of
            each element, averaged over the sample: parity with public code, not the paper's metric.
        reduction: "none", "mean" or "sum" over the samples, after weighting.
        keepdim: with reduction "none", return (N, 1, ..., 1).
    Returns:
        (N,), (N, 1, ..., 1) or a scalar; fp32, or float64 if an argument is float64. Computed so under
        autocast too.
    Raises:
        ValueError: for shapes that differ, a weight of another shape, a negative c, an unknown norm or
            reduction.
    Source:
        Song & Dhariwal 2024, equation 8.
    """
    _same_shapes(prediction=prediction, target=target)
    if norm not in ("sample", "element"):
        raise ValueError(f"norm must be 'sample' or 'element', got {norm!r}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    elements = math.prod(prediction.shape[1:])
    c = _checked_c(c, elements)
    weight_n = None if weight is None else _per_sample(weight, prediction)
    with torch.autocast(prediction.device.type, enabled=False):
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
        c: of the Pseudo-Huber metric; None: 0.00054 sqrt(d).
        metric: "pseudo-huber"; or, of consistency training of 2023, "l2", the squared L2 norm, or "l1", the
            L1 norm, each over the whole image.
    Returns:
        (N,), fp32 (float64 if an output is float64). The gradient goes to student_output alone.
    Raises:
        ValueError: for shapes that differ, levels of another shape, a negative c or an unknown metric.
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

    with torch.autocast(student_output.device.type, enabled=False):
        student = consistency_function(student_output, student_input, sigma_next_n)
        teacher = consistency_function(teacher_output.detach(), teacher_input, sigma_n)
        difference = (student - teacher).flatten(1)
        if metric == "l1":
            distance_n = difference.abs().sum(1)
        else:
            squared_norm = difference.square().sum(1)
            distance_n = squared_norm if metric == "l2" else _pseudo_huber(squared_norm, c)
        return distance_n * _wide(weight_n)


# -------------------------------------------------------------------------------------------------- arguments


def _same_shapes(**tensors: Tensor) -> None:
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes must be equal, got {', '.join(f'{n} {s}' for n, s in shapes.items())}")
    name, tensor = next(iter(tensors.items()))
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
    if tuple(value.shape) not in ((count,), ones):
        raise ValueError(f"{name} must have shape ({count},) or {ones}, got {tuple(value.shape)}")
    return value.reshape(count)


def _checked_c(c: float | None, elements: int) -> float:
    if c is None:
        return default_huber_c(elements)
    if not c >= 0.0:
        raise ValueError(f"c must be at least 0, got {c}")
    return c
