"""diffusers' research script of consistency training (train_cm_ct_unconditional.py).

Its convention: denoised images of student and teacher (N, C, H, W), weights (N, 1, 1, 1), one scalar wanted;
sigmas (N,). As it stands, the metric is applied per element, c_in lacks the square root, c_out lacks
sigma_data, the boundary lies at 0 instead of sigma_min (the pipeline that samples has all three right), the
teacher's dropout masks are the student's on a CPU only, and with several processes only the main one follows
the curriculum.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ..consistency_loss import c_in, c_out, c_skip, pseudo_huber_loss
from .patch import Patch, ours, owners


def precondition(
    sigmas: Tensor, *, sigma_data: float = 0.5, sigma_min: float = 0.002
) -> tuple[Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in) of f(x, s) = c_skip x + c_out F(c_in x), each of the shape of sigmas, fp32.

    They are those of diffusers' CMStochasticIterativeScheduler: f(x, sigma_min) = x.
    """
    return (
        c_skip(sigmas, sigma_data=sigma_data, sigma_min=sigma_min),
        c_out(sigmas, sigma_data=sigma_data, sigma_min=sigma_min),
        c_in(sigmas, sigma_data=sigma_data),
    )


def consistency_loss(
    student_denoised: Tensor,
    teacher_denoised: Tensor,
    weight: Tensor | None = None,
    *,
    huber_c: float | None = None,
) -> Tensor:
    """The mean over the batch of the weighted Pseudo-Huber distances, a scalar.

    Args:
        student_denoised, teacher_denoised: (N, C, H, W), any floating dtype.
        weight: (N,) or (N, 1, 1, 1), the script's lambda_t.
        huber_c: the script's args.huber_c; None: 0.00054 sqrt(C H W), which is its default.
    Raises:
        ValueError: for shapes that do not fit.
    """
    return pseudo_huber_loss(student_denoised, teacher_denoised, weight, c=huber_c, reduction="mean")


@ours
def get_input_preconditioning(
    sigmas: Tensor, sigma_data: float = 0.5, input_precond_type: str = "cm"
) -> Tensor:
    """The script's function of this name: 1/sqrt(sigma^2 + sigma_data^2) for "cm", ones for "none"."""
    if input_precond_type == "none":
        return torch.ones_like(sigmas)
    if input_precond_type != "cm":
        raise ValueError(f"input_precond_type must be 'cm' or 'none', got {input_precond_type!r}")
    return c_in(sigmas, sigma_data=sigma_data)


def scalings_for_boundary_conditions(
    timestep: Tensor, sigma_data: float = 0.5, timestep_scaling: float = 1.0, sigma_min: float = 0.002
) -> tuple[Tensor, Tensor]:
    """The script's function of this name: (c_skip, c_out), with the boundary at sigma_min."""
    return precondition(timestep_scaling * timestep, sigma_data=sigma_data, sigma_min=sigma_min)[:2]


def apply_ict_kernels_to_diffusers_cm(script: Any, *, sigma_min: float = 0.002) -> Patch:
    """Replaces the script's two preconditioning functions; its loss stands in main() and is edited by hand.

    Args:
        script: train_cm_ct_unconditional as a module, or sys.modules["__main__"] from inside it.
        sigma_min: the script's args.sigma_min, with which its scheduler samples.
    Returns:
        Call it to undo.
    Raises:
        ValueError: if it does not define them.
    """
    names = ("get_input_preconditioning", "scalings_for_boundary_conditions")
    module = owners(script, names, "train_cm_ct_unconditional", "train_cm_ct_unconditional")[0]
    scalings = ours(functools.partial(scalings_for_boundary_conditions, sigma_min=sigma_min))
    return Patch({(module, names[0]): get_input_preconditioning, (module, names[1]): scalings})
