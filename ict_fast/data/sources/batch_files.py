"""The files that batches of images are published in: a pickled dict or an .npz, with `data` and `labels`.

Opening one checks it, reads the labels and finds where the rows of pixels lie; the pixels stay there. No
object is ever built from a file's content, only arrays of numbers.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from ict_fast.data.sources.damage import DAMAGED_ZIP
from ict_fast.data.sources.planar_images import PlanarBatch
from ict_fast.errors import InputError
from ict_fast.restricted_unpickler import ARRAYS, PickledArray, load_restricted

_RESOLUTIONS = (8, 16, 32, 64)  # of the published ones
_BLOCK = 2**20  # bytes


def open_pickled_batch(
    content: IO[bytes],
    file: Path,
    name: str,
    *,
    packing: Literal["plain", "gzip"] = "plain",
    begins_at: int = 0,
) -> tuple[PlanarBatch, np.ndarray]:
    """Opens a pickled dict of `data` and `labels`, as Python 2 or 3 writes it.

    The batch is in memory while its place in the file is looked for.

    Args:
        content: at the pickle's first byte.
        file: what `content` is read from.
        name: what the publisher calls the batch.
        packing: whether `content` is the file itself, or part of what it decompresses to.
        begins_at: where in that the pickle begins, in bytes.
    Returns:
        where the rows lie; labels, int64 (n,).
    Raises:
        InputError: what `load_restricted` refuses; another content than described.
    """
    said = str(file) if file.name == name else f"{file}: {name}"
    loaded = load_restricted(content, ARRAYS, name=said, encoding="bytes")
    data = pickled_entry(loaded, "data", PickledArray, said).array
    resolution = _resolution(data.shape, data.dtype, said)
    given = pickled_entry(loaded, "labels", (list, PickledArray), said)
    labels = np.empty(0)
    with contextlib.suppress(ValueError, OverflowError):  # a ragged list
        labels = np.asarray(given.array if isinstance(given, PickledArray) else given)
    _check_labels(labels.shape, labels.dtype, len(data), said)

    if not data.flags.c_contiguous:
        raise InputError(f"{said}: data in Fortran order; save the batch again in C order")
    rows = data.data.cast("B")
    if packing == "plain":
        with mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            found = mapped.find(rows)
    else:
        content.seek(0)
        found = content.read().find(rows)
    if found < 0:  # as Python 3 writes bytes in the protocols of Python 2
        raise InputError(f"{said}: its pixels are stored as text; save the batch again with numpy.savez")
    return PlanarBatch(name, len(data), resolution, file, begins_at + found, packing), labels.astype(np.int64)


def pickled_entry(loaded: Any, key: str, kind: type | tuple[type, ...], said: str) -> Any:
    """One entry of an unpickled dict, whose keys are bytes if Python 2 has written it.

    Args:
        loaded: of any type.
        key: its name.
        kind: the type that it must have.
        said: what the person knows the file as.
    Raises:
        InputError: if there is no such entry.
    """
    value = loaded.get(key.encode(), loaded.get(key)) if isinstance(loaded, dict) else None
    if not isinstance(value, kind):
        raise InputError(f'{said}: holds no "{key}" as batches of images do; get it again')
    return value


def open_npz_batch(file: Path) -> tuple[PlanarBatch, np.ndarray]:
    """Opens an .npz of `data` and `labels`, compressed or not.

    Returns:
        where the rows lie; labels, int64 (n,).
    Raises:
        InputError: a file that is missing, cut short or damaged; another content than described.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for name in ("data.npy", "labels.npy"):
                if archive.namelist().count(name) != 1:
                    held = ", ".join(archive.namelist()) or "nothing"
                    raise InputError(f"{file}: holds {held}; it should hold one {name}")
            info = archive.getinfo("data.npy")
            with archive.open(info) as stream:
                shape, dtype, offset = _npy_header(stream, file)
            resolution = _resolution(shape, dtype, str(file))
            if info.file_size != offset + math.prod(shape):
                raise InputError(f"{file}: data.npy does not hold the {shape[0]:,} images of its header")
            with archive.open("labels.npy") as stream:
                label_shape, label_dtype, _ = _npy_header(stream, file)
                _check_labels(label_shape, label_dtype, shape[0], str(file))
                labels = np.frombuffer(stream.read(shape[0] * label_dtype.itemsize), label_dtype)
            stored = info.compress_type == zipfile.ZIP_STORED
            if stored:
                _check_content(archive, info)
        batch = PlanarBatch(
            file.stem,
            shape[0],
            resolution,
            file,
            _content_offset(file, info) + offset if stored else offset,
            "plain" if stored else "zip",
            "" if stored else "data.npy",
        )
        _check_labels(labels.shape, labels.dtype, shape[0], str(file))  # as many as announced
        return batch, labels.astype(np.int64)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    except DAMAGED_ZIP as error:
        raise InputError(f"{file}: cut short, or not an .npz ({error}); get it again") from error


def _check_content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    """Raises BadZipFile if a stored member is damaged: reading its rows in the file would not notice."""
    with archive.open(info) as stream:
        while stream.read(_BLOCK):
            pass


def _npy_header(stream: IO[bytes], file: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, type and length of a .npy's header."""
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise InputError(f"{file}: holds a .npy of version {version}; save it again with numpy.savez")
    shape, fortran_order, dtype = read[version](stream)
    if fortran_order and len(shape) > 1:
        raise InputError(f"{file}: holds an array in Fortran order; save it again in C order")
    return shape, dtype, stream.tell()


def _content_offset(file: Path, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: after its own header, whose length is not in the directory."""
    with file.open("rb") as opened:
        opened.seek(info.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", opened.read(4))
    return info.header_offset + 30 + name_length + extra_length


def _resolution(shape: Sequence[int], dtype: np.dtype, said: str) -> int:
    resolution = math.isqrt(shape[1] // 3) if len(shape) == 2 and shape[0] > 0 else 0
    if dtype != np.uint8 or resolution not in _RESOLUTIONS or shape[1] != 3 * resolution**2:
        raise InputError(
            f"{said}: data of {dtype}, shape {tuple(shape)}; images are rows of uint8, (n, 3 R R), with R"
            f" one of {', '.join(map(str, _RESOLUTIONS))}"
        )
    return resolution


def _check_labels(shape: Sequence[int], dtype: np.dtype, count: int, said: str) -> None:
    if dtype.kind not in "iu" or tuple(shape) != (count,):
        raise InputError(
            f"{said}: labels of {dtype}, shape {tuple(shape)}; there should be an integer for each of"
            f" {count:,} images"
        )
