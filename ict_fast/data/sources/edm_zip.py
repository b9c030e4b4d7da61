"""Data sets of EDM and EDM2: a ZIP of PNG files, stored as they are, and `dataset.json` with the labels.

`dataset.json` is `{"labels": [["00000/img00000000.png", 0], ...]}`, or `{"labels": null}` without classes.
The images are at their final size: nothing is resampled.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ict_fast.data.progress import narrated
from ict_fast.data.sources.damage import DAMAGED_ZIP
from ict_fast.data.sources.image_decoding import RejectedImage, image_layout
from ict_fast.data.sources.image_source import ImageSource
from ict_fast.data.sources.name_table import NameTable
from ict_fast.data.sources.zip_files import ZipFiles, check_members, zip_files, zip_members
from ict_fast.errors import InputError

# ImageNet's takes 50 MB.
_MAX_JSON_BYTES = 2**29
# A label is a class's number, and every number below the highest names a class.
_MAX_CLASSES = 100_000


def edm_zip_source(archive: Path) -> ImageSource:
    """A data set in the form of EDM and EDM2.

    Images come in the order of their names. Their size is that of the first, and they are grey if all are.
    The classes are numbers, up to the highest label, and some may have no image: a part of ImageNet keeps
    ImageNet's numbers.

    Args:
        archive: the ZIP.
    Raises:
        InputError: not such a data set; a label that is none; an archive with a member that could mean harm:
            a link, an absolute name, `..`, a name that comes twice.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = zip_members(opened)
            status = archive.stat()
            check_members(archive, members, status.st_size)
            _require_stored_png(archive, members)
            described = _read_json(archive, opened)
    except OSError as error:
        raise InputError(f"{archive}: cannot be read: {error.strerror or error}") from error
    except DAMAGED_ZIP as error:
        raise InputError(f"{archive}: not a whole ZIP ({error}); get it again") from error
    images = sorted(
        (member for member in members if not member.is_dir() and member.filename != "dataset.json"),
        key=lambda member: member.filename,
    )
    if not images:
        raise InputError(f"{archive}: has no images")
    files = zip_files(archive, images, status.st_mtime_ns)
    labels, num_classes = _labels(archive, files.names, described)
    resolution, image_channels = _layout(archive, files)
    return ImageSource(
        name=f"EDM data set {archive.name}",
        files=files,
        crop="none",
        resolution=resolution,
        image_channels=image_channels,
        classes=[str(number) for number in range(num_classes)],
        labels=labels,
    )


def _require_stored_png(archive: Path, members: list[zipfile.ZipInfo]) -> None:
    for member in members:
        if member.is_dir() or member.filename == "dataset.json":
            continue
        if not member.filename.lower().endswith(".png"):
            raise InputError(
                f"{archive}: member {member.filename} is not a PNG; only EDM data sets of pixels are read"
            )
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise InputError(
                f"{archive}: member {member.filename} is compressed; a data set of EDM stores its images as"
                " they are (zip -0)"
            )


def _read_json(archive: Path, opened: zipfile.ZipFile) -> Any:
    try:
        member = opened.getinfo("dataset.json")
    except KeyError:
        raise InputError(f"{archive}: has no dataset.json, so it is not a data set of EDM") from None
    if member.file_size > _MAX_JSON_BYTES:
        raise InputError(f"{archive}: dataset.json has {member.file_size} bytes; at most {_MAX_JSON_BYTES}")
    try:
        return json.loads(opened.read(member))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{archive}: dataset.json is not readable as JSON") from error


def _labels(archive: Path, names: NameTable, described: Any) -> tuple[np.ndarray, int]:
    """The labels, int64 (N,), in the order of the names, and the number of classes."""
    pairs = described.get("labels") if isinstance(described, dict) else ()
    if pairs is None:
        return np.zeros(len(names), np.int64), 0
    where = f"{archive}: dataset.json"
    well_formed = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
    )
    if not well_formed:
        raise InputError(f'{where}: "labels" must be null or a list of [name, class]')
    of_name: dict[str, Any] = {name.replace("\\", "/"): label for name, label in pairs}
    if len(of_name) != len(pairs):
        raise InputError(f"{where} has a label twice for the same name")
    labels = np.zeros(len(names), np.int64)
    for index, name in enumerate(names):
        if name not in of_name:
            raise InputError(f"{where} has no label for {name}")
        label = of_name[name]
        if type(label) is not int or not 0 <= label < _MAX_CLASSES:
            raise InputError(
                f"{where}: the label of {name} is {label!r}; it must be an integer from 0 to"
                f" {_MAX_CLASSES - 1}"
            )
        labels[index] = label
    if len(of_name) > len(names):
        lost = min(of_name.keys() - set(names))
        raise InputError(f"{where} has a label for {lost}, which is not in the archive; get it again")
    return labels, int(labels.max()) + 1


def _layout(archive: Path, files: ZipFiles) -> tuple[int, int]:
    """Resolution of the first image that is one, and 3 channels if any image has them: none turns grey."""
    resolution = 0
    numbers = range(len(files))
    for index in narrated(numbers, lambda index: f"looking for colours in {archive}: {files.name(index)}"):
        try:
            width, _, image_channels = image_layout(files.read(index))
        except RejectedImage:
            continue
        resolution = resolution or width
        if image_channels == 3:
            return resolution, 3
    if not resolution:
        raise InputError(f"{archive}: has no image that can be decoded")
    return resolution, 1
