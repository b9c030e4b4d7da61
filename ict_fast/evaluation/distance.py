"""The Fréchet distance from sets of images to one reference: for a search that measures many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ict_fast.consistency import ConsistencyModel
from ict_fast.evaluation.chunks import Finished, Work, reference_chunks
from ict_fast.evaluation.feature_networks import choose_network
from ict_fast.evaluation.measured_reference import (
    MeasuredReference,
    cache_files,
    chosen_images,
    keep,
    put_together,
    read_cached,
)
from ict_fast.evaluation.processes import compute_chunks
from ict_fast.evaluation.provenance import provenance
from ict_fast.evaluation.reference import check_reference, open_reference
from ict_fast.evaluation.statistics import Statistics, frechet_distance, statistics, sums, too_few

_IMAGES = 1024  # whose features are held at a time


class DistanceToReference:
    """Opens a reference and its features as `evaluate` does, and measures the reference once.

    What `evaluate` has kept of the reference is read; else it is kept for `evaluate`, where that is done.

    Attributes:
        reference: what is compared with.
        warnings: what could not be checked of it.
        provenance: see there; of the model that it was made for.
    """

    def __init__(
        self,
        model: ConsistencyModel,
        reference: Path,
        *,
        features: Path | None = None,
        features_sha256: str | None = None,
        allow_other_recipe: bool = False,
        progress: Callable[[float, str], None] | None = None,
    ) -> None:
        """
        Args:
            model: whose images will be compared; features are computed where it is.
            reference, features, features_sha256, allow_other_recipe: see `evaluate`.
            progress: called with the fraction of the reference measured in [0, 1] and what is being done.
        Raises:
            InputError: references or features that cannot work.
        """
        self.reference = open_reference(reference)
        self.warnings = check_reference(
            self.reference,
            model.config,
            allow_other_recipe=allow_other_recipe,
            data_fingerprint=model.data_fingerprint,
        )
        self._device = next(model.parameters()).device
        resolution = model.config.network.resolution
        self._network = choose_network(self.reference, resolution, features, features_sha256)
        self.provenance = provenance(model, self.reference, self._network, self._device)
        if self.reference.statistics is not None:
            self._statistics, self._count = self.reference.statistics, None
        else:
            files = cache_files(self.reference, self._network)
            measured = read_cached(files, self._network)
            if measured is None:
                measured = self._measured(model, progress or (lambda fraction, text: None))
                keep(files, measured)
            self._statistics, self._count = measured.statistics, measured.count

    def too_few(self, count: int) -> list[str]:
        """Warnings, if distances to so many images would say little; see `statistics.too_few`."""
        return too_few(self._network.num_features, count, self._count)

    def to(self, images: np.ndarray) -> float:
        """The distance to at least 2 images, uint8 (N, H, W, C); 0 for equal statistics."""
        return frechet_distance(self._of(images), self._statistics)

    def _measured(self, model: ConsistencyModel, progress: Callable[[float, str], None]) -> MeasuredReference:
        images = self.reference.images
        assert images is not None
        chunks, finished = reference_chunks(len(images)), Finished(None)
        work = Work(model, self._network, None, 0, images, chosen_images(len(images)))
        total = sum(chunk.cost for chunk in chunks)
        compute_chunks(
            work, chunks, finished, [self._device], lambda done, text: progress(done / total, text)
        )
        return put_together(self.reference, finished, chunks)

    def _of(self, images: np.ndarray) -> Statistics:
        parts = (images[first : first + _IMAGES] for first in range(0, len(images), _IMAGES))
        return statistics(sums(self._network(part, self._device, probabilities=False)[0]) for part in parts)
