"""The training set of ILSVRC 2012: what its parts are named, and how many there must be."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ict_fast.data.sources.image_source import EncodedFiles, ImageSource
from ict_fast.errors import InputError
from ict_fast.screen import say

IMAGES = 1_281_167
CLASSES = 1_000
SYNSET = re.compile(r"n\d{8}")
PACKED_AT = ("ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train", "CLS-LOC/train")
"""Where the folders of the synsets lie in Kaggle's tree."""
_HELD_OUT = {("CLS-LOC", "val"), ("CLS-LOC", "test")}


def training_source(
    files: EncodedFiles, synsets: Sequence[str], *, crop: str, resolution: int
) -> ImageSource:
    """The images of an archive or of folders; a class is a synset, in the order of their names.

    Args:
        files: the images.
        synsets: the one of each.
        crop: a key of `CROPS`.
        resolution: R, pixels.
    """
    classes = sorted(set(synsets))
    return ImageSource(
        name=training_set(len(files), len(classes)),
        files=files,
        crop=crop,
        resolution=resolution,
        image_channels=3,
        classes=classes,
        labels=np.searchsorted(np.array(classes), synsets).astype(np.int64),
    )


def synset_of(archive: Path, image: PurePosixPath) -> str:
    """The synset in whose folder an image lies; InputError if it lies in none."""
    folders = [part for part in image.parent.parts if SYNSET.fullmatch(part)]
    if not folders:
        raise InputError(f"{archive}: {str(image)!r} lies in no folder named as a synset, such as n01440764")
    return folders[-1]


def one_parent(archive: Path, before: str | None, path: PurePosixPath) -> str:
    """The folder that holds the synset of `path`; InputError if that is not the one of those before."""
    parts = itertools.takewhile(lambda part: not SYNSET.fullmatch(part.removesuffix(".tar")), path.parts)
    found = "/".join(parts) or "."
    if before not in (None, found):
        raise InputError(
            f"{archive}: has synsets in {before} and in {found}, as of a training and a validation set; pack"
            " one of them alone, or unpack it and name its folder"
        )
    return found


def is_held_out(path: PurePosixPath) -> bool:
    """Whether it lies where Kaggle's tree has its validation and test sets."""
    return not _HELD_OUT.isdisjoint(itertools.pairwise(path.parts))


def say_held_out(archive: Path, count: int) -> None:
    """A line for the person if there are images for which `is_held_out` holds."""
    if count:
        say(f"{archive}: takes CLS-LOC/train only, and passed over {count:,} images of CLS-LOC/val and /test")


def training_set(images: int, classes: int) -> str:
    """What is called so in meta.json; see `named_with_what_is_missing`."""
    return named_with_what_is_missing("ImageNet ILSVRC 2012, training set", images, classes)


def named_with_what_is_missing(name: str, images: int, classes: int) -> str:
    """The name of a data set that should be all of ImageNet; says so, in it and to the person, if it is not.

    Args:
        name: of the whole.
        images, classes: how many there are.
    """
    if (images, classes) == (IMAGES, CLASSES):
        return name
    fewer = images <= IMAGES and classes <= CLASSES
    counts = f"{images:,} of {IMAGES:,} images, {classes:,} of {CLASSES:,} classes"
    seen = f"{'incomplete' if fewer else 'not the published one'}: {counts}"
    say(f"{name} is {seen}")
    return f"{name} ({seen})"
