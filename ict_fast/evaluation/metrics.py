"""The distance between two sets of images, and sets of bad images to read it by."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ict_fast.errors import InputError

BATCH_SIZE = 512


class FrechetDistance:
    """The Fréchet distance to one reference set: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    m and S are mean and covariance of the features of a set (Heusel et al. 2017, equation 6, "FID"). Computed
    by torchmetrics, whose statistics are float64; the reference's are computed once. Few images look worse
    than many of the same kind: for n and N images the estimate is too large by about a constant times
    1/n + 1/N.
    """

    def __init__(self, features: nn.Module, reference: np.ndarray) -> None:
        """Computes the statistics of the reference.

        Args:
            features: takes uint8 (N, C, H, W), returns (N, num_features); see `digits_features`.
            reference: uint8 (N, H, W, C), at least 2 images.
        """
        # With a module of one's own this needs neither torchvision nor torch-fidelity. Imported late: 1.5 s.
        from torchmetrics.image.fid import FrechetInceptionDistance

        self._metric = FrechetInceptionDistance(feature=features, reset_real_features=False, normalize=False)
        self._update(reference, real=True)

    def to(self, images: np.ndarray) -> float:
        """The distance from the reference to a set of images.

        Args:
            images: uint8 (N, H, W, C), at least 2.
        Returns:
            0 for equal statistics; the unit is that of the features squared.
        """
        self._metric.reset()
        self._update(images, real=False)
        # Rounding of the eigenvalues can bring equal sets to -1e-7.
        return max(0.0, float(self._metric.compute()))

    def _update(self, images: np.ndarray, real: bool) -> None:
        if len(images) < 2:
            raise InputError(
                f"{len(images)} images; a Fréchet distance needs at least 2, and better thousands"
            )
        with torch.no_grad():
            for first in range(0, len(images), BATCH_SIZE):
                batch = torch.from_numpy(np.array(images[first : first + BATCH_SIZE]))
                self._metric.update(batch.permute(0, 3, 1, 2), real=real)


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
