"""Edited images keep what is known of them exactly, and take the rest from the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ict_fast.config import Config
from ict_fast.consistency import ConsistencyModel, colorize, edit, inpaint, sample, stroke, upscale
from ict_fast.consistency.editing import (
    LUMINANCE,
    editing_sigmas,
    luminance,
    patch_means,
    patches_within_range,
    within_range,
)
from ict_fast.data.pictures import to_uint8
from ict_fast.errors import InputError


class OneValue(nn.Module):
    """The exact consistency function of images whose pixels all have the same value, drawn from N(0, 0.25).

    In the direction of the constant image the noisy data have variance 0.25 + s^2/d, and the probability flow
    scales that direction by the ratio of the standard deviations; in every other direction it goes to 0.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.register_parameter("unused", nn.Parameter(torch.zeros(())))
        self.calls: list[float] = []

    def forward(self, x: Tensor, sigma: float, labels: Tensor | None = None) -> Tensor:
        self.calls.append(sigma)
        mean = x.mean((1, 2, 3), keepdim=True)
        pixels = x[0].numel()
        low = self.config.method.sigma_min
        scale = math.sqrt((0.25 + low**2 / pixels) / (0.25 + sigma**2 / pixels))
        return (scale * mean).expand_as(x)


@pytest.fixture
def colour(tiny: Config) -> ConsistencyModel:
    """A model of RGB images with random weights everywhere."""
    config = replace(tiny, network=replace(tiny.network, image_channels=3))
    model = ConsistencyModel(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def images() -> Tensor:
    return 2 * torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 1


@pytest.mark.parametrize("project", [luminance, lambda x: patch_means(x, 4)], ids=["luminance", "patches"])
def test_what_is_known_is_an_orthogonal_projection(project: Callable, images: Tensor) -> None:
    images = images.double()
    other = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(project(project(images)), project(images))
    torch.testing.assert_close((project(images) * other).sum(), (images * project(other)).sum())
    torch.testing.assert_close(project(2 * images + other), 2 * project(images) + project(other))


def test_luminance_is_that_of_bt_601(images: Tensor) -> None:
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    torch.testing.assert_close(
        (luminance(images) * weights).sum(1), (images * weights).sum(1), atol=1e-6, rtol=0
    )


def test_inpainting_leaves_the_visible_pixels(colour: ConsistencyModel, images: Tensor) -> None:
    hole = torch.zeros(8, 8, dtype=torch.bool)
    hole[2:6, 3:] = True
    edited = inpaint(colour, images, hole, steps=5)
    torch.testing.assert_close(edited[:, :, ~hole], images[:, :, ~hole], atol=1e-6, rtol=0)
    assert (edited[:, :, hole] - images[:, :, hole]).abs().mean() > 0.1
    hidden = torch.where(hole, torch.nan, images)
    assert torch.equal(inpaint(colour, hidden, hole, steps=5), edited), "the hole was looked at"


def test_colours_leave_the_luminance(colour: ConsistencyModel, images: Tensor) -> None:
    edited = colorize(colour, images, steps=5)
    torch.testing.assert_close(luminance(edited), luminance(images), atol=1e-5, rtol=0)
    grey = (images * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    torch.testing.assert_close(colorize(colour, grey, steps=5), edited, atol=1e-3, rtol=0)
    assert (edited - luminance(edited)).abs().mean() > 0.05
    written = torch.as_tensor(to_uint8(edited)).permute(0, 3, 1, 2) / 127.5 - 1
    # Each colour is rounded by half a level of 2/255 at most, so the luminance is, too.
    kept = ((written - images) * torch.tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1).abs()
    assert kept.max() <= 0.5 * 2 / 255 + 1e-5


def test_colours_out_of_range_are_paler_and_others_as_they_were(images: Tensor) -> None:
    wild = 2 * images.double()
    wild -= luminance(wild) - luminance(images.double())
    paler = within_range(wild)
    weights = torch.tensor(LUMINANCE, dtype=torch.float64).view(1, 3, 1, 1)
    grey = (wild * weights).sum(1, keepdim=True)
    torch.testing.assert_close((paler * weights).sum(1, keepdim=True), grey)
    inside = (wild.abs() <= 1).all(1)
    assert 0.1 < inside.double().mean() < 0.9
    torch.testing.assert_close(paler.movedim(1, -1)[inside], wild.movedim(1, -1)[inside])
    assert torch.allclose(paler.abs().amax(1)[~inside], torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(
        torch.nn.functional.cosine_similarity(paler - grey, wild - grey), torch.ones_like(grey)[:, 0]
    )


def test_details_leave_the_small_image(colour: ConsistencyModel, images: Tensor) -> None:
    small = torch.nn.functional.avg_pool2d(images, 2)
    edited = upscale(colour, small, steps=5)
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(edited, 2), small, atol=1e-5, rtol=0)
    assert (edited - patch_means(edited, 2)).abs().mean() > 0.05


def test_details_leave_small_images_near_black_and_white(colour: ConsistencyModel) -> None:
    """The mean of the pixels that are written differs from what was given by their rounding alone."""
    values = torch.tensor([0, 1, 3, 10, 128, 245, 252, 254, 255], dtype=torch.uint8)
    small = values[torch.randint(len(values), (6, 3, 4, 4), generator=torch.Generator().manual_seed(0))]
    edited = to_uint8(upscale(colour, small / 127.5 - 1, steps=5)).astype(float)
    means = edited.reshape(6, 4, 2, 4, 2, 3).mean((2, 4)).transpose(0, 3, 1, 2)
    assert np.abs(means - small.numpy()).max() <= 0.5
    saturated = (small == 0) | (small == 255)
    assert (means == small.numpy())[saturated.numpy()].all()
    assert edited.std() > 0


def test_a_patch_is_flattened_only_as_far_as_it_has_to_be(images: Tensor) -> None:
    wild = 2 * images.double()
    wild -= patch_means(wild, 2) - patch_means(images.double(), 2)
    flatter, means = patches_within_range(wild, 2), patch_means(wild, 2)
    torch.testing.assert_close(patch_means(flatter, 2), means)
    largest = torch.nn.functional.max_pool2d(wild.abs(), 2)
    inside = (largest <= 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert 0.1 < inside.double().mean() < 0.9
    torch.testing.assert_close(flatter[inside], wild[inside])
    reached = torch.nn.functional.max_pool2d(flatter.abs(), 2)[largest > 1]
    torch.testing.assert_close(reached, torch.ones_like(reached))
    # Along the way from the mean: of every patch by one factor.
    ratio = (flatter - means) / (wild - means)
    torch.testing.assert_close(ratio, patch_means(ratio, 2))


def test_a_hole_is_filled_with_what_the_rest_says(tiny: Config) -> None:
    """All pixels of an image are equal in this world; so the hole must take the value of what is seen."""
    config = replace(tiny, network=replace(tiny.network, image_channels=1))
    hole = torch.zeros(8, 8, dtype=torch.bool)
    hole[:, 4:] = True
    values = torch.tensor([-0.6, 0.0, 0.3, 0.7]).view(4, 1, 1, 1)
    edited = inpaint(OneValue(config), values.expand(4, 1, 8, 8), hole)
    torch.testing.assert_close(edited, values.expand(4, 1, 8, 8), atol=0.02, rtol=0)


def test_stroke_begins_at_its_sigma_and_keeps_the_rough_image(tiny: Config) -> None:
    model = OneValue(tiny)
    rough = torch.full((64, 1, 8, 8), 0.5)
    near = stroke(model, rough, sigma=0.5, steps=1)
    assert model.calls == [pytest.approx(0.5)]
    # The scale of f at 0.5 is sqrt(0.25 / (0.25 + 0.25 / 64)) = 0.992.
    assert near.mean() == pytest.approx(0.5 * 0.992, abs=0.02)
    assert stroke(model, rough, sigma=80.0, steps=1).std() > 2 * near.std()


def test_levels_fall_on_karras_grid() -> None:
    from ict_fast.config import MethodConfig

    method = MethodConfig()
    levels = editing_sigmas(4, method)
    inner = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(4)]
    assert levels == pytest.approx(inner)
    assert editing_sigmas(3, method, 5.0)[0] == pytest.approx(5.0)


def test_nothing_known_is_sampling(colour: ConsistencyModel) -> None:
    """With nothing known the edit of any image is a sample of the same seed and levels."""
    levels = (80.0, 2.0, 0.5)
    edited = edit(colour, torch.ones(3, 3, 8, 8), lambda x: 0 * x, levels, seed=4)
    torch.testing.assert_close(edited, sample(colour, 3, steps=3, sigmas=levels[1:], seed=4))


def test_an_image_is_edited_alike_in_any_batch(
    colour: ConsistencyModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = colorize(colour, images, steps=3)
    monkeypatch.setattr("ict_fast.consistency.editing.BATCH_SIZE", 2)
    done: list[int] = []
    torch.testing.assert_close(
        colorize(colour, images, steps=3, progress=done.append), whole, atol=1e-5, rtol=0
    )
    assert done == [2, 4, 5]


def test_labels_reach_the_model(tiny: Config) -> None:
    config = replace(tiny, network=replace(tiny.network, num_classes=3))
    seen = []

    class Model(OneValue):
        def forward(self, x: Tensor, sigma: float, labels: Tensor | None = None) -> Tensor:
            seen.append(labels)
            return super().forward(x, sigma, labels)

    stroke(Model(config), torch.zeros(2, 1, 8, 8), steps=1, labels=[2, 0])
    assert seen[0].tolist() == [2, 0]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda m: inpaint(m, torch.zeros(2, 3, 8, 8), torch.zeros(4, 4, dtype=torch.bool)), "must be bool"),
        (lambda m: inpaint(m, torch.zeros(2, 3, 8, 8), torch.zeros(8, 8)), "must be bool"),
        (lambda m: upscale(m, torch.zeros(2, 3, 3, 3)), "a whole factor"),
        (lambda m: upscale(m, torch.zeros(2, 3, 8, 8)), "a whole factor"),
        (lambda m: upscale(m, torch.zeros(2, 1, 4, 4)), "this model takes"),
        (lambda m: colorize(m, torch.zeros(2, 1, 4, 4)), "this model takes"),
        (lambda m: stroke(m, torch.zeros(2, 3, 8, 8), sigma=100.0), "first noise level is 100"),
        (lambda m: stroke(m, torch.zeros(2, 3, 8, 8), steps=0), "steps is 0"),
        (lambda m: stroke(m, torch.zeros(2, 3, 8, 8), labels=[1, 2]), "unconditional"),
        (lambda m: edit(m, torch.zeros(2, 3, 8, 8), lambda x: x, ()), "sigmas are missing"),
    ],
)
def test_what_cannot_be_edited_says_why(colour: ConsistencyModel, call: Callable, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        call(colour)


def test_a_model_of_grey_images_has_no_colours(tiny: Config) -> None:
    with pytest.raises(InputError, match="grey"):
        colorize(ConsistencyModel(tiny), torch.zeros(1, 1, 8, 8))
