"""Images to look at: tensors to pixels, pixels to a grid, a grid to a PNG."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ict_fast.durable import replacing

LARGEST_GRID = 2**26
"""Pixels of a picture. Of more, Pillow warns from 1.3 times and refuses from 2.7 times as many, and viewers
give up."""
_LEGIBLE = 48  # a tile of fewer pixels than this is hard to see on a screen


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Images in [-1, 1] as pixels: round((x + 1) * 127.5), clipped; NaN becomes 0.

    Args:
        images: (N, C, H, W), any float dtype, any device.
    Returns:
        uint8 (N, H, W, C).
    """
    pixels = ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).nan_to_num(0)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def grid_shape(
    count: int, height: int, width: int, columns: int | None = None, padding: int = 1
) -> tuple[int, int]:
    """Height and width of the picture of `image_grid` that is not enlarged, in pixels; see there."""
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    return rows * (height + padding) + padding, columns * (width + padding) + padding


def image_grid(
    images: np.ndarray, columns: int | None = None, scale: int | None = None, padding: int = 1
) -> Image.Image:
    """Lays images out row by row on white, and enlarges the whole without smoothing.

    Args:
        images: uint8 (N, H, W, C), C = 1 or 3, N > 0.
        columns: tiles per row; by default about as many as rows.
        scale: pixels of the picture per pixel of an image; by default so many that a tile has at least 48,
            if the picture then has no more than LARGEST_GRID.
        padding: white between and around the tiles, in pixels of the images.
    Returns:
        A picture of (rows (H + padding) + padding) scale by (columns (W + padding) + padding) scale.
    Raises:
        ValueError: if the images are not of that type and shape.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or not images.size:
        raise ValueError(f"a grid of {images.dtype} {images.shape}; it takes uint8 (N, H, W, C), C = 1 or 3")
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    shape = grid_shape(count, height, width, columns, padding)
    if scale is None:
        affordable = math.isqrt(LARGEST_GRID // math.prod(shape))
        scale = max(1, min(math.ceil(_LEGIBLE / min(height, width)), affordable))
    canvas = np.full((*shape, channels), 255, np.uint8)
    for number, image in enumerate(images):
        top = padding + number // columns * (height + padding)
        left = padding + number % columns * (width + padding)
        canvas[top : top + height, left : left + width] = image
    enlarged = canvas.repeat(scale, axis=0).repeat(scale, axis=1)
    return Image.fromarray(enlarged[:, :, 0] if channels == 1 else enlarged)


def save_png(image: Image.Image, path: Path, *, flush: bool = True) -> None:
    """Writes a PNG so that a viewer never sees a part of it; creates the folder.

    Args:
        flush: see `replacing`.
    Raises:
        OSError: disk full, no permission; an older picture is then untouched.
    """
    encoded = io.BytesIO()
    image.save(encoded, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, flush=flush) as file:
        file.write(encoded.getvalue())
