"""What torchmetrics computes from features and classes, and sets of bad images to read distances by."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

_KERNEL_SUBSETS = 100
_KERNEL_SUBSET_SIZE = 1000
_SCORE_SPLITS = 10
_SHUFFLING_SEED = 5

# In a run of several processes the first one measures, alone: torchmetrics would wait for the others.
_ALONE = {"sync_on_compute": False}


def kernel_distance(real: np.ndarray, generated: np.ndarray) -> tuple[float, float]:
    """The squared maximum mean discrepancy with kernel (x.y/D + 1)^3: "KID" (Binkowski et al. 2018).

    The mean over 100 random subsets of 1,000 features of each set (all of a smaller one), drawn the same way
    at every call. An unbiased estimate: about zero for equal distributions, now and then below.

    Args:
        real, generated: (N, D), (M, D) features, at least 2 of each.
    Returns:
        mean and standard deviation over the subsets.
    """
    from torchmetrics.image.kid import poly_mmd  # 1.5 s

    size = min(_KERNEL_SUBSET_SIZE, len(real), len(generated))

    def subset(features: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(features)[torch.randperm(len(features))[:size]].double()

    # torchmetrics' KernelInceptionDistance draws the same subsets, and wants every feature in float64.
    with _quiet_and_repeatable():
        values = torch.stack([poly_mmd(subset(real), subset(generated)) for _ in range(_KERNEL_SUBSETS)])
    return float(values.mean()), float(values.std(unbiased=False))


def inception_score(probabilities: np.ndarray) -> tuple[float, float]:
    """exp of the mean KL divergence of p(class | image) from p(class) (Salimans et al. 2016).

    1 if the images say nothing of their classes, K if all K classes are equally frequent and each image is
    surely of one.

    Args:
        probabilities: (N, K), rows of sum 1.
    Returns:
        mean and standard deviation over 10 parts, split the same way at every call.
    """
    from torchmetrics.image.inception import InceptionScore

    logits = torch.from_numpy(probabilities).double().clamp_min(1e-300).log()  # 0 log 0 is 0
    with _quiet_and_repeatable():
        splits = min(_SCORE_SPLITS, max(1, len(logits) // 2))
        metric = InceptionScore(_AsTheyAre(), splits=splits, **_ALONE)
        metric.update(logits)
        parts = metric.compute()
    mean, deviation = (float(value) for value in parts)
    return mean, deviation if np.isfinite(deviation) else 0.0  # of a single part


class _AsTheyAre(nn.Module):
    """For torchmetrics, whose metrics compute features of images: what they are given are features."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@contextmanager
def _quiet_and_repeatable() -> Iterator[None]:
    """torchmetrics shuffles by torch's global generator, and warns that it keeps what it is given."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(_SHUFFLING_SEED)
        yield


def noise_images(like: np.ndarray, count: int) -> np.ndarray:
    """Pixels that are independent and uniform in 0..255: what no model should be as bad as.

    Args:
        like: uint8 (N, H, W, C), for the shape.
    Returns:
        uint8 (count, H, W, C), the same for every call.
    """
    return np.random.default_rng(1).integers(0, 256, (count, *like.shape[1:]), dtype=np.uint8)


def gaussian_images(like: np.ndarray, count: int) -> np.ndarray:
    """Draws from the Gaussian with the pixels' mean and full covariance: what a linear model achieves.

    Args:
        like: uint8 (N, H, W, C), at least 2 images.
    Returns:
        uint8 (count, H, W, C), rounded and clipped to 0..255, the same for every call.
    """
    pixels = np.asarray(like, dtype=np.float64).reshape(len(like), -1)
    draws = np.random.default_rng(2).multivariate_normal(
        pixels.mean(0), np.atleast_2d(np.cov(pixels, rowvar=False)), count, method="eigh"
    )
    return draws.round().clip(0, 255).astype(np.uint8).reshape(count, *like.shape[1:])


def halves(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits images into two random halves, the same for every call.

    Args:
        images: (N, ...).
    Returns:
        N // 2 and N - N // 2 of them.
    """
    order = np.random.default_rng(3).permutation(len(images))
    return images[order[: len(images) // 2]], images[order[len(images) // 2 :]]
