"""Data sets of the Hugging Face Hub: Parquet files with a column of encoded images and one of labels.

A row group is the least that can be read. The last one stays in memory, so that in order each is read once.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ict_fast.data.progress import narrated
from ict_fast.data.sources.class_folders import is_part
from ict_fast.data.sources.image_decoding import MAX_ENCODED_BYTES, RejectedImage
from ict_fast.data.sources.image_source import ImageSource
from ict_fast.errors import InputError
from ict_fast.screen import say

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
_MAX_CLASSES = 100_000


@dataclass(frozen=True)
class ParquetImages:
    """The images of a column, over several files; `EncodedFiles`."""

    paths: tuple[Path, ...]
    states: tuple[tuple[int, int], ...]
    """Bytes and date of change in nanoseconds, of each file."""
    column: str
    groups: np.ndarray
    """int64 (G, 3): each row group's file, its number in that file, the number of rows before it there."""
    ends: np.ndarray
    """int64 (G,): the images up to and with each row group."""

    def __len__(self) -> int:
        return int(self.ends[-1])

    def name(self, index: int) -> str:
        """The file and the row in it, counted from 0."""
        (file, _, before), row = self._place(index)
        return f"{self.paths[file].name}, row {before + row}"

    def stamp(self, start: int, stop: int) -> str:
        """As `EncodedFiles.stamp`: over the rows of each file, its name, size and date."""
        digest, index = hashlib.sha256(), start
        while index < stop:
            group = int(np.searchsorted(self.ends, index, side="right"))
            (file, number, _), row = self._place(index)
            end = min(stop, int(self.ends[group]))
            digest.update(repr((self.paths[file].name, self.states[file], number, row, end - index)).encode())
            index = end
        return digest.hexdigest()

    def read(self, index: int) -> bytes:
        """As `EncodedFiles.read`."""
        (file, number, _), row = self._place(index)
        encoded = _row_group(self.paths[file], self.states[file], number, self.column)[row]
        size = len(encoded.as_buffer()) if encoded.is_valid else 0
        if not size:
            raise RejectedImage("the row has no image, or only the path of one")
        if size > MAX_ENCODED_BYTES:
            raise RejectedImage(f"a file of {size} bytes, more than {MAX_ENCODED_BYTES}")
        return encoded.as_py()

    def _place(self, index: int) -> tuple[tuple[int, int, int], int]:
        """A row of `groups`, and the image's place in that row group."""
        group = int(np.searchsorted(self.ends, index, side="right"))
        file, number, before = map(int, self.groups[group])
        return (file, number, before), index - (int(self.ends[group - 1]) if group else 0)


class _Layout(NamedTuple):
    """The column of the encoded images, that of the labels if there is one, and the classes if named."""

    image: str
    label: str | None
    classes: tuple[str, ...]


class _Table(NamedTuple):
    """What a file holds: the rows of each row group, int64 (G,), and the label of each row, int64 (N,)."""

    layout: _Layout
    rows: np.ndarray
    labels: np.ndarray


def parquet_source(
    path: Path,
    *,
    crop: str,
    resolution: int,
    image_channels: int,
    image_column: str | None = None,
    label_column: str | None = None,
) -> ImageSource:
    """The images of a Parquet file, or of those in a folder, in the order of their names.

    Of files named as parts of a data set, `train-00000-of-00005.parquet` and `test-...`, the training's are
    taken. The classes are those that the Hub's description in the files names, else the numbers up to the
    highest label.

    Args:
        path: the file or folder.
        crop: a key of `CROPS`.
        resolution: R, pixels.
        image_channels: 1 for grey, 3 for RGB.
        image_column: binary, or a struct with binary `bytes`; by default the first of `IMAGE_COLUMNS`.
        label_column: integers; by default the first of `LABEL_COLUMNS`, no classes if there is none.
    Raises:
        InputError: pyarrow is not installed; no such files, damaged ones, or ones that differ in columns or
            classes; a label that is none.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise InputError(
            f'prepare parquet needs pyarrow ({error}): pip install -c constraints.txt -e ".[parquet]"'
        ) from None
    paths = _training_files(path)
    try:
        states = [(file.stat().st_size, file.stat().st_mtime_ns) for file in paths]
        tables = [
            _described(file, image_column, label_column)
            for file in narrated(paths, lambda file: f"listing {file}")
        ]
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    layout = tables[0].layout
    for file, table in zip(paths, tables, strict=True):
        if table.layout != layout:
            raise InputError(f"{file}: has other columns or classes than {paths[0].name}")
    rows = np.concatenate([table.rows for table in tables])
    groups = [
        (number, group, int(table.rows[:group].sum()))
        for number, table in enumerate(tables)
        for group in range(len(table.rows))
    ]
    labels = np.concatenate([table.labels for table in tables])
    if not len(labels):
        raise InputError(f"{path}: has no images")
    highest = int(labels.max())
    classes = layout.classes
    if layout.label and not classes:
        classes = tuple(str(number) for number in range(min(highest + 1, _MAX_CLASSES)))
    if layout.label and highest >= len(classes):
        raise InputError(
            f"{path}: column {layout.label} has label {highest}; there are at most {len(classes):,} classes"
        )
    return ImageSource(
        name=f"images of the Parquet files {path.absolute().name}",
        files=ParquetImages(
            tuple(paths),
            tuple(states),
            layout.image,
            np.array(groups, np.int64)[rows > 0],
            np.cumsum(rows)[rows > 0],
        ),
        crop=crop,
        resolution=resolution,
        image_channels=image_channels,
        classes=classes,
        labels=labels,
    )


def parquet_in(path: Path) -> Path | None:
    """A Parquet file: the path, or one in it or in one of its first folders; None if none is seen."""
    if path.is_file():
        return path if path.suffix == ".parquet" else None
    with suppress(OSError):
        folders = (each for each in sorted(path.iterdir()) if each.is_dir())
        for folder in (path, *itertools.islice(folders, 5)):
            if found := sorted(folder.glob("*.parquet")):
                return found[0]
    return None


def _training_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: {'is no file' if path.exists() else 'there is nothing here'}")
    paths = sorted(found for found in path.glob("*.parquet") if not found.name.startswith("."))
    if not paths:
        below = parquet_in(path)
        raise InputError(f"{path}: has no .parquet files" + (f"; {below.parent} has some" if below else ""))
    parts = {found: re.split(r"[-_.]", found.name)[0] for found in paths}
    several = sorted(set(parts.values()))
    part = next((each for each in several if each in ("train", "training")), None)
    if len(several) == 1 or not any(map(is_part, several)):
        return paths
    if part is None:
        raise InputError(f"{path}: has files of {', '.join(several)} and none of train; name one of them")
    others = ", ".join(each for each in several if each != part)
    say(f"{path}: takes the files of {part}, and passes over those of {others}")
    return [found for found in paths if parts[found] == part]


def _described(file: Path, image_column: str | None, label_column: str | None) -> _Table:
    with _opened(file) as opened:
        layout = _layout(file, opened, image_column, label_column)
        groups = [opened.metadata.row_group(number).num_rows for number in range(opened.num_row_groups)]
        rows = np.array(groups, np.int64)
        return _Table(layout, rows, _labels(file, opened, layout.label, int(rows.sum())))


def _layout(file: Path, opened: ParquetFile, image_column: str | None, label_column: str | None) -> _Layout:
    import pyarrow as pa

    schema = opened.schema_arrow
    image = _column(file, schema.names, image_column, IMAGE_COLUMNS)
    if image is None:
        raise InputError(
            f"{file}: has no column {' or '.join(IMAGE_COLUMNS)}; name the images' with --image-column, of"
            f" {', '.join(schema.names)}"
        )
    label = _column(file, schema.names, label_column, LABEL_COLUMNS)
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind, image = kind.field("bytes").type, f"{image}.bytes"
    if pa.types.is_null(kind):
        raise InputError(f"{file}: column {image} is empty; the images themselves must be in the file")
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise InputError(
            f"{file}: column {image} is of {kind}; it must be binary, or a struct with binary bytes"
        )
    if label is not None and not pa.types.is_integer(schema.field(label).type):
        raise InputError(f"{file}: column {label} is of {schema.field(label).type}; labels are integers")
    return _Layout(image, label, _class_names(schema.metadata or {}, label))


def _column(file: Path, there: Sequence[str], asked: str | None, usual: Sequence[str]) -> str | None:
    if asked is not None and asked not in there:
        raise InputError(f"{file}: has no column {asked}; it has {', '.join(there)}")
    return asked or next((name for name in usual if name in there), None)


def _class_names(metadata: dict[bytes, bytes], label: str | None) -> tuple[str, ...]:
    """As the Hub's library describes the column of the labels in a file's schema; empty if it does not."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    well_formed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if well_formed else ()


def _labels(file: Path, opened: ParquetFile, column: str | None, rows: int) -> np.ndarray:
    """int64 (rows,); all zero without a column."""
    if column is None:
        return np.zeros(rows, np.int64)
    found = opened.read(columns=[column], use_threads=False).column(0)
    if found.null_count:
        raise InputError(f"{file}: {found.null_count:,} rows have no {column}")
    labels = found.to_numpy()
    if rows and labels.min() < 0:
        raise InputError(f"{file}: column {column} has label {labels.min()}, which means that there is none")
    if rows and labels.max() >= 2**63:
        raise InputError(f"{file}: column {column} has label {labels.max()}; labels are below 2^63")
    return labels.astype(np.int64)


@functools.lru_cache(maxsize=1)
def _row_group(path: Path, state: tuple[int, int], number: int, column: str) -> Any:
    """The encoded images of a row group, as a pyarrow array; `state` tells the file from one in its place."""
    with _opened(path) as opened:
        if (path.stat().st_size, path.stat().st_mtime_ns) != state:
            raise InputError(f"{path}: has changed meanwhile; the same command reads it again")
        found = opened.read_row_group(number, columns=[column], use_threads=False).column(0)
        return found.flatten()[0] if column.endswith(".bytes") else found


@contextmanager
def _opened(path: Path) -> Iterator[ParquetFile]:
    """Raises InputError for what is no Parquet file or a damaged one; OSError for one that cannot be read."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as opened:
            yield opened
    except MemoryError:
        raise
    except (ArrowException, OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # without a number it is of the content
            raise
        said = " ".join(str(error).split())
        raise InputError(f"{path}: not a whole Parquet file ({said}); get it again") from error
