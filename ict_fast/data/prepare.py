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
    from sklearn.datasets import load_digits  # takes a second, and only this source needs it

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # 0..16 in the source
    return write_store(
        out,
        images,
        digits.target,
        source="scikit-learn load_digits (UCI optical recognition of handwritten digits, test part)",
        recipe="8x8 grey, round(value * 255 / 16)",
        classes=[str(name) for name in digits.target_names],
    )
