"""Encoded images that a stranger made, decoded without trusting them.

What Pillow's `convert` does to other colour spaces is kept, as the references of the field do: CMYK by its
plain formula, palettes looked up, transparency dropped (the colour beneath it shows). Samples of 16 bits keep
their high byte, which is what Pillow does where they are coloured. EXIF orientation is ignored: the recipes
of ImageNet know nothing of it.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
from PIL import ExifTags, Image

# Decoded, 200 MB of RGB. A PNG of 236 KB can hold 81 megapixels.
MAX_PIXELS = 2**26
MAX_ENCODED_BYTES = 2**28

# No format that runs another program (EPS), and none that holds what is not pixels. MPO is JPEG's.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
_EIGHT_BITS = frozenset(("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK"))


class RejectedImage(Exception):
    """An image that cannot be used; its message, without the image's name, says why."""


def decode_image(encoded: bytes, image_channels: int) -> Image.Image:
    """A decoded image of the mode asked for.

    Args:
        encoded: the content of a JPEG, PNG, WebP, BMP or GIF file, whatever it is named.
        image_channels: 1 for grey, 3 for RGB.
    Returns:
        An image of mode "L" or "RGB", of the size that is in the file.
    Raises:
        RejectedImage: not an image, truncated, animated, of a colour mode that does not fit into 8 bits, or
            with more than MAX_PIXELS pixels, which is found out before they are decoded.
    """
    with _opened(encoded) as image:
        image.load()
        return _convert(image, image_channels)


def image_layout(encoded: bytes) -> tuple[int, int, int]:
    """Width, height and channels (1 if it is grey, else 3) of an image, from its header alone.

    Raises:
        RejectedImage: as `decode_image`.
    """
    with _opened(encoded) as image:
        return image.width, image.height, 1 if image.mode[0] in "1LI" else 3


def is_oriented(image: Image.Image) -> bool:
    """Whether EXIF wants a decoded image to be turned or mirrored before it is looked at."""
    if "exif" not in image.info:
        return False
    with warnings.catch_warnings(), suppress(Exception):  # what is broken there says nothing
        warnings.simplefilter("ignore")
        return image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    return False


def is_transparent(encoded: bytes) -> bool:
    """Whether pixels of an image that `decode_image` takes are not opaque.

    Raises:
        RejectedImage: see there.
    """
    with _opened(encoded) as image:
        if image.mode not in ("LA", "PA", "RGBA"):  # then a colour is, if any; which one need not occur
            return "transparency" in image.info
        return bool((np.asarray(image.getchannel("A")) < 255).any())


@contextmanager
def _opened(encoded: bytes) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about EXIF and palettes; a million images would print thousands
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
                _check_header(image)
                yield image
        except (RejectedImage, MemoryError):  # want of memory says nothing about the image
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise RejectedImage(f"more than {MAX_PIXELS} pixels") from None
        except Image.UnidentifiedImageError:
            raise RejectedImage("not an image of a known format (JPEG, PNG, WebP, BMP, GIF)") from None
        except Exception as error:  # on broken files Pillow raises whatever its parsers run into
            raise RejectedImage(f"cannot be decoded: {' '.join(str(error).split())}") from error


def _check_header(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise RejectedImage(f"{image.width}x{image.height}, more than {MAX_PIXELS} pixels")
    # A camera's MPO is a JPEG with its previews behind it: its first picture is the picture.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise RejectedImage("animated")


def _convert(image: Image.Image, image_channels: int) -> Image.Image:
    # 16-bit grey ("I" in older versions of Pillow), which Pillow itself would clip at 255.
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in _EIGHT_BITS:
        raise RejectedImage(f"of mode {image.mode}, which does not fit into 8 bits")
    return image.convert("RGB" if image_channels == 3 else "L")
