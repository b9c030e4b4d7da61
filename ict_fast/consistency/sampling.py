"""One- and multi-step sampling from a consistency model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ict_fast.config import MethodConfig
from ict_fast.consistency.model import ConsistencyModel, check_classes
from ict_fast.errors import DivergedError, InputError
from ict_kernels.philox import INITIAL, normal

if TYPE_CHECKING:
    import numpy as np

# Images per forward pass.
BATCH_SIZE = 256
DIVERGED = (
    "the model's training has diverged; take an earlier checkpoint, or train again with a lower learning rate"
)
"""Why images are not finite, and what helps."""


def sampling_sigmas(steps: int, method: MethodConfig) -> tuple[float, ...]:
    """The noise levels of steps 2, 3, ...: geometric from sigma_max down to `method.second_sigma`.

    Returns:
        steps - 1 descending levels; (second_sigma,) for two steps.
    """
    ratio = method.second_sigma / method.sigma_max
    return tuple(method.sigma_max * ratio ** (j / (steps - 1)) for j in range(1, steps))


def check_sampling(
    model: ConsistencyModel, count: int, steps: int, sigmas: Sequence[float] | None, labels: Tensor | None
) -> tuple[float, ...]:
    """The noise levels to use, or InputError for what cannot be sampled."""
    method, num_classes = model.config.method, model.config.network.num_classes
    if count < 1:
        raise InputError(f"count is {count}; it must be at least 1")
    if steps < 1:
        raise InputError(f"steps is {steps}; it must be at least 1")
    levels = sampling_sigmas(steps, method) if sigmas is None else tuple(sigmas)
    if len(levels) != steps - 1:
        raise InputError(f"{steps} steps need {steps - 1} sigmas after sigma_max; {len(levels)} were given")
    previous = method.sigma_max
    for sigma in levels:
        if not method.sigma_min < sigma < previous:
            raise InputError(
                f"sigmas are {', '.join(map(str, levels))}; they must fall from below sigma_max ="
                f" {method.sigma_max} to above sigma_min = {method.sigma_min}"
            )
        previous = sigma
    if labels is not None and num_classes == 0:
        raise InputError("labels were given, but the model is unconditional")
    if labels is not None and labels.shape != (count,):
        raise InputError(f"labels have shape {tuple(labels.shape)}; they must be one per image, ({count},)")
    if labels is not None:
        check_classes(labels, num_classes)
    return levels


@torch.no_grad()
def sampling_step(
    model: ConsistencyModel,
    x: Tensor,
    sigma: float,
    number: int,
    labels: Tensor | None,
    *,
    seed: int,
    offset: int = 0,
    clamp: bool = True,
) -> Tensor:
    """One step of sampling: f(x + s z, sigma), s = sigma for the first, else sqrt(sigma^2 - sigma_min^2).

    Args:
        model: see `load_model`.
        x: (N, C, H, W) images of the step before; of the first step zeros, or what it shall begin around.
        sigma: its noise level.
        number: its number, from 0; with the seed and the image's number it decides the noise.
        labels: (N,) class numbers, or None, on the model's device.
        seed: of the noise.
        offset: number of the first image.
        clamp: limit the images to [-1, 1].
    """
    noise_seed = torch.tensor([seed, number], device=x.device)
    noise = normal(tuple(x.shape), seed=noise_seed, offset=offset, purpose=INITIAL, device=x.device)
    scale = sigma if number == 0 else (sigma**2 - model.config.method.sigma_min**2) ** 0.5
    x = model(x + scale * noise, sigma, labels)
    return x.clamp(-1, 1) if clamp else x


@torch.no_grad()
def sample(
    model: ConsistencyModel,
    count: int,
    steps: int = 1,
    sigmas: Sequence[float] | None = None,
    labels: Tensor | Sequence[int] | None = None,
    seed: int = 0,
    *,
    clamp: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Images from noise: x = f(sigma_max z, sigma_max), then x = f(x + sqrt(tau^2 - sigma_min^2) z, tau).

    (Song et al. 2023, algorithm 1.) Image i depends on (seed, i) alone, and to rounding not on `count`.

    Args:
        model: see `load_model`.
        count: number of images.
        steps: network evaluations per image.
        sigmas: the levels tau of steps 2, 3, ..., descending; by default `sampling_sigmas`.
        labels: (count,) class numbers. A class-conditional model without labels takes i mod num_classes.
        seed: of the noise.
        clamp: limit the images to [-1, 1] after every step.
        progress: called with the number of images done.
    Returns:
        (count, C, H, W) fp32 on the model's device.
    Raises:
        InputError: see `check_sampling`.
    """
    return torch.cat(list(_batches(model, count, steps, sigmas, labels, seed, 0, clamp, progress)))


def sample_pixels(
    model: ConsistencyModel,
    count: int,
    steps: int = 1,
    sigmas: Sequence[float] | None = None,
    labels: Tensor | Sequence[int] | None = None,
    seed: int = 0,
    *,
    first: int = 0,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """The images of `sample` as pixels; holds one batch in floating point, whatever their number.

    Args:
        first: number of the first image: the images first, first + 1, ... of `sample`. To the last bit if it
            is a multiple of BATCH_SIZE.
        model, count, steps, sigmas, labels, seed, progress: see `sample`; labels are those of these images.
    Returns:
        uint8 (count, H, W, C).
    Raises:
        InputError: see `check_sampling`.
        DivergedError: images that are not finite; the model's training has diverged.
    """
    # What tensors of samples, and a training step, do without.
    import numpy as np

    from ict_fast.data.pictures import to_uint8

    network = model.config.network
    pixels = np.empty((count, network.resolution, network.resolution, network.image_channels), np.uint8)
    done = broken = 0
    for batch in _batches(model, count, steps, sigmas, labels, seed, first, True, progress):
        broken += int((~batch.isfinite()).flatten(1).any(1).sum())
        pixels[done : done + len(batch)] = to_uint8(batch)
        done += len(batch)
    if broken:
        raise DivergedError(
            f"{broken} of {count} images sampled in {steps} step{'s' if steps > 1 else ''} hold NaN or"
            f" infinite values: {DIVERGED}"
        )
    return pixels


@torch.no_grad()
def _batches(
    model: ConsistencyModel,
    count: int,
    steps: int,
    sigmas: Sequence[float] | None,
    labels: Tensor | Sequence[int] | None,
    seed: int,
    first: int,
    clamp: bool,
    progress: Callable[[int], None] | None,
) -> Iterator[Tensor]:
    """Images first to first + count, (n, C, H, W) at a time."""
    network = model.config.network
    method = model.config.method
    if labels is not None:
        labels = torch.as_tensor(labels)
    levels = (method.sigma_max, *check_sampling(model, count, steps, sigmas, labels))
    if labels is None and network.num_classes:
        labels = torch.arange(first, first + count) % network.num_classes
    device = next(model.parameters()).device
    labels = None if labels is None else labels.to(device, torch.int64)

    for done in range(0, count, BATCH_SIZE):
        size = min(BATCH_SIZE, count - done)
        shape = (size, network.image_channels, network.resolution, network.resolution)
        x = torch.zeros(shape, device=device)
        classes = None if labels is None else labels[done : done + size]
        for number, sigma in enumerate(levels):
            x = sampling_step(model, x, sigma, number, classes, seed=seed, offset=first + done, clamp=clamp)
        yield x
        if progress is not None:
            progress(done + size)
