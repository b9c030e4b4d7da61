"""Distances of images: two sets of known Gaussians, equal sets, and what is not enough."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, nn

from ict_fast.data.prepare import load_digits
from ict_fast.errors import InputError
from ict_fast.evaluation import FrechetDistance, digits_features
from ict_fast.evaluation.metrics import noise_images


class Pixels(nn.Module):
    """The pixels themselves as features."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).double()


def test_two_gaussians_have_the_closed_form_distance() -> None:
    # Independent pixels: |m1 - m2|^2 + sum over pixels (s1 - s2)^2; two values at m +- s have deviation s.
    means, deviations = np.array([[100, 50, 80], [110, 45, 80]]), np.array([[30, 20, 10], [10, 25, 10]])
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
    first, second = (
        np.tile((mean + deviation * signs), (500, 1)).astype(np.uint8).reshape(-1, 1, 3, 1)
        for mean, deviation in zip(means, deviations, strict=True)
    )
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    spread = ((deviations[0] - deviations[1]) ** 2).sum() / 3999  # covariances divide by n - 1
    assert FrechetDistance(Pixels(), first).to(second) == pytest.approx(expected + spread, rel=1e-9)


def test_equal_sets_have_distance_zero_and_the_reference_serves_several(tmp_path: Path) -> None:
    images = load_digits()[0]
    np.save(tmp_path / "images.npy", images)
    distance = FrechetDistance(digits_features(), np.load(tmp_path / "images.npy", mmap_mode="r"))
    noise = noise_images(images, 300)
    before = distance.to(noise)
    assert distance.to(images[::-1]) == pytest.approx(0, abs=1e-9 * before)
    assert distance.to(noise) == before == FrechetDistance(digits_features(), images).to(noise)


@pytest.mark.parametrize(("reference", "images"), [(5, 1), (1, 5), (5, 0)])
def test_fewer_than_two_images_are_refused(reference: int, images: int) -> None:
    digits = load_digits()[0]
    with pytest.raises(InputError, match=r"at least 2"):
        FrechetDistance(digits_features(), digits[:reference]).to(digits[:images])
