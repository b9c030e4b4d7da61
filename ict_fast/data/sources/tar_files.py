"""ILSVRC2012_img_train.tar, read in place: 138 GB need not be extracted.

The archive holds one archive per synset (`n01440764.tar`, of `n01440764_10026.JPEG`), as it is distributed,
or folders of the synsets (`train/n01440764/n01440764_10026.JPEG`), as people pack it again. Kaggle's has the
validation and test sets too; they are passed over.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np

from ict_fast.data.progress import narrated
from ict_fast.data.sources.folder_files import IMAGE_SUFFIXES, say_passed_over
from ict_fast.data.sources.ilsvrc import (
    SYNSET,
    is_held_out,
    one_parent,
    say_held_out,
    synset_of,
    training_source,
)
from ict_fast.data.sources.image_decoding import MAX_ENCODED_BYTES, RejectedImage
from ict_fast.data.sources.image_source import ImageSource
from ict_fast.data.sources.name_table import NameTable
from ict_fast.errors import InputError

_COMPRESSED = {
    rb"\x1f\x8b": "gzip",
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": "bzip2",
    rb"\xfd7zXZ\0": "xz",
    rb"\x28\xb5\x2f\xfd": "zstd",
}
"""How what is compressed begins; a tar that is not begins with the name of its first member."""


@dataclass(frozen=True)
class TarFiles:
    """Members of an archive that is not compressed; `EncodedFiles`."""

    archive: Path
    names: NameTable
    offsets: np.ndarray
    """int64 (N,), of the members' content in the archive, in bytes."""
    sizes: np.ndarray
    """int64 (N,), bytes."""
    modified: int
    """The archive's date of change, in nanoseconds."""

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """The member's name."""
        return self.names[index]

    def stamp(self, start: int, stop: int) -> str:
        """As `EncodedFiles.stamp`."""
        digest = hashlib.sha256(repr((self.modified, *self.names[start:stop])).encode())
        digest.update(self.offsets[start:stop].tobytes())
        digest.update(self.sizes[start:stop].tobytes())
        return digest.hexdigest()

    def read(self, index: int) -> bytes:
        """As `EncodedFiles.read`."""
        size, offset = int(self.sizes[index]), int(self.offsets[index])
        if size > MAX_ENCODED_BYTES:
            raise RejectedImage(f"a file of {size} bytes, more than {MAX_ENCODED_BYTES}")
        with self.archive.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)


class _Member(NamedTuple):
    synset: str
    name: str
    offset: int
    size: int


def ilsvrc_tar_source(archive: Path, *, crop: str, resolution: int) -> ImageSource:
    """The training set of ILSVRC 2012 as an archive; classes and order as `ilsvrc_folder_source`.

    Args:
        archive: a tar that is not compressed.
        crop: a key of `CROPS`.
        resolution: R, pixels.
    Raises:
        InputError: not such an archive, truncated, with a class that has no images, with synsets in more than
            one folder, or with a member that could mean harm: a link, a device, an absolute name, `..`, a
            name that comes twice.
    """
    passed_over: Counter[str] = Counter()
    try:
        with archive.open("rb") as file:
            status = os.fstat(file.fileno())
            found = narrated(
                _images(file, archive, 0, "", passed_over),
                lambda member: f"listing {archive}: {100 * member.offset // status.st_size} %",
            )
            members = sorted(found)
    except OSError as error:
        raise InputError(f"{archive}: cannot be read: {error.strerror or error}") from error
    for member, following in itertools.pairwise(members):
        if member[:2] == following[:2]:
            raise InputError(f"{archive}: has the member {member.name} twice; it is refused")
    training = [member for member in members if member.synset]
    if not training:
        raise InputError(f"{archive}: has no images ({', '.join(IMAGE_SUFFIXES)})")
    say_held_out(archive, len(members) - len(training))
    say_passed_over(archive, passed_over)
    files = TarFiles(
        archive,
        NameTable(member.name for member in training),
        np.array([member.offset for member in training], np.int64),
        np.array([member.size for member in training], np.int64),
        status.st_mtime_ns,
    )
    synsets = [member.synset for member in training]
    return training_source(files, synsets, crop=crop, resolution=resolution)


def _images(
    file: BinaryIO, archive: Path, start: int, synset: str, passed_over: Counter[str]
) -> Iterator[_Member]:
    """The images of the archive that begins at byte `start`; inside a synset's own archive, all are its.

    Those of Kaggle's validation and test sets have no synset.
    """
    inside = f" inside {synset}.tar" if synset else ""
    archives: set[str] = set()
    as_folders: set[str] = set()
    with_images: set[str] = set()
    parent: str | None = None
    for member in tar_members(file, archive, start, inside):
        path = PurePosixPath(member.name)
        if any(part.startswith(".") for part in path.parts):
            continue
        held_out = not synset and is_held_out(path)
        folder = path if member.isdir() else path.parent
        folders = [part for part in folder.parts if SYNSET.fullmatch(part) and not held_out]
        as_folders.update(folders[-1:])
        if not synset and path.suffix == ".tar" and SYNSET.fullmatch(path.stem):
            if path.stem in archives:
                raise InputError(f"{archive}: has {path.name} twice; it is refused")
            archives.add(path.stem)
            parent = one_parent(archive, parent, path)
            found = list(_images(file, archive, member.offset_data, path.stem, passed_over))
            end = member.offset_data + member.size
            if any(image.offset + image.size > end for image in found):
                raise InputError(f"{archive}: {member.name} has members beyond its end; it is refused")
            if not found:
                raise InputError(f"{archive}: {member.name} is a class without images")
            with_images.add(path.stem)
            yield from found
        elif member.isreg() and path.suffix.lower() in IMAGE_SUFFIXES:
            of = synset
            if not synset and not held_out:
                of, parent = synset_of(archive, path), one_parent(archive, parent, path)
            with_images.update(folders[-1:])
            yield _Member(of, str(path), member.offset_data, member.size)
        elif member.isreg():
            passed_over[path.suffix.lower() or "without a suffix"] += 1
    if not synset and as_folders - with_images:
        raise InputError(f"{archive}: {min(as_folders - with_images)} is a class without images")


def tar_members(file: BinaryIO, archive: Path, start: int = 0, inside: str = "") -> Iterator[tarfile.TarInfo]:
    """Every member of the archive that begins at byte `start`, from the headers alone.

    Args:
        file: the archive, open for reading.
        archive: its path.
        inside: words for an archive inside it.
    Raises:
        InputError: a compressed, truncated or damaged archive, or one with a member that could mean harm.
    """
    file.seek(start)
    begins = file.read(10)
    for magic, program in _COMPRESSED.items():
        if re.match(magic, begins):
            raise InputError(
                f"{archive}: compressed{inside} by {program}, and read in place: decompress it first"
                f" ({program} -dk), and name what that makes"
            )
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as opened:
            while (member := opened.next()) is not None:
                if opened.offset <= member.offset:  # a negative size would lead around for ever
                    raise InputError(f"{archive}: damaged at byte {member.offset}{inside}; get it again")
                # It keeps them all: 600 MB for ImageNet.
                opened.members.clear()  # type: ignore[attr-defined]
                path = PurePosixPath(member.name)
                said = f"{archive}: member {member.name!r}{inside}"
                if path.is_absolute() or ".." in path.parts:
                    raise InputError(f"{said} leads elsewhere; it is refused")
                if not (member.isdir() or member.isreg()) or member.issparse():
                    raise InputError(f"{said} is not a plain file; it is refused")
                yield member
            end = opened.offset
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{archive}: not a whole tar{inside} ({error}); if it is compressed, decompress it first"
        ) from error
    # tarfile takes a damaged header, or the end of the file, for the end of the archive.
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise InputError(f"{archive}: damaged or truncated at byte {end}{inside}; get it again")
