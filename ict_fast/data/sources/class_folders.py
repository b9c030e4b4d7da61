"""Which folders stand for classes: not the parts of a data set, and not those that every class has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ict_fast.errors import printable
from ict_fast.screen import say

_PARTS = frozenset(("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"))


def is_part(name: str) -> bool:
    """Whether it is a usual name of a part of a data set."""
    return name.lower() in _PARTS


def training_part(folders: Sequence[str]) -> str | None:
    """Of folders that are parts of a data set by their names, that of the training, or the first; else None.

    All have such a name, or several, that of the training among them: `train`, `test`, `extra`.
    """
    parts = [folder for folder in folders if is_part(folder)]
    training = next((folder for folder in parts if folder.lower().startswith("train")), None)
    if len(parts) == len(folders):
        return training or next(iter(parts), None)
    return training if len(parts) > 1 else None


def say_what_does_not_count(place: object, names: Iterable[str]) -> None:
    """A line for the person if the folders below the classes look more like classes: `2019/cat`, `2020/cat`.

    That is where no image lies directly in a class, and several folders are in more than one. A single one is
    a habit of data sets: `n01443537/images`.

    Args:
        place: of the classes.
        names: of the images, relative to it.
    """
    inside: dict[str, set[str]] = {}
    for name in names:
        folder, *rest = name.split("/", 2)
        inside.setdefault(folder, set()).add(rest[0] if len(rest) == 2 else "")
    counts = Counter(folder for folders in inside.values() for folder in folders)
    repeated = sorted(folder for folder, count in counts.items() if count > 1)
    if "" not in counts and len(repeated) > 1:
        say(
            f"{place}: its classes are the folders directly in it ({first_few(sorted(inside))}); those in"
            f" several of them ({first_few(repeated)}) do not count"
        )


def first_few(names: Sequence[str]) -> str:
    """The first three names: "cat, dog, fox, ..."."""
    return ", ".join([printable(name) for name in names[:3]] + ["..."] * (len(names) > 3))
