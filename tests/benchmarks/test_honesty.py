"""The honesty checks tell a copier, a collapsed model and a confused one from real digits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.distance import cdist

from ict_fast.data.store import Store, open_store

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import honesty


@pytest.fixture(scope="module")
def store(digits_store: Path) -> Store:
    return open_store(digits_store)


def test_nearest_is_scipys(store: Store) -> None:
    images = np.array(store.images[:50])
    flat = images.reshape(50, -1) / 127.5
    expected = cdist(flat[:20], flat[20:])
    distances, numbers = honesty.nearest(images[:20], images[20:])
    np.testing.assert_allclose(distances, expected.min(1), rtol=1e-12)
    assert (numbers == expected.argmin(1)).all()
    among = cdist(flat, flat) + np.diag(np.full(50, np.inf))
    np.testing.assert_allclose(honesty.nearest(images, images, same=True)[0], among.min(1), rtol=1e-12)


def test_copies_are_found(store: Store) -> None:
    copies = np.array(store.images[:1000])
    found = honesty.measure(copies, np.array(store.labels[:1000]), store)
    assert found["neighbours"]["copies"] == 1000
    assert found["neighbours"]["nearer_than_1_percent_of_real"] == 1.0
    assert found["classes"]["as_asked"] > 0.97


def test_a_collapsed_model_has_no_recall_and_one_class(store: Store) -> None:
    noise = np.random.default_rng(0).integers(0, 2, (1000, 8, 8, 1), dtype=np.uint8)
    collapsed = store.images[3] + noise * (store.images[3] < 255)
    found = honesty.measure(collapsed.astype(np.uint8), None, store)
    assert found["manifold"]["samples"]["recall"] < 0.01
    assert found["classes"]["share_drawn"][int(store.labels[3])] > 0.99
    assert "as_asked" not in found["classes"]
    assert "No class's share" in honesty.section({**found, "preset": "x", "step": 1, "training_images": 1797})


def test_uniform_noise_has_no_precision(store: Store) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1000, 8, 8, 1), dtype=np.uint8)
    found = honesty.measure(noise, np.arange(1000) % 10, store)
    assert found["manifold"]["samples"]["precision"] < 0.01
    assert found["manifold"]["halves"]["precision"] > 0.8
    assert (
        found["neighbours"]["sample_to_training"]["1 %"] > found["neighbours"]["real_to_other_real"]["50 %"]
    )


def test_the_picture_puts_samples_over_their_neighbours(store: Store, tmp_path: Path) -> None:
    honesty.picture(np.array(store.images[:30]), store, tmp_path / "honesty.png")
    with Image.open(tmp_path / "honesty.png") as picture:
        pixels = np.asarray(picture)
    # Tiles of 8 pixels, each enlarged 6 times, one white pixel between: two rows, the same images in both.
    assert pixels.shape == (6 * (2 * 9 + 1), 6 * (20 * 9 + 1))
    np.testing.assert_array_equal(pixels[6:54], pixels[60:108])


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert honesty.main([str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
