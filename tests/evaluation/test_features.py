"""The digits classifier: a good one, the same everywhere, with distances that rank what an eye would rank."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from ict_fast.data.prepare import load_digits
from ict_fast.errors import InputError
from ict_fast.evaluation.features import digits_features
from ict_fast.evaluation.image_distance import FrechetDistance
from ict_fast.evaluation.metrics import gaussian_images, halves, noise_images

_IN_A_FRESH_PROCESS = """
import json, torch
threads = torch.get_num_threads() + 1
torch.set_num_threads(threads)
torch.manual_seed(123)
from ict_fast.evaluation.features import digits_features
before = torch.random.get_rng_state()
with torch.inference_mode():
    features = digits_features()
after = torch.random.get_rng_state()
threads_after = torch.get_num_threads()
print(json.dumps({
    "weights": [parameter.pow(2).sum().item() for parameter in features.parameters()],
    "accuracy": features.accuracy,
    "global_generator_untouched": torch.equal(before, after),
    "threads": threads_after,
}))
"""


@pytest.fixture(scope="module")
def distance_to_the_digits():
    return FrechetDistance(digits_features(), load_digits()[0]).to


def _corrupted_by_noise(images, standard_deviation):
    noise = np.random.default_rng(0).normal(0, standard_deviation, images.shape)
    return (images + noise).round().clip(0, 255).astype(np.uint8)


def _blurred(images, radius):
    return gaussian_filter(images.astype(float), (0, radius, radius, 0)).round().astype(np.uint8)


def test_the_classifier_is_right_on_97_percent_of_unseen_digits():
    assert digits_features().accuracy >= 0.97


def test_training_is_the_same_whatever_the_threads_and_the_global_seed():
    # Beside this process: another thread count, another global seed, and gradients forbidden.
    output = subprocess.run(
        [sys.executable, "-c", _IN_A_FRESH_PROCESS], check=True, capture_output=True, text=True
    ).stdout
    other = json.loads(output)
    ours = [parameter.pow(2).sum().item() for parameter in digits_features().parameters()]
    assert other["weights"] == pytest.approx(ours, rel=1e-15)
    assert other["accuracy"] == digits_features().accuracy
    assert other["global_generator_untouched"]
    assert other["threads"] == torch.get_num_threads() + 1


def test_features_have_the_interface_of_torchmetrics_and_no_gradients():
    features = digits_features()
    out = features(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
    assert out.shape == (3, features.num_features)
    assert out.dtype == torch.float64
    assert not out.requires_grad


def test_no_feature_is_dead_on_the_digits():
    features = digits_features()(torch.from_numpy(load_digits()[0]).permute(0, 3, 1, 2))
    assert np.linalg.cond(np.cov(features.numpy(), rowvar=False)) < 1e8


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 1, 8, 8),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 8, 8, 1, dtype=torch.uint8),
        torch.zeros(2, 1, 32, 32, dtype=torch.uint8),
    ],
)
def test_other_images_are_refused_with_their_shape(images):
    with pytest.raises(InputError, match=rf"{str(images.dtype)[6:]} of shape \({images.shape[0]}, "):
        digits_features()(images)


def test_more_corruption_is_a_larger_distance(distance_to_the_digits):
    images = load_digits()[0]
    for corrupt, amounts in ((_corrupted_by_noise, (8, 24, 64, 128)), (_blurred, (0.3, 0.5, 0.7, 1.0))):
        distances = [distance_to_the_digits(corrupt(images, amount)) for amount in amounts]
        assert distances == sorted(distances)
        assert distances[0] > 0


def test_distances_rank_sets_from_real_images_to_noise(distance_to_the_digits):
    images, labels = load_digits()
    mean_digit = images.mean(0, keepdims=True).round().astype(np.uint8).repeat(1797, axis=0)
    ranked = [
        images,
        _corrupted_by_noise(images, 8),
        images[labels != 7],
        gaussian_images(images, 1797),
        images[:, :, ::-1],
        images[labels == 3],
        noise_images(images, 1797),
    ]
    distances = [distance_to_the_digits(images) for images in ranked]
    assert distances == sorted(distances)
    assert distances[0] < 1e-3
    assert distance_to_the_digits(mean_digit) > 5 * distance_to_the_digits(gaussian_images(images, 1797))


def test_real_halves_are_ten_times_nearer_than_a_gaussian_and_below_1_percent_of_noise(
    distance_to_the_digits,
):
    images = load_digits()[0]
    first, second = halves(images)
    between_halves = FrechetDistance(digits_features(), first).to(second)
    assert between_halves < 0.1 * distance_to_the_digits(gaussian_images(images, 5000))
    assert between_halves < 0.01 * distance_to_the_digits(noise_images(images, 5000))
