"""The Fréchet distance against closed forms and an independent computation."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from ict_fast.data.prepare import load_digits
from ict_fast.errors import InputError
from ict_fast.evaluation.features import digits_features
from ict_fast.evaluation.metrics import FrechetDistance, gaussian_images, halves, noise_images


class Pixels(nn.Module):
    """The pixels themselves as features."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, images):
        return images.flatten(1).double()


def _by_square_root_of_the_matrix(features_a, features_b):
    mean_a, mean_b = features_a.mean(0), features_b.mean(0)
    cov_a, cov_b = np.cov(features_a, rowvar=False), np.cov(features_b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)


def test_equal_sets_have_distance_zero():
    images = load_digits()[0]
    assert FrechetDistance(digits_features(), images).to(images[::-1]) < 1e-6 * images.size


def test_two_gaussians_have_the_closed_form_distance():
    # Independent pixels: |m1 - m2|^2 + sum over pixels (s1 - s2)^2; two values at m +- s have deviation s.
    means, deviations = np.array([[100, 50, 80], [110, 45, 80]]), np.array([[30, 20, 10], [10, 25, 10]])
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
    first, second = (
        np.tile((mean + deviation * signs), (500, 1)).astype(np.uint8).reshape(-1, 1, 3, 1)
        for mean, deviation in zip(means, deviations, strict=True)
    )
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    bessel = 4000 / 3999  # torchmetrics' covariances divide by n - 1
    spread = ((deviations[0] - deviations[1]) ** 2).sum() * (bessel - 1)
    assert FrechetDistance(Pixels(3), first).to(second) == pytest.approx(expected + spread, rel=1e-9)


def test_the_distance_equals_scipys_matrix_square_root():
    images = load_digits()[0]
    features = digits_features()

    def numbers(images):
        return features(torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)).numpy()

    for other in (noise_images(images, 700), gaussian_images(images, 700), images[:400]):
        expected = _by_square_root_of_the_matrix(numbers(images), numbers(other))
        assert FrechetDistance(features, images).to(other) == pytest.approx(expected, rel=1e-6)


def test_a_reference_is_measured_once_and_serves_several_sets():
    images = load_digits()[0]
    distance = FrechetDistance(digits_features(), images)
    noise = noise_images(images, 300)
    first = distance.to(noise)
    distance.to(images[:100])
    assert distance.to(noise) == first


def test_a_read_only_memory_map_is_a_set_like_any_other(tmp_path):
    images = load_digits()[0]
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    noise = noise_images(images, 300)
    in_memory = FrechetDistance(digits_features(), images).to(noise)
    assert FrechetDistance(digits_features(), mapped).to(noise) == in_memory


def test_one_image_is_refused():
    images = load_digits()[0]
    with pytest.raises(InputError, match=r"1 images; .* at least 2"):
        FrechetDistance(digits_features(), images).to(images[:1])


def test_gaussian_images_have_the_pixels_mean_and_covariance():
    pixels = np.random.default_rng(0).multivariate_normal([100, 140], [[200, 120], [120, 300]], 20_000)
    images = pixels.round().astype(np.uint8).reshape(-1, 1, 2, 1)
    drawn = gaussian_images(images, 100_000).reshape(-1, 2).astype(float)
    assert drawn.mean(0) == pytest.approx(images.reshape(-1, 2).mean(0), abs=0.3)
    assert np.cov(drawn.T) == pytest.approx(np.cov(images.reshape(-1, 2).T), rel=0.03)


def test_halves_are_disjoint_and_whole():
    first, second = halves(np.arange(11))
    assert (len(first), len(second)) == (5, 6)
    assert sorted([*first, *second]) == list(range(11))


def test_the_distance_needs_neither_torchvision_nor_torch_fidelity():
    code = (
        "import sys; sys.modules.update(torchvision=None, torch_fidelity=None)\n"
        "from torchmetrics.image.fid import FrechetInceptionDistance\n"
        "from torch import nn\n"
        "class F(nn.Module): num_features = 2\n"
        "FrechetInceptionDistance(feature=F())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
