"""Editing images with a consistency model that was never trained for it.

Song et al., "Consistency Models" (ICML 2023), algorithm 4. What is known of an image is a part of its
coordinates in some orthonormal basis: of inpainting the pixels outside of the hole, of colourisation the
luminance, of super-resolution the mean of each patch. Keeping that part of y and the rest of x is

    x + P (y - x),  P the orthogonal projection onto what is known,

which is the algorithm's A^-1[(A y) (1 - Omega) + (A x) Omega] without its matrices A and masks Omega.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ict_fast.config import MethodConfig
from ict_fast.consistency.model import ConsistencyModel, check_classes
from ict_fast.consistency.sampling import BATCH_SIZE, sampling_step
from ict_fast.errors import InputError

DEFAULT_STEPS = 40
# ITU-R BT.601's weights of red, green and blue in the luminance.
LUMINANCE = (0.299, 0.587, 0.114)
# Where drawing over a rough picture begins: large enough to forget its details, too small to forget it.
STROKE_SIGMA = 5.38

Projection = Callable[[Tensor], Tensor]
Progress = Callable[[int], None]
Labels = Tensor | Sequence[int] | None


def editing_sigmas(steps: int, method: MethodConfig, start: float | None = None) -> tuple[float, ...]:
    """The noise levels of the steps: a descending Karras grid that ends one short of sigma_min.

    Args:
        steps: number of network evaluations per image.
        method: its sigma_min, sigma_max and rho.
        start: the first level, by default sigma_max.
    Raises:
        InputError: fewer than one step, or a start outside of (sigma_min, sigma_max].
    """
    start = method.sigma_max if start is None else start
    if steps < 1:
        raise InputError(f"steps is {steps}; it must be at least 1")
    if not method.sigma_min < start <= method.sigma_max:
        raise InputError(
            f"the first noise level is {start}; it must be above sigma_min = {method.sigma_min} and at most"
            f" sigma_max = {method.sigma_max}"
        )
    high, low = (sigma ** (1 / method.rho) for sigma in (start, method.sigma_min))
    return tuple((high + index / steps * (low - high)) ** method.rho for index in range(steps))


@torch.no_grad()
def edit(
    model: ConsistencyModel,
    images: Tensor,
    known: Projection,
    sigmas: Sequence[float],
    labels: Labels = None,
    seed: int = 0,
    *,
    keep: bool = True,
    clamp: bool = True,
    progress: Progress | None = None,
) -> Tensor:
    """Images that agree with the given ones in what is known of them, and are the model's in the rest.

    Image i depends on (seed, i) and images[i] alone.

    Args:
        model: see `load_model`.
        images: (N, C, H, W) in [-1, 1]; only known(images) is used.
        known: a linear orthogonal projection of a batch of images.
        sigmas: the noise level of each step, descending; see `editing_sigmas`.
        labels: (N,) class numbers for a class-conditional model.
        seed: of the noise.
        keep: put what is known back in place after every step; else it is where the first step begins only.
        clamp: limit what the model makes to [-1, 1].
        progress: called with the number of images done.
    Returns:
        (N, C, H, W) fp32 on the model's device. What is known may leave [-1, 1] in single colours.
    Raises:
        InputError: images of another shape than the model's, labels missing or senseless, or no sigmas.
    """
    device = next(model.parameters()).device
    labels = _checked_labels(model, images, labels)
    levels = tuple(sigmas)
    method = model.config.method
    if not levels or any(not method.sigma_min < sigma <= method.sigma_max for sigma in levels):
        raise InputError(
            f"sigmas are {', '.join(map(str, levels)) or 'missing'}; each must be above sigma_min ="
            f" {method.sigma_min} and at most sigma_max = {method.sigma_max}"
        )
    done = []
    for first in range(0, len(images), BATCH_SIZE):
        reference = known(images[first : first + BATCH_SIZE].to(device, torch.float32))
        classes = None if labels is None else labels[first : first + BATCH_SIZE].to(device)
        x = reference
        for number, sigma in enumerate(levels):
            x = sampling_step(model, x, sigma, number, classes, seed=seed, offset=first, clamp=clamp)
            if keep:
                x = x + known(reference - x)
        done.append(x)
        if progress is not None:
            progress(first + len(x))
    return torch.cat(done)


def inpaint(
    model: ConsistencyModel,
    images: Tensor,
    hole: Tensor,
    steps: int = DEFAULT_STEPS,
    labels: Labels = None,
    seed: int = 0,
    *,
    progress: Progress | None = None,
) -> Tensor:
    """Fills a hole in images.

    Args:
        model: see `load_model`.
        images: (N, C, H, W) in [-1, 1]; their pixels in the hole are not looked at.
        hole: (H, W) bool, True where a pixel is to be made.
        steps: see `editing_sigmas`.
        labels, seed, progress: see `edit`.
    """
    height, width = images.shape[-2:]
    if hole.dtype != torch.bool or tuple(hole.shape) != (height, width):
        raise InputError(f"a hole of {hole.dtype} {tuple(hole.shape)}; it must be bool ({height}, {width})")
    levels = editing_sigmas(steps, model.config.method)

    def visible(x: Tensor) -> Tensor:
        return x.masked_fill(hole.to(x.device), 0.0)

    return edit(model, images, visible, levels, labels, seed, progress=progress)


def colorize(
    model: ConsistencyModel,
    images: Tensor,
    steps: int = DEFAULT_STEPS,
    labels: Labels = None,
    seed: int = 0,
    *,
    progress: Progress | None = None,
) -> Tensor:
    """Colours of the model's making for grey images, whose luminance stays.

    Args:
        model: of RGB images; see `load_model`.
        images: (N, 1, H, W) grey or (N, 3, H, W) in [-1, 1]; of the latter the luminance alone is used.
        steps: see `editing_sigmas`.
        labels, seed, progress: see `edit`.
    Returns:
        as `edit`, but within [-1, 1]; see `within_range`.
    Raises:
        InputError: also if the model makes grey images.
    """
    if model.config.network.image_channels != 3:
        raise InputError("this model makes grey images; to colour one takes a model of RGB images")
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    levels = editing_sigmas(steps, model.config.method)
    return within_range(edit(model, images, luminance, levels, labels, seed, progress=progress))


def upscale(
    model: ConsistencyModel,
    images: Tensor,
    steps: int = DEFAULT_STEPS,
    labels: Labels = None,
    seed: int = 0,
    *,
    progress: Progress | None = None,
) -> Tensor:
    """Details of the model's making for small images, whose pixels are the means of its patches.

    Args:
        model: see `load_model`.
        images: (N, C, h, w) in [-1, 1], h = w and a divisor of the model's resolution.
        steps: see `editing_sigmas`.
        labels, seed, progress: see `edit`.
    Returns:
        as `edit`, but within [-1, 1]; see `patches_within_range`.
    """
    resolution, size = model.config.network.resolution, images.shape[-1]
    if images.shape[-2] != size or not 0 < size < resolution or resolution % size:
        largest = next((half for half in range(resolution // 2, 0, -1) if resolution % half == 0), 1)
        raise InputError(
            f"images of {size}x{images.shape[-2]}; this model makes {resolution}x{resolution} of square"
            f" images that are smaller by a whole factor, such as {largest}x{largest}"
        )
    factor = resolution // size
    large = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    levels = editing_sigmas(steps, model.config.method)
    edited = edit(model, large, lambda x: patch_means(x, factor), levels, labels, seed, progress=progress)
    return patches_within_range(edited, factor)


def stroke(
    model: ConsistencyModel,
    images: Tensor,
    sigma: float = STROKE_SIGMA,
    steps: int = 2,
    labels: Labels = None,
    seed: int = 0,
    *,
    progress: Progress | None = None,
) -> Tensor:
    """Images of the model's making that follow rough ones: their composition stays, their details do not.

    (Meng et al., "SDEdit", ICLR 2022, with a consistency model.)

    Args:
        model: see `load_model`.
        images: (N, C, H, W) in [-1, 1].
        sigma: the noise level to begin at. The larger, the less of the images stays.
        steps: see `editing_sigmas`.
        labels, seed, progress: see `edit`.
    """
    levels = editing_sigmas(steps, model.config.method, sigma)
    return edit(model, images, lambda x: x, levels, labels, seed, keep=False, progress=progress)


def luminance(images: Tensor) -> Tensor:
    """The projection of RGB images (N, 3, H, W) onto their luminance."""
    weights = torch.tensor(LUMINANCE, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    return weights * (images * weights).sum(1, keepdim=True) / weights.square().sum()


def within_range(images: Tensor) -> Tensor:
    """RGB images (N, 3, H, W) whose colours that leave [-1, 1] are paler, of the same luminance.

    Each pixel moves towards the grey of its luminance, just as far as it has to. Clipping would change the
    luminance of what it clips.
    """
    weights = torch.tensor(LUMINANCE, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    grey = (images * weights).sum(1, keepdim=True).clamp(-1, 1)
    away = images - grey
    return grey + _inside(grey, away).amin(1, keepdim=True) * away


def patch_means(images: Tensor, factor: int) -> Tensor:
    """The projection of images (N, C, H, W) onto the means of their patches of factor x factor."""
    means = F.avg_pool2d(images, factor)
    return means.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def patches_within_range(images: Tensor, factor: int) -> Tensor:
    """Images (N, C, H, W) whose patches of factor x factor that leave [-1, 1] are flatter, of the same means.

    As `within_range` for patches: what is clipped would change their means.
    """
    means = patch_means(images, factor).clamp(-1, 1)
    away = images - means
    share = -F.max_pool2d(-_inside(means, away), factor)
    return means + share.repeat_interleave(factor, 2).repeat_interleave(factor, 3) * away


def _inside(centre: Tensor, away: Tensor) -> Tensor:
    """The largest share, at most 1, of each step `away` from a centre in [-1, 1] that ends within it."""
    room = torch.where(away > 0, 1 - centre, 1 + centre)
    return torch.where(away.abs() > room, room / away.abs(), 1.0)


def _checked_labels(model: ConsistencyModel, images: Tensor, labels: Labels) -> Tensor | None:
    network = model.config.network
    expected = (network.image_channels, network.resolution, network.resolution)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected or not len(images):
        raise InputError(
            f"images of shape {tuple(images.shape)}; this model takes (N, {', '.join(map(str, expected))})"
        )
    if not network.num_classes:
        if labels is not None:
            raise InputError("labels were given, but the model is unconditional")
        return None
    if labels is None:
        raise InputError(f"the model is conditional on {network.num_classes} classes; say the images' labels")
    labels = torch.as_tensor(labels)
    if labels.shape != (len(images),):
        raise InputError(f"labels have shape {tuple(labels.shape)}; they must be one per image")
    check_classes(labels, network.num_classes)
    return labels.to(torch.int64)
