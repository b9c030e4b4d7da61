"""A reference in one network's features: for a store they are computed once, and kept beside it."""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ict_fast.durable import replacing
from ict_fast.evaluation.chunks import Chunk, Finished
from ict_fast.evaluation.feature_networks import FeatureNetwork
from ict_fast.evaluation.reference import Reference
from ict_fast.evaluation.statistics import Statistics, Sums, statistics

MOST_FEATURES = 50_000
"""Reference images whose features are kept, for the metrics that need more than statistics."""
_CHOICE_SEED = 6
_VERSION = 1


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
    total, products = finished.get(chunk, "total"), finished.get(chunk, "products")
    assert total is not None
    assert products is not None
    return Sums(chunk.count, total, products)


def cache_file(reference: Reference, network: FeatureNetwork) -> Path | None:
    """Where the measured reference is kept; None if it is not worth keeping, or has no place."""
    if reference.cache is None or not hasattr(network, "path"):
        return None  # the digits classifier takes a tenth of a second
    about = f"{_VERSION} {reference.fingerprint} {network.sha256} {network.batch_size} {MOST_FEATURES}"
    return reference.cache / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.npz"


def read_cached(file: Path | None, network: FeatureNetwork) -> MeasuredReference | None:
    """What an earlier evaluation has kept; None if there is nothing whole."""
    if file is None:
        return None
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            mean, covariance = archive["mean"], archive["covariance"]
            count, features = int(archive["count"]), archive["features"]
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None
    size = network.num_features
    if (mean.shape, covariance.shape, features.shape[1:]) != ((size,), (size, size), (size,)):
        return None
    return MeasuredReference(Statistics(mean, covariance), count, features)


def keep(file: Path | None, measured: MeasuredReference) -> None:
    """Keeps it for the next evaluation; where nothing can be written, nothing is kept."""
    if file is None:
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(exist_ok=True)
        with replacing(file) as opened:
            np.savez(
                opened,
                mean=measured.statistics.mean,
                covariance=measured.statistics.covariance,
                count=np.asarray(measured.count),
                features=np.asarray(measured.features),
            )
