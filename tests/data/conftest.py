"""A small store whose images tell their own number."""

from pathlib import Path

import numpy as np
import pytest

from ict_fast.data.store import Store, open_store, write_store

NUM_IMAGES = 37


def numbered_images(count: int = NUM_IMAGES) -> np.ndarray:
    """uint8 (count, 4, 4, 3): image i holds i in its first pixel, and noise elsewhere."""
    images = np.random.default_rng(7).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    return images


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    labels = np.arange(NUM_IMAGES) % 3
    classes = ["a", "b", "c"]
    return write_store(
        tmp_path / "store", numbered_images(), labels, source="test", recipe="numbered", classes=classes
    )


@pytest.fixture
def store(store_path: Path) -> Store:
    return open_store(store_path)
