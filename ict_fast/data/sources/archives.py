"""A folder of images that somebody has packed: a tar that is not compressed, or a ZIP; read in place."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np

from ict_fast.data.progress import narrated
from ict_fast.data.sources.class_folders import say_what_does_not_count, training_part
from ict_fast.data.sources.folder_files import IMAGE_SUFFIXES, say_passed_over
from ict_fast.data.sources.ilsvrc import PACKED_AT
from ict_fast.data.sources.image_source import EncodedFiles, ImageSource
from ict_fast.data.sources.name_table import NameTable
from ict_fast.data.sources.tar_files import TarFiles, tar_members
from ict_fast.data.sources.zip_files import checked_members, is_zip, zip_files
from ict_fast.errors import InputError


def archive_source(archive: Path, *, crop: str, resolution: int, image_channels: int) -> ImageSource:
    """The images of an archive: classes by folder, in the order of their names, or none.

    Folders that hold all of the images, such as the one that was packed, do not count.

    Args:
        archive: a tar or a ZIP.
        crop, resolution, image_channels: as `folder_source`.
    Raises:
        InputError: no such archive, a damaged one, or one with a member that could mean harm; no images,
            images beside folders of images, or the parts of a data set where classes should be.
    """
    try:
        files = _in_zip(archive) if is_zip(archive) else _in_tar(archive)
    except OSError as error:
        raise InputError(f"{archive}: cannot be read: {error.strerror or error}") from error
    folders, paths = zip(*_places(files.name(index) for index in range(len(files))), strict=True)
    classes = sorted(set(folders) - {""})
    if classes and "" in folders:
        top = files.name(folders.index(""))
        raise InputError(
            f"{archive}: has images ({top}) beside folders ({classes[0]}); it must hold either images without"
            " labels, or one folder per class"
        )
    if part := training_part(classes):
        index = folders.index(part)
        inside = files.name(index).removesuffix(paths[index]) + part
        taken = "; `ict-fast prepare imagenet` takes it as it is" if inside in PACKED_AT else ""
        raise InputError(
            f"{archive}: has {', '.join(classes)}, which are parts of a data set and not classes; pack"
            f" {inside} alone, or unpack it and name that folder{taken}"
        )
    if classes:
        say_what_does_not_count(archive, paths)
    labels = np.searchsorted(np.array(classes), folders) if classes else np.zeros(len(files))
    return ImageSource(
        name=f"images of the archive {archive.name}",
        files=files,
        crop=crop,
        resolution=resolution,
        image_channels=image_channels,
        classes=classes,
        labels=labels.astype(np.int64),
    )


def _in_zip(archive: Path) -> EncodedFiles:
    members, modified = checked_members(archive)
    by_name = {member.filename: member for member in members if not member.is_dir()}
    return zip_files(archive, [by_name[name] for name in _images(archive, by_name)], modified)


def _in_tar(archive: Path) -> EncodedFiles:
    by_name: dict[str, tuple[int, int]] = {}
    with archive.open("rb") as file:
        status = os.fstat(file.fileno())
        for member in narrated(tar_members(file, archive), lambda each: f"listing {archive}: {each.name}"):
            name = str(PurePosixPath(member.name))
            if name in by_name:
                raise InputError(f"{archive}: has the member {name} twice; it is refused")
            if member.isreg():
                by_name[name] = member.offset_data, member.size
    names = _images(archive, by_name)
    places = np.array([by_name[name] for name in names], np.int64)
    return TarFiles(archive, NameTable(names), places[:, 0], places[:, 1], status.st_mtime_ns)


def _images(archive: Path, names: Iterable[str]) -> list[str]:
    """Those that are images and not hidden, by class and then by name; says how many others there are."""
    found, passed_over = [], Counter[str]()
    for name in names:
        path = PurePosixPath(name)
        if any(part.startswith(".") for part in path.parts):
            continue
        if path.suffix.lower() in IMAGE_SUFFIXES:
            found.append(name)
        else:
            passed_over[path.suffix.lower() or "without a suffix"] += 1
    if not found:
        raise InputError(f"{archive}: has no images ({', '.join(IMAGE_SUFFIXES)})")
    say_passed_over(archive, passed_over)
    return [name for _, name in sorted(zip(_places(found), found, strict=True))]


def _places(names: Iterable[str]) -> list[tuple[str, str]]:
    """The folder of the class, empty if there is none, and the path in it, of each name."""
    paths = [PurePosixPath(name).parts for name in names]
    folders = [path[:-1] for path in paths]
    ends = zip(min(folders), max(folders), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ends))
    return [(path[shared] if len(path) > shared + 1 else "", "/".join(path[shared:])) for path in paths]
