"""Kinyugo/consistency_models: its metric, its index distribution, and the dropout of its training step.

Its convention: pseudo_huber_loss(input, target) of images (N, C, H, W), multiplied by loss_weights
(N, 1, 1, 1) and averaged by the caller; lognormal_timestep_distribution(num_samples, sigmas, mean, std) ->
int64 (N,). As it stands, the metric is applied per element (with the c of the whole image), student and
teacher draw different dropout masks, the network gets x without c_in, and the README's example has
lognormal_mean = 1.1 where the paper has -1.1.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..consistency_loss import pseudo_huber_loss as _pseudo_huber_loss
from ..philox import LEVELS, Seed, uniform_bits
from ..shared_dropout import SharedDropout
from .patch import Patch, ours, owners


@ours
def pseudo_huber_loss(input: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The Pseudo-Huber distance of each sample, to be multiplied by weights (N, 1, 1, 1) and averaged.

    Args:
        input, target: (N, ...), any floating dtype; target receives no gradient.
        weight: (N,) or (N, 1, ..., 1), applied here: the way for weights (N,), which multiplied with the
            result would broadcast to (N, 1, 1, N).
    Returns:
        (N, 1, ..., 1) with as many dimensions as input, fp32.
    """
    return _pseudo_huber_loss(input, target, weight, keepdim=True)


@ours
def lognormal_timestep_distribution(
    num_samples: int,
    sigmas: Tensor,
    mean: float = -1.1,
    std: float = 2.0,
    *,
    seed: Seed = None,
    offset: int | Tensor = 0,
) -> Tensor:
    """Draws the index of each sample's pair of levels: i for (sigmas[i], sigmas[i + 1]).

    The same on every device for the same seed; the probabilities are computed in float64.

    Args:
        num_samples: N.
        sigmas: (levels,), ascending or descending, on the device of the draw.
        mean, std: of ln sigma.
        seed, offset: see `ict_kernels.sample_noise_levels`; None follows torch.manual_seed.
    Returns:
        int64 (N,), 0 .. levels - 2.
    Raises:
        ValueError: for sigmas of another shape, or std <= 0.
    """
    if sigmas.dim() != 1 or len(sigmas) < 2:
        raise ValueError(
            f"sigmas must have shape (levels,) with at least 2 levels, got {tuple(sigmas.shape)}"
        )
    if not std > 0.0:
        raise ValueError(f"std must be positive, got {std}")
    mass = torch.erf((sigmas.double().log() - mean) / (std * math.sqrt(2.0))).diff()
    thresholds = (mass.cumsum(0)[:-1] / mass.sum() * 2.0**32).floor().to(torch.int64)
    words = uniform_bits(num_samples, seed, offset, LEVELS, device=sigmas.device)
    return torch.searchsorted(thresholds, words, right=True)


def apply_ict_kernels_to_kinyugo(consistency_models: Any) -> Patch:
    """Replaces both functions, and lets `ImprovedConsistencyTraining` share its dropout masks.

    Names that were imported from the library before (`from consistency_models import pseudo_huber_loss`) stay
    the old ones: apply this first.

    Args:
        consistency_models: the package.
    Returns:
        Call it to undo.
    Raises:
        ValueError: if it has no pseudo_huber_loss and ImprovedConsistencyTraining.
    """
    names = ("pseudo_huber_loss", "ImprovedConsistencyTraining")
    modules = owners(consistency_models, names, "consistency_models", "the package consistency_models")
    training = modules[-1].ImprovedConsistencyTraining
    original = training.__call__

    @ours
    @functools.wraps(original)
    def patched(self: Any, model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, SharedDropout(model, x.device).around(model), x, *args, **kwargs)

    changes: dict[tuple[Any, str], Any] = {(training, "__call__"): patched}
    for module in modules:
        changes[module, "pseudo_huber_loss"] = pseudo_huber_loss
        if hasattr(module, "lognormal_timestep_distribution"):
            changes[module, "lognormal_timestep_distribution"] = lognormal_timestep_distribution
    return Patch(changes)
