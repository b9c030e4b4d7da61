"""The Fréchet distance of sets of images to one reference set, for those who have images and a network."""

from __future__ import annotations

import numpy as np
from torch import nn

from ict_fast.evaluation.feature_networks import in_batches
from ict_fast.evaluation.statistics import Statistics, frechet_distance, statistics, sums

_BATCH_SIZE = 512


class FrechetDistance:
    """See `frechet_distance`; the reference's statistics are computed once.

    Few images look worse than many of the same kind: for n and N images the estimate is too large by about a
    constant times 1/n + 1/N.
    """

    def __init__(self, features: nn.Module, reference: np.ndarray) -> None:
        """Computes the statistics of the reference.

        Args:
            features: takes uint8 (N, C, H, W), returns (N, num_features); see `digits_features`.
            reference: uint8 (N, H, W, C), at least 2 images.
        Raises:
            InputError: of fewer than 2 images.
        """
        self._features = features
        self._reference = self._statistics(reference)

    def to(self, images: np.ndarray) -> float:
        """The distance from the reference to a set of images.

        Args:
            images: uint8 (N, H, W, C), at least 2.
        Returns:
            0 for equal statistics; the unit is that of the features squared.
        Raises:
            InputError: of fewer than 2 images.
        """
        return frechet_distance(self._statistics(images), self._reference)

    def _statistics(self, images: np.ndarray) -> Statistics:
        if not len(images):
            return statistics([])  # which refuses it
        features, _ = in_batches(images, _BATCH_SIZE, lambda batch: (self._features(batch), None))
        return statistics([sums(features)])
