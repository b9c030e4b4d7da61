"""The training set of ILSVRC 2012: what its parts are named, and how many there must be."""

from __future__ import annotations

import re

from ict_fast.screen import say

IMAGES = 1_281_167
CLASSES = 1_000
SYNSET = re.compile(r"n\d{8}")
PACKED_AT = ("ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train", "CLS-LOC/train")
"""Where the folders of the synsets lie in Kaggle's tree."""


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
