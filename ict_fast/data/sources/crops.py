"""The crop recipes of the field, from a picture of any size to a square one.

Two recipes give different pixels, so the recipe is part of a data set's identity: statistics of one must not
be compared with samples of a model of the other. Each is defined by Pillow's resampling; nothing here may be
replaced by something faster that is not equal to the last bit (`Image.draft`, `Image.reduce`, OpenCV).
"""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image

from ict_fast.data.sources.image_decoding import MAX_PIXELS, RejectedImage


def center_crop_dhariwal(image: Image.Image, resolution: int) -> Image.Image:
    """Halves with BOX while the short side is at least twice too long, BICUBIC to it, then crops the centre.

    The recipe of ADM (Dhariwal and Nichol 2021) and of the consistency models on ImageNet-64.

    Args:
        image: "L" or "RGB", any size; a smaller one is enlarged.
        resolution: R, height and width of the result in pixels.
    Raises:
        RejectedImage: if it is so elongated that it would have to be enlarged beyond MAX_PIXELS.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise RejectedImage(f"{image.width}x{image.height} is too elongated for this crop")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return _centre(image, resolution)


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Crops the central square at full size, LANCZOS to the resolution: EDM's recipe of the same name.

    Args:
        image: "L" or "RGB", any size; a smaller one is enlarged.
        resolution: R, height and width of the result in pixels.
    """
    square = _centre(image, min(image.size))
    return square.resize((resolution, resolution), Image.Resampling.LANCZOS)


def no_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The image itself.

    Raises:
        RejectedImage: if it is not `resolution` pixels high and wide.
    """
    if image.size != (resolution, resolution):
        raise RejectedImage(f"{image.width}x{image.height} instead of {resolution}x{resolution}")
    return image


CROPS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "center-crop-dhariwal": center_crop_dhariwal,
    "center-crop": center_crop,
    "none": no_crop,
}


def _centre(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))
