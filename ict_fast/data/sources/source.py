"""What a data set must offer to be prepared: its items by number, and how it is told from another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Source(Protocol):
    """Images by number, as `prepare_store` reads them. Must be picklable: `read` runs in worker processes."""

    @property
    def name(self) -> str:
        """What the images are; "source" in meta.json. No path of this machine."""

    @property
    def recipe(self) -> str:
        """How the pixels were computed; "recipe" in meta.json. Different recipes do not compare."""

    @property
    def classes(self) -> Sequence[str]:
        """The classes in the order of the labels; empty if there are none."""

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,), one per item, those that will be rejected included; all zero without classes."""

    @property
    def resolution(self) -> int:
        """Height and width of every image in pixels."""

    @property
    def image_channels(self) -> int:
        """1 for grey, 3 for RGB."""

    def identity(self) -> str:
        """SHA-256, hexadecimal, over all that determines the store: names, sizes, dates, labels, recipe."""

    def stamp(self, start: int, stop: int) -> str:
        """SHA-256, hexadecimal, over what the items start, ..., stop - 1 are made from: names, sizes, dates.

        What was read under another stamp is read again.
        """

    def item_name(self, index: int) -> str:
        """What the person knows item `index` as; for rejected.txt."""

    def read(
        self, start: int, stop: int, remarks: Counter[str] | None = None
    ) -> tuple[np.ndarray, dict[int, str]]:
        """The items start, ..., stop - 1.

        Args:
            remarks: counts what the person should know of items that can be used: "enlarged".
        Returns:
            uint8 (stop - start, H, W, C), and for each item that cannot be used its index (start <= index <
            stop) and why; its pixels are ignored.
        Raises:
            InputError, OSError: what concerns all items, such as an archive or a disk that has gone.
        """
