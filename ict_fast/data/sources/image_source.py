"""Encoded images, wherever they lie, as a source: decoded, cropped, one after the other."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ict_fast.data.sources.crops import CROPS
from ict_fast.data.sources.image_decoding import RejectedImage, decode_image, is_oriented


class EncodedFiles(Protocol):
    """Encoded images by number, in a folder or inside an archive. Must be picklable."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What the person knows the file as."""

    def stamp(self, start: int, stop: int) -> str:
        """SHA-256 over names, sizes and dates of start, ..., stop - 1: another one means other files."""

    def read(self, index: int) -> bytes:
        """The content of one file.

        Raises:
            RejectedImage: if this one cannot be read.
            OSError: if that says nothing of this one: the archive, the disk or the network fails.
        """


@dataclass(frozen=True)
class ImageSource:
    """A `Source` of encoded images that are cropped by one of the recipes.

    Attributes:
        name: what the images are.
        files: where they come from.
        crop: a key of `CROPS`.
        resolution: R, pixels.
        image_channels: 1 for grey, 3 for RGB.
        classes: names of the classes; empty if there are none.
        labels: int64 (N,), one per file.
    """

    name: str
    files: EncodedFiles
    crop: str
    resolution: int
    image_channels: int
    classes: Sequence[str]
    labels: np.ndarray

    @property
    def recipe(self) -> str:
        """Crop, resolution and colour in words: equal words mean pixels that compare."""
        size = f"{self.resolution}x{self.resolution} {'RGB' if self.image_channels == 3 else 'grey'}"
        return f"{size}, as stored" if self.crop == "none" else f"{size}, {self.crop}"

    def identity(self) -> str:
        """As `Source.identity`."""
        about = (self.stamp(0, len(self.files)), self.recipe, *self.classes)
        digest = hashlib.sha256(repr(about).encode())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def stamp(self, start: int, stop: int) -> str:
        """As `Source.stamp`."""
        return self.files.stamp(start, stop)

    def item_name(self, index: int) -> str:
        """The file's name."""
        return self.files.name(index)

    def read(
        self, start: int, stop: int, remarks: Counter[str] | None = None
    ) -> tuple[np.ndarray, dict[int, str]]:
        """As `Source.read`."""
        remarks = Counter() if remarks is None else remarks
        pixels = np.zeros((stop - start, self.resolution, self.resolution, self.image_channels), np.uint8)
        rejected: dict[int, str] = {}
        for index in range(start, stop):
            try:
                image = decode_image(self.files.read(index), self.image_channels)
                cropped = CROPS[self.crop](image, self.resolution)
            except RejectedImage as reason:
                rejected[index] = str(reason)
            else:
                pixels[index - start] = np.asarray(cropped).reshape(pixels.shape[1:])
                remarks["enlarged"] += min(image.size) < self.resolution
                remarks["with an EXIF orientation, which is not applied"] += is_oriented(image)
        return pixels, rejected
