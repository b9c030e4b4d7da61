"""Images as their publishers packed them: rows of planar RGB bytes, read from where they lie.

A row is one image: R x R bytes of red, then of green, then of blue. The rows of a batch follow each other in
a file, plainly or inside a compressed stream, so any of them can be read without the rest in memory.
"""

from __future__ import annotations

import bisect
import gzip
import io
import itertools
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from ict_fast.data.sources.damage import DAMAGED_ZIP
from ict_fast.errors import InputError

_DAMAGED: tuple[type[Exception], ...] = (OSError, *DAMAGED_ZIP)


@dataclass(frozen=True)
class PlanarBatch:
    """Where the rows of one batch lie.

    Attributes:
        name: what the publisher calls it, such as data_batch_1.
        count: number of rows.
        resolution: R, height and width in pixels.
        file: the file that holds them.
        offset: of the first row, in bytes from the beginning of the file, or of the stream.
        packing: plain: rows lie in the file; gzip: in its decompressed content; zip: in that of a member.
        member: the member's name, for zip.
    """

    name: str
    count: int
    resolution: int
    file: Path
    offset: int
    packing: Literal["plain", "gzip", "zip"] = "plain"
    member: str = ""


class PlanarImages:
    """The images of several batches, by number. Can be pickled; keeps at most one stream open.

    A compressed stream is decompressed up to the rows that are asked for. Going forward costs each byte once;
    going back costs a new start.

    Args:
        batches: of one resolution, in the order of their images.
    """

    def __init__(self, batches: Sequence[PlanarBatch]) -> None:
        self._batches = tuple(batches)
        self._first = list(itertools.accumulate((batch.count for batch in batches), initial=0))
        self._stream: io.BufferedIOBase | None = None
        self._stream_of: tuple[Path, str] | None = None

    def __del__(self) -> None:
        self._close()  # the interpreter would do it too, with a warning

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None, "_stream_of": None}

    def item_name(self, index: int) -> str:
        """Batch and row of an image, such as data_batch_1[17]."""
        batch, row = self._place(index)
        return f"{batch.name}[{row}]"

    def read(self, start: int, stop: int) -> np.ndarray:
        """The images start, ..., stop - 1.

        Returns:
            uint8 (stop - start, R, R, 3).
        Raises:
            InputError: if a file has gone, or is damaged.
        """
        resolution = self._batches[0].resolution
        images = np.empty((stop - start, resolution, resolution, 3), np.uint8)
        done = start
        while done < stop:
            batch, row = self._place(done)
            count = min(stop - done, batch.count - row)
            planes = self._rows(batch, row, count).reshape(count, 3, resolution, resolution)
            images[done - start :][:count] = planes.transpose(0, 2, 3, 1)
            done += count
        return images

    def batches_of(self, start: int, stop: int) -> slice:
        """Which batches hold the images start, ..., stop - 1."""
        return slice(self._number(start), self._number(stop - 1) + 1)

    def _number(self, index: int) -> int:
        return bisect.bisect_right(self._first, index) - 1

    def _place(self, index: int) -> tuple[PlanarBatch, int]:
        number = self._number(index)
        return self._batches[number], index - self._first[number]

    def _rows(self, batch: PlanarBatch, row: int, count: int) -> np.ndarray:
        """uint8 (count, 3 R R)."""
        row_bytes = 3 * batch.resolution**2
        rows = np.empty((count, row_bytes), np.uint8)
        position = batch.offset + row * row_bytes
        try:
            if batch.packing == "plain":
                with batch.file.open("rb") as file:
                    file.seek(position)
                    length = file.readinto(rows.data)
            else:
                stream = self._open(batch)
                stream.seek(position)
                length = stream.readinto(rows.data)
            if length != rows.nbytes:
                raise EOFError("it ends before its last image")
        except _DAMAGED as error:
            self._close()
            why = getattr(error, "strerror", None) or error
            raise InputError(
                f"{batch.file}: {batch.name} cannot be read: {why}; get the file again"
            ) from error
        return rows

    def _open(self, batch: PlanarBatch) -> io.BufferedIOBase:
        """The decompressed stream that holds the batch: the one that is open, if it is that one."""
        if self._stream is None or self._stream_of != (batch.file, batch.member):
            self._close()
            if batch.packing == "zip":
                with zipfile.ZipFile(batch.file) as archive:  # its members stay open
                    self._stream = cast(io.BufferedIOBase, archive.open(batch.member))
            else:
                self._stream = gzip.GzipFile(batch.file)
            self._stream_of = (batch.file, batch.member)
        return self._stream

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = self._stream_of = None
