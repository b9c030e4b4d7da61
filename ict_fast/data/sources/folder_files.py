"""Images in folders: any folder, with a class per subfolder or without, and ILSVRC's folders of synsets.

Files are told by their suffix, in any case; others are passed over and counted, hidden ones passed over. What
lies deeper than a class's folder belongs to that class. Links are followed, but for those that lead back to a
folder that they lie in: a ring would have no end.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ict_fast.data.progress import narrated
from ict_fast.data.sources.class_folders import say_what_does_not_count, training_part
from ict_fast.data.sources.ilsvrc import PACKED_AT, SYNSET, training_source
from ict_fast.data.sources.image_decoding import MAX_ENCODED_BYTES, RejectedImage
from ict_fast.data.sources.image_source import ImageSource
from ict_fast.data.sources.name_table import NameTable
from ict_fast.errors import InputError
from ict_fast.screen import say

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif")

# What an error says of one file. Others, such as EIO and ESTALE, are those of a disk or a network, and pass.
_OF_THE_FILE = frozenset(
    (
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EACCES,
        errno.EPERM,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
    )
)


@dataclass(frozen=True)
class FolderFiles:
    """The images below a folder, in the order of their labels; `EncodedFiles`."""

    root: Path
    names: NameTable
    """Relative to the root."""
    listing: np.ndarray
    """uint8 (N, 16): a digest of each file's name, size and date of change."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """The file's path relative to the folder."""
        return self.names[index]

    def stamp(self, start: int, stop: int) -> str:
        """As `EncodedFiles.stamp`."""
        return hashlib.sha256(self.listing[start:stop].tobytes()).hexdigest()

    def read(self, index: int) -> bytes:
        """As `EncodedFiles.read`. A file that may not be read is a bad image: the others may be good."""
        path = self.root / self.names[index]
        try:
            return read_file(path)
        except OSError as error:
            if error.errno in _OF_THE_FILE and self.root.is_dir():  # if not, all of them have gone
                raise RejectedImage(f"cannot be read: {error.strerror or error}") from error
            raise OSError(error.errno, error.strerror, str(path)) from error  # `read` does not name it


def read_file(path: Path) -> bytes:
    """The content of an image's file.

    Raises:
        RejectedImage: it is no file, or too large.
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
        raise RejectedImage("not a file")
    with path.open("rb") as file:
        content = file.read(MAX_ENCODED_BYTES + 1)
    if len(content) > MAX_ENCODED_BYTES:
        raise RejectedImage(f"a file of more than {MAX_ENCODED_BYTES} bytes")
    return content


def folder_source(root: Path, *, crop: str, resolution: int, image_channels: int) -> ImageSource:
    """Any folder of images: classes by subfolder, in the order of their names, or none.

    Args:
        root: holds either images, which then have no labels, or one folder per class.
        crop: a key of `CROPS`.
        resolution: R, pixels.
        image_channels: 1 for grey, 3 for RGB.
    Raises:
        InputError: no images, images beside folders of images, a folder without any, or the parts of a data
            set, such as train and val, where classes should be.
    """
    _require_folder(root)
    classes = _subfolders(root)
    passed_over: Counter[str] = Counter()
    top = _images_of(_entries(root), passed_over)
    if top and classes:
        raise InputError(
            f"{root}: has images ({min(top)}) beside folders ({classes[0]}); a folder has either images"
            " without labels, or one folder per class"
        )
    part = training_part(classes)
    if part and (len(classes) > 1 or _subfolders(root / part)):
        raise InputError(
            f"{root}: has {', '.join(classes)}, which are parts of a data set and not classes; name"
            f" {root / part}"
        )
    files, labels = _list_classes(root, classes, passed_over) if classes else (_list_files(root, top), None)
    say_passed_over(root, passed_over)
    if classes:
        say_what_does_not_count(root, files.names)
    return ImageSource(
        name=f"images of the folder {root.absolute().name}",
        files=files,
        crop=crop,
        resolution=resolution,
        image_channels=image_channels,
        classes=classes,
        labels=np.zeros(len(files), np.int64) if labels is None else labels,
    )


def say_passed_over(place: Path, passed_over: Counter[str]) -> None:
    """A line for the person if there are files whose suffix is none of an image that is read."""
    if passed_over:
        suffixes = ", ".join(f"{count:,} {suffix}" for suffix, count in passed_over.most_common(5))
        more = ", ..." if len(passed_over) > 5 else ""
        say(
            f"{place}: passed over {passed_over.total():,} files that are no images by name: {suffixes}{more}"
        )


def ilsvrc_folder_source(root: Path, *, crop: str, resolution: int) -> ImageSource:
    """The extracted training set of ILSVRC 2012: one folder per synset, `n01440764/n01440764_10026.JPEG`.

    A class is a synset, in the order of their names. Fewer than 1,000 are taken for a chosen subset, and the
    name says so.

    Args:
        root: the folder of the synsets' folders; what else lies there is passed over.
        crop: a key of `CROPS`.
        resolution: R, pixels.
    Raises:
        InputError: no folder of a synset, or one without images.
    """
    _require_folder(root)
    classes = [name for name in _subfolders(root) if SYNSET.fullmatch(name)]
    if not classes:
        inside = [root / name for name in (*PACKED_AT, *_subfolders(root))]
        below = [path for path in inside if path.is_dir() and any(map(SYNSET.fullmatch, _subfolders(path)))]
        hint = f"; {below[0]} has some" if below else ""
        raise InputError(f"{root}: has no folder named as a synset, such as n01440764{hint}")
    passed_over: Counter[str] = Counter()
    files, labels = _list_classes(root, classes, passed_over)
    say_passed_over(root, passed_over)
    return training_source(files, [classes[label] for label in labels], crop=crop, resolution=resolution)


def _require_folder(root: Path) -> None:
    if not root.is_dir():
        raise InputError(f"{root}: {'is not a folder' if root.exists() else 'there is nothing here'}")


def _list_classes(
    root: Path, classes: list[str], passed_over: Counter[str]
) -> tuple[FolderFiles, np.ndarray]:
    """The images of all classes and their labels, int64 (N,)."""
    names, counts = [], []
    for name in classes:
        found = sorted(_images_below(root, name, passed_over))
        if not found:
            raise InputError(
                f"{root / name}: a class without images ({', '.join(IMAGE_SUFFIXES)}); remove the folder"
            )
        names += found
        counts.append(len(found))
    return _list_files(root, names), np.repeat(np.arange(len(classes), dtype=np.int64), counts)


def _list_files(root: Path, names: list[str]) -> FolderFiles:
    if not names:
        raise InputError(f"{root}: has no images ({', '.join(IMAGE_SUFFIXES)})")
    listing = bytearray()
    for name in narrated(names, lambda name: f"listing the images of {root}: {name}"):
        try:
            status = os.stat(root / name)
            seen = (name, status.st_size, status.st_mtime_ns)
        except OSError as error:
            if error.errno not in _OF_THE_FILE:
                raise InputError(f"{root / name}: cannot be read: {error.strerror}") from error
            seen = (name, -1, -1)  # a link that leads nowhere; reading it will say so
        listing += hashlib.blake2b(repr(seen).encode(), digest_size=16).digest()
    return FolderFiles(root, NameTable(names), np.frombuffer(bytes(listing), np.uint8).reshape(-1, 16))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from error


def _subfolders(root: Path) -> list[str]:
    """Names of the folders in it, but for images and for links that lead back."""
    return sorted(
        entry.name
        for entry in _entries(root)
        if not _is_image(entry.name) and _is_folder(entry) and not _leads_back(entry, [root.resolve()])
    )


def _leads_back(entry: os.DirEntry[str], inside: Iterable[Path]) -> bool:
    """Whether it is a link to one of those resolved folders or to one above; such a link is said."""
    if not entry.is_symlink():
        return False
    target = Path(entry.path).resolve()
    if back := any(folder.is_relative_to(target) for folder in inside):
        say(f"{entry.path}: passed over, a link to a folder that it lies in")
    return back


def _images_of(entries: list[os.DirEntry[str]], passed_over: Counter[str]) -> list[str]:
    """Sorted names of those that are images; counts the other files by suffix."""
    passed_over.update(
        Path(entry.name).suffix.lower() or "without a suffix"
        for entry in entries
        if not _is_image(entry.name) and not _is_folder(entry)
    )
    return sorted(entry.name for entry in entries if _is_image(entry.name))


def _images_below(
    root: Path, folder: str, passed_over: Counter[str], linked_from: tuple[Path, ...] = ()
) -> Iterator[str]:
    """Names relative to `root`; `linked_from` holds the resolved folders whose links have led here."""
    entries = _entries(root / folder)
    for name in _images_of(entries, passed_over):
        yield f"{folder}/{name}"
    for entry in entries:
        if _is_image(entry.name) or not _is_folder(entry):
            continue
        inside = linked_from
        if entry.is_symlink():
            inside = (*linked_from, root.resolve(), (root / folder).resolve())
            if _leads_back(entry, inside):
                continue
        yield from _images_below(root, f"{folder}/{entry.name}", passed_over, inside)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)
