"""The Fréchet distance from sets of images to one reference: for a search that measures many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ict_fast.config import Config
from ict_fast.evaluation.feature_networks import choose_network
from ict_fast.evaluation.measured_reference import cache_files, read_cached
from ict_fast.evaluation.reference import check_reference, open_reference
from ict_fast.evaluation.statistics import Statistics, frechet_distance, statistics, sums

_IMAGES = 1024  # whose features are held at a time


class DistanceToReference:
    """Opens a reference and its features as `evaluate` does; the reference's statistics are computed once.

    Attributes:
        reference: what is compared with.
        warnings: what could not be checked of it.
    """

    def __init__(
        self,
        config: Config,
        reference: Path,
        *,
        features: Path | None = None,
        features_sha256: str | None = None,
        allow_other_recipe: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            config: of the model whose images will be compared.
            reference, features, features_sha256, allow_other_recipe: see `evaluate`.
            device: where features are computed.
        Raises:
            InputError: references or features that cannot work.
        """
        self.reference = open_reference(reference)
        self.warnings = check_reference(self.reference, config, allow_other_recipe=allow_other_recipe)
        self._device = torch.device(device)
        resolution = config.network.resolution
        self._network = choose_network(self.reference, resolution, features, features_sha256)
        measured = read_cached(cache_files(self.reference, self._network), self._network)
        if self.reference.statistics is not None:
            self._statistics = self.reference.statistics
        elif measured is not None:
            self._statistics = measured.statistics
        else:
            assert self.reference.images is not None
            self._statistics = self._of(self.reference.images.array)

    def to(self, images: np.ndarray) -> float:
        """The distance to at least 2 images, uint8 (N, H, W, C); 0 for equal statistics."""
        return frechet_distance(self._of(images), self._statistics)

    def _of(self, images: np.ndarray) -> Statistics:
        parts = (images[first : first + _IMAGES] for first in range(0, len(images), _IMAGES))
        return statistics(sums(self._network(part, self._device, probabilities=False)[0]) for part in parts)
