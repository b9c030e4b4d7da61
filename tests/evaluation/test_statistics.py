"""The Fréchet distance against closed forms, scipy's matrix root, and torchmetrics."""

import numpy as np
import pytest
import scipy.linalg
import torch

from ict_fast.errors import InputError
from ict_fast.evaluation.statistics import Statistics, frechet_distance, statistics, sums


def of(features):
    return statistics([sums(features)])


def drawn(seed, count, size, scale=1.0, shift=0.0):
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(size, size)) * np.logspace(0, -3, size)
    return np.maximum(generator.normal(size=(count, size)) @ mixing.T * scale + shift, 0)


def test_two_gaussians_have_the_closed_form_distance():
    # With common axes the roots are known: |m1 - m2|^2 + sum (s1 - s2)^2.
    generator = np.random.default_rng(0)
    axes = np.linalg.qr(generator.normal(size=(30, 30)))[0]
    means = generator.normal(size=(2, 30)) * 3
    deviations = generator.uniform(0, 4, size=(2, 30))
    gaussians = [Statistics(m, axes @ np.diag(s**2) @ axes.T) for m, s in zip(means, deviations, strict=True)]
    expected = np.square(means[0] - means[1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    assert frechet_distance(*gaussians) == pytest.approx(expected, rel=1e-12)


def test_samples_of_two_gaussians_approach_the_closed_form():
    generator = np.random.default_rng(1)
    first = generator.normal(0, [1, 2, 3], size=(200_000, 3))
    second = generator.normal([1, 0, 2], [2, 2, 1], size=(200_000, 3))
    assert frechet_distance(of(first), of(second)) == pytest.approx(1 + 4 + 1 + 0 + 4, rel=0.01)


def test_equal_sets_have_distance_zero():
    features = drawn(2, 400, 64)
    assert frechet_distance(of(features), of(features[::-1].copy())) == pytest.approx(0, abs=1e-10)


def test_the_distance_equals_scipys_matrix_root():
    first, second = of(drawn(3, 5000, 200)), of(drawn(4, 5000, 200, 1.2, 0.1))
    root = scipy.linalg.sqrtm(first.covariance @ second.covariance).real
    expected = np.square(first.mean - second.mean).sum()
    expected += np.trace(first.covariance + second.covariance - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)


def test_with_2048_features_of_300_images_it_still_equals_scipys_root():
    """The covariances have rank 299. tr (S1 S2)^(1/2) is that of the root of a 299 x 299 matrix, which scipy
    can take without losing half the digits: with S = X'X the nonzero eigenvalues of S1 S2 are those of M M',
    M = X1 X2'. Helmert's matrix centres the images and leaves out the direction that this makes zero."""
    sets = [drawn(5, 300, 2048), drawn(6, 310, 2048, 1.1, 0.1)]
    centred = [scipy.linalg.helmert(len(x)) @ x / np.sqrt(len(x) - 1) for x in sets]
    between = centred[0] @ centred[1].T
    root = scipy.linalg.sqrtm(between @ between.T).real
    expected = np.square(sets[0].mean(0) - sets[1].mean(0)).sum()
    expected += sum(np.square(x).sum() for x in centred) - 2 * np.trace(root)
    assert frechet_distance(of(sets[0]), of(sets[1])) == pytest.approx(expected, rel=1e-6)


def test_the_distance_equals_torchmetrics():
    from torch import nn
    from torchmetrics.image.fid import FrechetInceptionDistance

    class AsTheyAre(nn.Module):
        num_features = 20

        def forward(self, features):
            return features

    sets = [drawn(7, 700, 20), drawn(8, 900, 20, 1.5)]
    metric = FrechetInceptionDistance(AsTheyAre())
    for features, real in zip(sets, (True, False), strict=True):
        metric.update(torch.from_numpy(features), real=real)
    assert frechet_distance(*map(of, sets)) == pytest.approx(float(metric.compute()), rel=1e-9)


def test_parts_add_up_to_numpys_statistics_of_the_whole():
    features = drawn(9, 1000, 12).astype(np.float32)
    found = statistics(sums(part) for part in (features[:1], features[1:700], features[700:]))
    assert found.mean == pytest.approx(features.mean(0, dtype=np.float64), rel=1e-12)
    assert found.covariance == pytest.approx(np.cov(features.astype(np.float64), rowvar=False), rel=1e-9)


def test_a_mean_that_is_large_beside_the_spread_costs_no_digits():
    """A shift of all features leaves distances as they are; plain sums of products would be off by 1 %."""
    generator = np.random.default_rng(10)
    sets = [generator.normal(0, 1, (3000, 16)), generator.normal(0.5, 1.3, (2000, 16))]

    def distance(shift):
        parts = [[sums(part) for part in np.array_split(features + shift, 7)] for features in sets]
        return frechet_distance(*map(statistics, parts))

    assert distance(1e6) == pytest.approx(distance(0), rel=1e-6)


@pytest.mark.parametrize(("count", "said"), [(0, "0 images"), (1, "1 image;")])
def test_fewer_than_two_images_are_refused(count, said):
    with pytest.raises(InputError, match=rf"{said}.* at least 2"):
        of(np.zeros((count, 3)))
