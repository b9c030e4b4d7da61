"""Which image comes when: pure functions of the seed and the global step, which is thus the whole state.

The training samples form one endless sequence, the concatenation of the epochs' permutations. Global batch k
is its positions k B to (k + 1) B - 1. A position is its sample's number, of which the flip is a function, so
nothing depends on the number of processes, the micro-batch, or the loader.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ict_fast.errors import InputError


@lru_cache(maxsize=4)
def epoch_permutation(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the images in one epoch.

    Sorts raw Philox words: NumPy guarantees a bit generator's stream across versions, but not the result of
    `Generator.permutation`.

    Args:
        num_images: N.
        seed: 0 <= seed < 2^64.
        epoch: 0, 1, ...
    Returns:
        int64 (N,), a permutation of 0..N-1; cached and read-only.
    """
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_images)
    permutation = np.argsort(words, kind="stable").astype(np.int64, copy=False)
    permutation.setflags(write=False)
    return permutation


def batch_indices(num_images: int, seed: int, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The images of one global batch, which may straddle epochs, or span several.

    Args:
        num_images: N.
        seed: the run's seed.
        step: k, the global step.
        batch_size: B, over all processes.
    Returns:
        indices: int64 (B,), into the store.
        sample_numbers: int64 (B,), k B to (k + 1) B - 1.
    """
    first, end = step * batch_size, (step + 1) * batch_size
    pieces = []
    for epoch in range(first // num_images, (end - 1) // num_images + 1):
        start = epoch * num_images
        order = epoch_permutation(num_images, seed, epoch)
        pieces.append(order[max(first - start, 0) : end - start])
    return np.concatenate(pieces), np.arange(first, end, dtype=np.int64)


def rank_slice(batch_size: int, rank: int, world_size: int) -> slice:
    """The part of the global batch that one process trains on.

    Raises:
        InputError: if the batch cannot be shared equally.
    """
    if batch_size % world_size:
        raise InputError(
            f"--training.batch-size is {batch_size}; it must be a multiple of the {world_size} processes"
        )
    share = batch_size // world_size
    return slice(rank * share, (rank + 1) * share)


def micro_batch_size(batch_size: int, world_size: int, micro_batch: int | None) -> int:
    """Images per forward pass of one process.

    Args:
        batch_size: B, over all processes.
        world_size: number of processes.
        micro_batch: what was asked for; None or 0, or more than a process's share, means the whole share.
    Raises:
        InputError: if the batch cannot be shared equally, or the share not be cut into micro-batches.
    """
    share = rank_slice(batch_size, 0, world_size).stop
    size = min(micro_batch or share, share)
    if share % size:
        raise InputError(
            f"--training.micro-batch is {size}; it must divide the {share} images that each of {world_size}"
            f" processes has of a batch of {batch_size}"
        )
    return size
