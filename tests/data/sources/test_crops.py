"""The crops against the recipes' definitions, written down a second time and, in part, without Pillow."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from ict_fast.data.sources.crops import center_crop, center_crop_dhariwal, no_crop
from ict_fast.data.sources.image_decoding import RejectedImage

SIZES = [
    (500, 375), (375, 500), (64, 64), (65, 300), (128, 128), (127, 255), (129, 128), (256, 1000), (20, 17),
    (1, 1), (1, 3), (333, 2000), (30_000, 70), (63, 64), (191, 192), (513, 511),
]  # fmt: skip


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise on a slope, so that neither rounding nor a shift by a pixel goes unseen."""
    channels = len(mode)
    noise = np.random.default_rng(width * 7 + height).integers(0, 120, (height, width, channels))
    slope = np.linspace(0, 135, width)[None, :, None]
    pixels = (noise + slope).astype(np.uint8)
    return Image.fromarray(pixels if channels == 3 else pixels[..., 0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_center_crop_dhariwal_is_the_recipe_of_adm_to_the_bit(size: tuple[int, int], mode: str) -> None:
    image = picture(*size, mode)
    halvings = max(0, int(math.log2(min(size) / 64)))
    reduced = image
    for _ in range(halvings):
        width, height = reduced.size
        reduced = reduced.resize((width // 2, height // 2), resample=Image.Resampling.BOX)
    width, height = reduced.size
    scale = 64 / min(width, height)
    reduced = reduced.resize((round(width * scale), round(height * scale)), resample=Image.Resampling.BICUBIC)
    pixels = np.array(reduced)
    top, left = (pixels.shape[0] - 64) // 2, (pixels.shape[1] - 64) // 2
    expected = pixels[top : top + 64, left : left + 64]
    ours = np.asarray(center_crop_dhariwal(image, 64))
    assert expected.shape[:2] == (64, 64)
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_center_crop_is_the_recipe_of_edm_to_the_bit(size: tuple[int, int], mode: str) -> None:
    image = picture(*size, mode)
    pixels = np.array(image)
    height, width = pixels.shape[:2]
    side = min(height, width)
    square = pixels[(height - side) // 2 : (height + side) // 2, (width - side) // 2 : (width + side) // 2]
    expected = Image.fromarray(np.ascontiguousarray(square)).resize((64, 64), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(np.asarray(center_crop(image, 64)), np.asarray(expected))


def test_one_halving_is_a_mean_of_two_by_two() -> None:
    image = picture(256, 128)
    pixels = np.asarray(image).astype(int)
    rows = (pixels[:, 0::2] + pixels[:, 1::2] + 1) // 2  # Pillow rounds after each direction
    expected = ((rows[0::2] + rows[1::2] + 1) // 2)[:, 32:96]
    np.testing.assert_array_equal(np.asarray(center_crop_dhariwal(image, 64)), expected)


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys 1981 with a = -0.5."""
    x = np.abs(x)
    inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def resampled(pixels: np.ndarray, side: int, kernel: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """float64 (side, side, C): the kernel, widened to the scale, along both directions."""

    def weights(length: int) -> np.ndarray:
        scale = length / side
        centres = (np.arange(side) + 0.5) * scale
        found = kernel((np.arange(length) + 0.5 - centres[:, None]) / max(scale, 1.0))
        return found / found.sum(axis=1, keepdims=True)

    height, width = pixels.shape[:2]
    rows = np.clip(np.einsum("ow,hwc->hoc", weights(width), pixels.astype(float)), 0, 255)
    return np.clip(np.einsum("oh,hwc->owc", weights(height), rows), 0, 255)


@pytest.mark.parametrize("side", [90, 64, 40])
@pytest.mark.parametrize(
    ("crop", "kernel"), [(center_crop_dhariwal, cubic), (center_crop, lanczos)], ids=["bicubic", "lanczos"]
)
def test_the_resampling_is_that_of_the_kernels_formula(crop, kernel, side: int) -> None:
    image = picture(side, side)
    expected = resampled(np.asarray(image), 64, kernel)
    # Pillow rounds after each direction: half a level, spread by negative lobes, and half a level.
    assert np.abs(np.asarray(crop(image, 64)) - expected).max() < 1.3


def test_no_crop_takes_the_right_size_alone() -> None:
    image = picture(64, 64)
    assert no_crop(image, 64) is image
    with pytest.raises(RejectedImage, match="64x65 instead of 64x64"):
        no_crop(picture(64, 65), 64)


def test_an_image_too_elongated_to_be_enlarged_is_rejected_and_not_allocated() -> None:
    with pytest.raises(RejectedImage, match="30000x1 is too elongated"):
        center_crop_dhariwal(Image.new("L", (30_000, 1)), 64)
    assert center_crop(Image.new("L", (30_000, 1)), 64).size == (64, 64)
