"""Precision and recall: known manifolds, a brute-force computation, and what float32 would get wrong."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from ict_fast.evaluation import manifold
from ict_fast.evaluation.manifold import precision_and_recall


def by_brute_force(real, generated, k=3):
    real, generated = real.astype(np.float64), generated.astype(np.float64)

    def covered(points, centres):
        radii = np.sort(cdist(centres, centres), axis=1)[:, k]  # column 0 is the point itself
        return (cdist(points, centres) <= radii).any(1).mean()

    return covered(generated, real), covered(real, generated)


def blobs(seed, count, size=8, centre=0.0):
    return np.random.default_rng(seed).normal(centre, 1, size=(count, size))


def test_equal_sets_have_precision_and_recall_one():
    points = blobs(0, 300)
    assert precision_and_recall(points, points[::-1].copy()) == (1, 1)


def test_disjoint_sets_have_precision_and_recall_zero():
    assert precision_and_recall(blobs(0, 200), blobs(1, 200, centre=50)) == (0, 0)


def test_a_generator_of_one_mode_of_two_is_precise_and_recalls_half():
    real = np.concatenate((blobs(0, 500, size=2), blobs(1, 500, size=2, centre=100)))
    precision, recall = precision_and_recall(real, blobs(2, 500, size=2))
    assert precision > 0.95
    assert recall == pytest.approx(0.5, abs=0.03)


def test_half_of_the_images_being_noise_halves_the_precision_alone():
    real = blobs(0, 1000, size=2)
    generated = np.concatenate((blobs(1, 500, size=2), blobs(2, 500, size=2, centre=1000)))
    precision, recall = precision_and_recall(real, generated)
    assert precision == pytest.approx(0.5, abs=0.03)
    assert recall > 0.9


@pytest.mark.parametrize("tile", [7, 64, 2048])
def test_it_equals_brute_force_whatever_the_tiles(monkeypatch, tile):
    monkeypatch.setattr(manifold, "_TILE", tile)
    real, generated, seen = blobs(3, 150), blobs(4, 131, centre=0.4), []
    found = precision_and_recall(real, generated, progress=seen.append)
    assert found == pytest.approx(by_brute_force(real, generated), abs=1e-12)
    assert seen == sorted(seen)
    assert seen[-1] == 1


def test_float32_features_far_from_the_origin_are_judged_as_near_it():
    """Differences of about 1e-3 at a distance of 400 from zero: in float32 a squared norm of 1e6 has a
    rounding of 0.06, thousands of times the squared distances."""
    real, generated = (400 + 1e-3 * blobs(seed, 120, size=8) for seed in (5, 6))
    real, generated = real.astype(np.float32), generated.astype(np.float32)
    squares = [np.square(points).sum(1) for points in (real, generated)]
    in_float32 = squares[0][:, None] + squares[1] - 2 * real @ generated.T
    exact = cdist(real.astype(np.float64), generated.astype(np.float64), "sqeuclidean")
    assert np.abs(in_float32 - exact).max() > 100 * exact.max()
    assert precision_and_recall(real, generated) == pytest.approx(by_brute_force(real, generated), abs=1e-12)


def test_near_neighbours_in_two_far_clusters_are_told_apart():
    """A shift brings one of them alone to the origin. Squared distances are 1e-10 of the squared norms."""
    real, generated = (
        np.concatenate((1e-3 * blobs(seed, 60), 100 + 1e-3 * blobs(seed + 1, 60))) for seed in (9, 11)
    )
    assert 0.2 < by_brute_force(real, generated)[0] < 0.9
    assert precision_and_recall(real, generated) == pytest.approx(by_brute_force(real, generated), abs=1e-12)


def test_a_generator_of_one_image_over_and_over_covers_nothing_but_it():
    real = blobs(7, 100)
    collapsed = np.repeat(real[:1], 50, axis=0)
    assert precision_and_recall(real, collapsed) == (1, 0.01)
    off = collapsed + 1e-3
    assert precision_and_recall(real, off) == (1, 0)


def test_equal_images_of_a_real_set_are_real():
    real = np.repeat(blobs(8, 20), 5, axis=0)  # every ball has radius zero
    assert precision_and_recall(real, real) == (1, 1)
    assert precision_and_recall(real, real + 1e-3) == (0, 0)
