"""Pictures show the pixels that they were given."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ict_fast.data.pictures import image_grid, save_png, to_uint8

RANDOM = np.random.default_rng(1)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_png_holds_the_pixels_enlarged_without_smoothing(tmp_path: Path, channels: int, mode: str) -> None:
    images = RANDOM.integers(0, 256, (7, 8, 8, channels), dtype=np.uint8)
    save_png(image_grid(images, columns=3, scale=6, padding=1), tmp_path / "new" / "grid.png")
    with Image.open(tmp_path / "new" / "grid.png") as picture:
        assert picture.mode == mode
        pixels = np.asarray(picture).reshape(*picture.size[::-1], channels)
    assert pixels.shape == ((3 * 9 + 1) * 6, (3 * 9 + 1) * 6, channels)
    seen = np.zeros(pixels.shape[:2], bool)
    for number, image in enumerate(images):
        for y in range(8):
            for x in range(8):
                top, left = (1 + number // 3 * 9 + y) * 6, (1 + number % 3 * 9 + x) * 6
                block = pixels[top : top + 6, left : left + 6]
                assert (block == image[y, x]).all()
                seen[top : top + 6, left : left + 6] = True
    assert (pixels[~seen] == 255).all()  # white between the tiles, around them, and for the missing ones


@pytest.mark.parametrize(("size", "scale"), [(8, 6), (32, 2), (48, 1), (64, 1), (1, 48)])
def test_small_images_are_enlarged_until_legible(size: int, scale: int) -> None:
    picture = image_grid(np.zeros((1, size, size, 1), np.uint8), padding=0)
    assert picture.size == (size * scale, size * scale)
    assert size * scale >= 48


@pytest.mark.parametrize(("count", "scale"), [(21_000, 6), (27_000, 5), (100_000, 2)])
def test_many_small_images_are_enlarged_as_far_as_the_picture_can_be_shown(count: int, scale: int) -> None:
    picture = image_grid(np.zeros((count, 8, 8, 1), np.uint8))
    assert picture.width == (math.ceil(math.sqrt(count)) * 9 + 1) * scale
    pixels = picture.width * picture.height
    assert pixels < Image.MAX_IMAGE_PIXELS, "beyond which Pillow warns"
    assert scale == 6 or pixels * ((scale + 1) / scale) ** 2 > 2**26


def test_a_grid_is_about_square_by_default() -> None:
    assert image_grid(np.zeros((64, 8, 8, 1), np.uint8), scale=1, padding=0).size == (64, 64)
    assert image_grid(np.zeros((5, 8, 8, 1), np.uint8), scale=1, padding=0).size == (24, 16)


@pytest.mark.parametrize("shape", [(0, 8, 8, 1), (4, 8, 8), (4, 8, 8, 2)])
def test_what_is_not_a_batch_of_images_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a grid of"):
        image_grid(np.zeros(shape, np.uint8))


def test_every_pixel_value_survives_the_way_to_minus_one_one_and_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_array_equal(to_uint8(images), pixels)


def test_values_outside_are_clipped_and_layout_does_not_matter() -> None:
    x_nchw = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0, float("inf"), -float("inf"), float("nan")])
    assert to_uint8(x_nchw.view(1, 1, 1, 8)).ravel().tolist() == [0, 0, 128, 255, 255, 255, 0, 0]
    x_nchw = torch.rand(2, 3, 4, 4) * 2 - 1
    channels_last = x_nchw.to(memory_format=torch.channels_last)
    np.testing.assert_array_equal(to_uint8(x_nchw), to_uint8(channels_last))
    assert to_uint8(x_nchw).shape == (2, 4, 4, 3)


def test_a_picture_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "grid.png"
    save_png(image_grid(np.zeros((1, 8, 8, 1), np.uint8)), path)
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save_png(image_grid(np.ones((1, 8, 8, 1), np.uint8)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
