"""The training set of ILSVRC 2012 in a ZIP, as Kaggle gives it out; read in place."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath

from ict_fast.data.sources.folder_files import IMAGE_SUFFIXES, say_passed_over
from ict_fast.data.sources.ilsvrc import (
    SYNSET,
    is_held_out,
    one_parent,
    say_held_out,
    synset_of,
    training_source,
)
from ict_fast.data.sources.image_source import ImageSource
from ict_fast.data.sources.zip_files import checked_members, zip_files
from ict_fast.errors import InputError


def ilsvrc_zip_source(archive: Path, *, crop: str, resolution: int) -> ImageSource:
    """The images of Kaggle's `ILSVRC/Data/CLS-LOC/train`, or of any one folder of synsets' folders.

    Classes and order are those of `ilsvrc_folder_source`.

    Args:
        archive: the ZIP.
        crop: a key of `CROPS`.
        resolution: R, pixels.
    Raises:
        InputError: as `ilsvrc_tar_source`.
    """
    try:
        members, modified = checked_members(archive)
    except OSError as error:
        raise InputError(f"{archive}: cannot be read: {error.strerror or error}") from error
    passed_over: Counter[str] = Counter()
    training, held_out, folders = [], 0, set()
    parent: str | None = None
    for member in members:
        path = PurePosixPath(member.filename)
        if any(part.startswith(".") for part in path.parts):
            continue
        if is_held_out(path):
            held_out += path.suffix.lower() in IMAGE_SUFFIXES
            continue
        folder = path if member.is_dir() else path.parent
        folders.update([part for part in folder.parts if SYNSET.fullmatch(part)][-1:])
        if path.suffix.lower() in IMAGE_SUFFIXES and not member.is_dir():
            training.append((synset_of(archive, path), member.filename, member))
            parent = one_parent(archive, parent, path)
        elif not member.is_dir():
            passed_over[path.suffix.lower() or "without a suffix"] += 1
    if not training:
        raise InputError(f"{archive}: has no images ({', '.join(IMAGE_SUFFIXES)})")
    training.sort(key=lambda image: image[:2])
    synsets = [synset for synset, _, _ in training]
    if hollow := folders - set(synsets):
        raise InputError(f"{archive}: {min(hollow)} is a class without images")
    say_held_out(archive, held_out)
    say_passed_over(archive, passed_over)
    files = zip_files(archive, [member for _, _, member in training], modified)
    return training_source(files, synsets, crop=crop, resolution=resolution)
