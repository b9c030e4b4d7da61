"""A reference in one network's features: for a store they are computed once, and kept beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ict_fast.data.sources.damage import DAMAGED_ZIP
from ict_fast.durable import replacing
from ict_fast.evaluation.chunks import Chunk, Finished
from ict_fast.evaluation.feature_networks import FeatureNetwork
from ict_fast.evaluation.reference import Reference
from ict_fast.evaluation.statistics import Statistics, Sums, statistics

MOST_FEATURES = 50_000
"""Reference images whose features are kept, for the metrics that need more than statistics."""
_CHOICE_SEED = 6
_VERSION = 2


@dataclass(frozen=True)
class MeasuredReference:
    """A reference in a network's features."""

    statistics: Statistics
    count: int | None
    """Images behind the statistics; None if the file does not say."""
    features: np.ndarray | None
    """(N, D) of up to MOST_FEATURES images in random order; None where there are no images."""


def chosen_images(count: int) -> np.ndarray:
    """Sorted numbers of the reference images whose features are kept: a random part of a large set."""
    if count <= MOST_FEATURES:
        return np.arange(count)
    return np.sort(np.random.default_rng(_CHOICE_SEED).choice(count, MOST_FEATURES, replace=False))


def put_together(reference: Reference, finished: Finished, chunks: Sequence[Chunk]) -> MeasuredReference:
    """From finished chunks; what a file says of its statistics takes precedence."""
    if reference.images is None:
        assert reference.statistics is not None
        return MeasuredReference(reference.statistics, None, None)
    features = finished.joined(chunks, "features")
    assert features is not None
    # A store is often sorted by class, and what uses a part of the features takes the first ones.
    shuffled = features[np.random.default_rng(_CHOICE_SEED).permutation(len(features))]
    if reference.statistics is not None:
        return MeasuredReference(reference.statistics, None, shuffled)
    count = len(reference.images)
    return MeasuredReference(statistics(_sums(finished, chunk) for chunk in chunks), count, shuffled)


def _sums(finished: Finished, chunk: Chunk) -> Sums:
    mean, products = finished.get(chunk, "mean"), finished.get(chunk, "products")
    assert mean is not None
    assert products is not None
    return Sums(chunk.count, mean, products)


def cache_files(reference: Reference, network: FeatureNetwork, folder: Path | None = None) -> list[Path]:
    """Where the measured reference may be kept, the best place first; none if it is not worth keeping.

    Args:
        folder: for a reference that has no place of its own, or one that cannot be written.
    """
    if reference.images is None or not hasattr(network, "path"):
        return []  # the digits classifier takes a tenth of a second
    about = f"{_VERSION} {reference.fingerprint} {network.sha256} {network.batch_size} {MOST_FEATURES}"
    name = f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.npz"
    return [place / name for place in (reference.cache, folder) if place is not None]


def read_cached(files: Sequence[Path], network: FeatureNetwork) -> MeasuredReference | None:
    """What an earlier evaluation has kept; None if there is nothing whole."""
    return next((found for file in files if (found := _read(file, network)) is not None), None)


def _read(file: Path, network: FeatureNetwork) -> MeasuredReference | None:
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            mean, covariance = archive["mean"], archive["covariance"]
            count, features = int(archive["count"]), archive["features"]
    except (OSError, TypeError):
        return None
    except DAMAGED_ZIP:
        return None
    size = network.num_features
    if (mean.shape, covariance.shape, features.shape[1:]) != ((size,), (size, size), (size,)):
        return None
    return MeasuredReference(Statistics(mean, covariance), count or None, features)


def keep(files: Sequence[Path], measured: MeasuredReference) -> None:
    """Keeps it in the first place that can be written, for the next evaluation; nothing if there is none."""
    for file in files:
        try:
            file.parent.mkdir(exist_ok=True)
            with replacing(file) as opened:
                np.savez(
                    opened,
                    mean=measured.statistics.mean,
                    covariance=measured.statistics.covariance,
                    count=np.asarray(measured.count or 0),
                    features=np.asarray(measured.features),
                )
        except OSError:
            continue
        return
