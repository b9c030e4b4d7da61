"""Sampling against the algorithm, with a model whose consistency function is known."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ict_fast.config import Config
from ict_fast.consistency.model import ConsistencyModel
from ict_fast.consistency.sampling import sample, sample_pixels, sampling_sigmas
from ict_fast.data.pictures import to_uint8
from ict_fast.errors import InputError, TrainingError


class Shrink(ConsistencyModel):
    """f(x, s) = x / (1 + s): closed form, so every step can be followed by hand."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, nn.Linear(1, 1))
        self.seen: list[tuple[Tensor, float]] = []

    def forward(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        self.seen.append((x.clone(), float(sigma)))
        return x / (1 + sigma)


def test_one_step_is_f_of_pure_noise(tiny: Config) -> None:
    model = Shrink(tiny)
    images = sample(model, 500, seed=3, clamp=False)
    noise = torch.cat([x for x, _ in model.seen])
    torch.testing.assert_close(images, noise / 81)
    assert {sigma for _, sigma in model.seen} == {80.0}
    z = noise / 80
    assert float(z.mean()) == pytest.approx(0, abs=0.02)
    assert float(z.std()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("tau", [0.821, 0.003])  # near sigma_min what is left of the noise is another amount
def test_two_steps_add_noise_up_to_tau_and_map_back(tiny: Config, tau: float) -> None:
    model = Shrink(tiny)
    images = sample(model, 100, steps=2, sigmas=[tau], seed=3, clamp=False)
    (first, _), (second, sigma) = model.seen
    added = second - first / 81
    assert sigma == tau
    assert float(added.std()) == pytest.approx((tau**2 - 0.002**2) ** 0.5, rel=0.03)
    assert abs(float((added * first).mean()) / float(added.std() * first.std())) < 0.05, "fresh noise"
    torch.testing.assert_close(images, second / (1 + tau))


def test_images_are_clamped_between_steps(tiny: Config) -> None:
    config = replace(tiny, method=replace(tiny.method, sigma_max=3.0))
    clamped, free = Shrink(config), Shrink(config)
    images = sample(clamped, 100, steps=2)
    sample(free, 100, steps=2, clamp=False)
    assert float(images.abs().max()) <= 1
    first = clamped.seen[0][0] / 4
    assert float(first.abs().max()) > 2
    # The same noise on top of either.
    noise, noise_free = clamped.seen[1][0] - first.clamp(-1, 1), free.seen[1][0] - first
    torch.testing.assert_close(noise, noise_free, atol=1e-5, rtol=0)
    assert float(noise.std()) == pytest.approx(0.821, rel=0.05)


def test_image_i_does_not_depend_on_the_count(tiny: Config) -> None:
    few, many = sample(Shrink(tiny), 10, steps=2, seed=1), sample(Shrink(tiny), 300, steps=2, seed=1)
    assert torch.equal(few, many[:10])
    assert not torch.equal(few, sample(Shrink(tiny), 10, steps=2, seed=2))


@pytest.mark.parametrize("first", [0, 256, 512])
def test_pixels_are_those_of_the_images_from_any_batch_on(tiny: Config, first: int) -> None:
    class OfClass(Shrink):
        def forward(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
            assert labels is not None
            return super().forward(x, sigma) / 2 + labels.view(-1, 1, 1, 1) / 20

    model = OfClass(replace(tiny, network=replace(tiny.network, num_classes=10)))
    labels = torch.arange(700) % 10
    whole = to_uint8(sample(model, 700, steps=2, labels=labels, seed=4))
    part = sample_pixels(model, 700 - first, steps=2, labels=labels[first:], seed=4, first=first)
    assert np.array_equal(part, whole[first:])
    assert np.array_equal(part, sample_pixels(model, 700 - first, steps=2, seed=4, first=first))


def test_pixels_of_many_images_hold_one_batch_in_floating_point(tiny: Config) -> None:
    """As 50,000 images of ImageNet 64x64, 2.5 GB in fp32, must."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

    class Counts(Shrink):
        most = 0

        def forward(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
            image = x / 81
            alive.add(image)
            self.most = max(self.most, len(alive))
            return image

    model = Counts(tiny)
    assert sample_pixels(model, 8 * 256).dtype == np.uint8
    assert model.most <= 2


def test_images_that_are_not_finite_are_counted_in_one_line(tiny: Config) -> None:
    class Breaks(Shrink):
        def forward(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
            image = torch.zeros_like(x)
            image[3, 0, 0, 0] = float("nan")
            return image

    with pytest.raises(TrainingError, match=r"2 of 300 images sampled in 1 step hold NaN .* diverged"):
        sample_pixels(Breaks(tiny), 300)


def test_default_levels_are_geometric_down_to_the_second_sigma(tiny: Config) -> None:
    assert sampling_sigmas(1, tiny.method) == ()
    assert sampling_sigmas(2, tiny.method) == pytest.approx((0.821,))
    levels = (80.0, *sampling_sigmas(5, tiny.method))
    ratios = [b / a for a, b in itertools.pairwise(levels)]
    assert ratios == pytest.approx([ratios[0]] * 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"count": 0}, "count is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2, "sigmas": [0.5, 0.2]}, "2 steps need 1 sigmas"),
        ({"steps": 2, "sigmas": [90.0]}, "sigma_max"),
        ({"steps": 2, "sigmas": [0.001]}, "sigma_min"),
        ({"steps": 3, "sigmas": [0.5, 0.6]}, "must fall"),
        ({"labels": [0] * 4}, "unconditional"),
    ],
)
def test_what_cannot_be_sampled_is_refused(tiny: Config, arguments: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        sample(Shrink(tiny), **{"count": 4, **arguments})


def test_labels_must_be_classes_of_the_model(tiny: Config) -> None:
    model = Shrink(replace(tiny, network=replace(tiny.network, num_classes=10)))
    with pytest.raises(InputError, match=r"0\.\.9"):
        sample(model, 2, labels=[0, 10])
    with pytest.raises(InputError, match="one per image"):
        sample(model, 2, labels=[0])
    for labels in ([0, 1.9], [True, False]):
        with pytest.raises(InputError, match="must be whole numbers"):
            sample(model, 2, labels=labels)
