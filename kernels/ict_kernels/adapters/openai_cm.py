"""openai/consistency_models: improved consistency training in `KarrasDenoiser.consistency_losses`.

Its convention: images fp32 (N, C, H, W) in [-1, 1]; the grid descends, so index i is the noisier level, the
student's; weights (N,); the model is called with c_in x and 1000/4 ln(sigma); {"loss": (N,)} is returned. It
trains by the recipe of 2023 (uniform indices, weight 1 in its published commands, L1, L2 or LPIPS, an EMA
teacher) and shares dropout masks on a CPU only.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..consistency_loss import pseudo_huber_loss
from ..noise_levels import checked_scales, sample_noise_levels
from ..philox import Seed
from ..shared_dropout import SharedDropout, forget_casts
from .patch import Patch, ours, owners


def consistency_losses(
    denoiser: Any,
    model: Callable[..., Tensor],
    x_start: Tensor,
    num_scales: int,
    model_kwargs: dict[str, Any] | None = None,
    *,
    noise: Tensor | None = None,
    p_mean: float = -1.1,
    p_std: float = 2.0,
    seed: Seed = None,
    offset: int | Tensor = 0,
) -> dict[str, Tensor]:
    """The loss of improved consistency training, in the form of `KarrasDenoiser.consistency_losses`.

    Args:
        denoiser: a KarrasDenoiser with distillation=True, as its consistency modes make it (without, its
            preconditioning lacks the boundary condition). sigma_min, sigma_max, rho and denoise() are read.
        model: called by denoiser.denoise; student and teacher alike (the teacher without gradients, and
            without the DistributedDataParallel around it).
        x_start: (N, C, H, W) fp32 in [-1, 1].
        num_scales: N(k), counting grid points; a tensor is read by the host.
        model_kwargs: passed on to the model.
        noise: like x_start; None: drawn by torch.randn_like.
        p_mean, p_std: of ln sigma.
        seed, offset: of the noise levels, see `sample_noise_levels`.
    Returns:
        {"loss": (N,)} fp32, weighted.
    Raises:
        ValueError: for a denoiser without the boundary condition, or another num_scales than an int.
    Source:
        Song & Dhariwal, "Improved Techniques for Training Consistency Models", ICLR 2024.
    """
    if not denoiser.distillation:
        raise ValueError(
            "consistency training needs KarrasDenoiser(distillation=True), got distillation=False"
        )
    model_kwargs = {} if model_kwargs is None else model_kwargs
    levels = sample_noise_levels(
        x_start.shape[0],
        checked_scales(num_scales),
        p_mean=p_mean,
        p_std=p_std,
        sigma_min=denoiser.sigma_min,
        sigma_max=denoiser.sigma_max,
        rho=denoiser.rho,
        seed=seed,
        offset=offset,
        device=x_start.device,
    )
    noise = torch.randn_like(x_start) if noise is None else noise
    teacher = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model

    def denoised(network: Any, sigma_n: Tensor) -> Tensor:
        x_t = x_start + sigma_n.reshape(-1, *[1] * (x_start.dim() - 1)) * noise
        return denoiser.denoise(network, x_t, sigma_n, **model_kwargs)[1]

    masks = SharedDropout(teacher, x_start.device)
    with masks, torch.no_grad():
        target = denoised(teacher, levels.sigma)
    forget_casts()
    with masks:
        prediction = denoised(model, levels.sigma_next)
    return {"loss": pseudo_huber_loss(prediction, target, levels.weight)}


def ict_ema_and_scales_fn(
    total_steps: int, s0: int = 10, s1: int = 1280
) -> Callable[[int], tuple[float, int]]:
    """What `create_ema_and_scales_fn` returns, for the curriculum of 2024: step -> (0.0, N(k)).

    Args:
        total_steps: K of the whole run; shorter runs than 8 steps keep the first stages.
        s0, s1: first and last number of intervals; it doubles in between, in equal stages.
    """
    stage_length = max(1, math.floor(total_steps / (math.log2(s1 // s0) + 1)))

    def ema_and_scales(step: int) -> tuple[float, int]:
        return 0.0, min(s0 * 2 ** (int(step) // stage_length), s1) + 1

    return ema_and_scales


def apply_ict_kernels_to_openai_cm(karras_diffusion: Any) -> Patch:
    """Replaces `KarrasDenoiser.consistency_losses`; distillation from a teacher model stays as it was.

    Args:
        karras_diffusion: the module cm.karras_diffusion.
    Returns:
        Call it to undo.
    Raises:
        ValueError: if the module has no KarrasDenoiser.
    """
    module = owners(karras_diffusion, ("KarrasDenoiser",), "karras_diffusion", "cm.karras_diffusion")[0]
    original = module.KarrasDenoiser.consistency_losses

    @ours
    @functools.wraps(original)
    def patched(
        self: Any,
        model: Any,
        x_start: Tensor,
        num_scales: int,
        model_kwargs: dict[str, Any] | None = None,
        target_model: Any = None,
        teacher_model: Any = None,
        teacher_diffusion: Any = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if teacher_model is not None:
            return original(
                self,
                model,
                x_start,
                num_scales,
                model_kwargs=model_kwargs,
                target_model=target_model,
                teacher_model=teacher_model,
                teacher_diffusion=teacher_diffusion,
                noise=noise,
            )
        # The teacher has the student's weights: an EMA of them, target_model, is not evaluated.
        return consistency_losses(self, model, x_start, num_scales, model_kwargs, noise=noise)

    return Patch({(module.KarrasDenoiser, "consistency_losses"): patched})
