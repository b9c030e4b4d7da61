"""Turns a source of images into a store."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ict_fast.data.store import write_store


def prepare_digits(out: Path) -> Path:
    """The handwritten digits that come with scikit-learn: 1797 scans, 8x8, grey, ten classes.

    They need no download, so that every machine can train on real images.

    Args:
        out: the store's folder; a finished one is verified, not rebuilt.
    Returns:
        out.
    Raises:
        InputError: if `out` holds something else or cannot be written.
    """
    images, labels = load_digits()
    return write_store(
        out,
        images,
        labels,
        source="scikit-learn load_digits (UCI optical recognition of handwritten digits, test part)",
        recipe="8x8 grey, round(value * 255 / 16)",
        classes=[str(digit) for digit in range(10)],
    )


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 digits of scikit-learn as the project stores them.

    Returns:
        images (1797, 8, 8, 1) uint8, the 17 grey levels v mapped to round(255 v / 16); labels (1797,) int64.
    """
    from sklearn import datasets  # takes a second, and only this source needs it

    bundled = datasets.load_digits()
    images = np.rint(bundled.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    return images, bundled.target.astype(np.int64)
