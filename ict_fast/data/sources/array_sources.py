"""Data sets that are published as arrays of pixels: CIFAR-10, and ImageNet downsampled by Chrabaszcz et al.

Both are a `Source`. Opening one checks every file and reads the labels; pixels are read when asked for.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from ict_fast.data.progress import narrated
from ict_fast.data.sources.batch_files import open_npz_batch, open_pickled_batch, pickled_entry
from ict_fast.data.sources.ilsvrc import named_with_what_is_missing
from ict_fast.data.sources.planar_images import PlanarBatch, PlanarImages
from ict_fast.errors import InputError
from ict_fast.restricted_unpickler import load_restricted

CIFAR10_ARCHIVE = "cifar-10-python.tar.gz"
CIFAR10_MD5: Mapping[str, str] = {
    CIFAR10_ARCHIVE: "c58f30108f718f92721af3b95e74349a",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}
"""MD5 of the published archive (cs.toronto.edu/~kriz/cifar.html), and of the files in it that are read."""

_CIFAR10_FOLDER = "cifar-10-batches-py"
_CIFAR10_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_CIFAR10_META = "batches.meta"
_CIFAR10_LARGEST = 64 << 20  # bytes of a member; the published ones have 31 MB
_IMAGENET_BATCHES = tuple(f"train_data_batch_{number}" for number in range(1, 11))
_CLASS_MAP = "map_clsloc.txt"


class Cifar10Source:
    """The training split of CIFAR-10 (Krizhevsky 2009): 50,000 images of 32x32 in RGB, ten classes.

    Args:
        path: cifar-10-python.tar.gz, which is read in place, or the folder that it unpacks to.
        md5: what the archive's MD5 must be, or, for a folder, that of each file in it.
    Raises:
        InputError: a file is missing, is not the published one, or does not hold what it should; an archive
            with links, or with names that lead out of it.
    """

    name = "CIFAR-10, training split"
    recipe = "32x32 RGB, as stored"  # the words of every source that does not resample
    resolution = 32
    image_channels = 3

    def __init__(self, path: Path, md5: Mapping[str, str] = CIFAR10_MD5) -> None:
        if path.is_dir():
            folder = path / _CIFAR10_FOLDER if (path / _CIFAR10_FOLDER).is_dir() else path
            files = [folder / name for name in (_CIFAR10_META, *_CIFAR10_BATCHES)]
            self._md5s = [_check_md5(file, md5[file.name]) for file in files]
            found = _read_folder(files)
        else:
            self._md5s = [_check_md5(path, md5[CIFAR10_ARCHIVE])]
            found = _read_archive(path)
        self.classes: tuple[str, ...] = ()
        batches: dict[str, tuple[PlanarBatch, np.ndarray]] = {}
        for name, content, begins_at in found:
            if name == _CIFAR10_META:
                self.classes = _class_names(content, f"{path}: {name}")
            elif path.is_dir():
                batches[name] = open_pickled_batch(content, folder / name, name)
            else:
                batches[name] = open_pickled_batch(content, path, name, packing="gzip", begins_at=begins_at)
        ordered = [batches[name] for name in _CIFAR10_BATCHES]
        for batch, labels in ordered:
            said = f"{path}: {batch.name}"
            if batch.resolution != self.resolution:
                raise InputError(
                    f"{said}: images of {batch.resolution}x{batch.resolution}; CIFAR-10 has 32x32"
                )
            _check_range(labels, 0, len(self.classes) - 1, said, _CIFAR10_META)
        self.labels = np.concatenate([labels for _, labels in ordered])
        self._images = PlanarImages([batch for batch, _ in ordered])

    def identity(self) -> str:
        """SHA-256 over the recipe, the labels and the MD5 of what is read."""
        return _identity(self, self._md5s)

    def stamp(self, start: int, stop: int) -> str:
        """The identity: the files are the published ones."""
        return self.identity()

    def item_name(self, index: int) -> str:
        """Such as data_batch_1[17]."""
        return self._images.item_name(index)

    def read(
        self, start: int, stop: int, remarks: Counter[str] | None = None
    ) -> tuple[np.ndarray, dict[int, str]]:
        """Images start, ..., stop - 1 as uint8 (n, 32, 32, 3); none is ever rejected.

        Raises:
            InputError: if a file has gone, or is damaged.
        """
        return self._images.read(start, stop), {}


class ImagenetNpzSource:
    """The training split of ImageNet, downsampled by Chrabaszcz et al. (arXiv 1707.08819): 1,000 classes.

    Their labels count from 1 in the order of map_clsloc.txt. Here class k is the k-th synset in sorted order,
    as in every other source of ImageNet.

    Args:
        folder: the ten files train_data_batch_1 to 10, as .npz or as pickles without a suffix, and
            map_clsloc.txt.
    Raises:
        InputError: a file is missing, damaged, or does not hold what it should; labels that the map lacks.
    """

    image_channels = 3

    def __init__(self, folder: Path) -> None:
        files = _find_imagenet_batches(folder)
        synsets = _read_class_map(folder / _CLASS_MAP)
        self._files: list[tuple[str, int, int]] = []
        batches: list[PlanarBatch] = []
        labels_of: list[np.ndarray] = []
        for file in narrated(files, lambda file: f"opening {file}"):
            status = file.stat()
            self._files.append((file.name, status.st_size, status.st_mtime_ns))
            batch, labels = _open_imagenet_batch(file)
            if batches and batch.resolution != batches[0].resolution:
                first = batches[0].resolution
                raise InputError(
                    f"{file}: images of {batch.resolution}x{batch.resolution}, and of {first}x{first} in"
                    f" {files[0].name}; keep each resolution in a folder of its own"
                )
            _check_range(labels, 1, len(synsets), str(file), _CLASS_MAP)
            batches.append(batch)
            labels_of.append(labels)
        self.resolution = batches[0].resolution
        size = f"{self.resolution}x{self.resolution}"
        self.recipe = f"{size} RGB, chrabaszcz"
        self.classes = tuple(sorted(synsets))
        position = {synset: number for number, synset in enumerate(self.classes)}
        in_sorted_order = np.array([position[synset] for synset in synsets], dtype=np.int64)
        self.labels = in_sorted_order[np.concatenate(labels_of) - 1]
        self.name = named_with_what_is_missing(
            f"ImageNet, training split, downsampled to {size} by Chrabaszcz et al.",
            len(self.labels),
            len(np.unique(self.labels)),
        )
        self._images = PlanarImages(batches)

    def identity(self) -> str:
        """SHA-256 over the recipe, the labels, and the names, sizes and dates of the files."""
        return _identity(self, self._files)

    def stamp(self, start: int, stop: int) -> str:
        """SHA-256 over names, sizes and dates of the batches that hold start, ..., stop - 1."""
        files = self._files[self._images.batches_of(start, stop)]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    def item_name(self, index: int) -> str:
        """Such as train_data_batch_1[17]."""
        return self._images.item_name(index)

    def read(
        self, start: int, stop: int, remarks: Counter[str] | None = None
    ) -> tuple[np.ndarray, dict[int, str]]:
        """Images start, ..., stop - 1 as uint8 (n, R, R, 3); none is ever rejected.

        Raises:
            InputError: if a file has gone, or is damaged.
        """
        return self._images.read(start, stop), {}


def md5_file(path: Path) -> str:
    """MD5 of a file's content in hexadecimal, to tell a published file by.

    Raises:
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        # Not for security: a system in FIPS mode refuses MD5 otherwise.
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


# ------------------------------------------------------------------------------------ CIFAR-10


def _check_md5(file: Path, expected: str) -> str:
    try:
        seen = md5_file(file)
    except FileNotFoundError:
        raise InputError(
            f"{file}: missing; name {CIFAR10_ARCHIVE}, or the folder that it unpacks to"
        ) from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    if seen != expected:
        raise InputError(
            f"{file}: cut short, or not the published file: its MD5 is {seen} instead of {expected}"
            f" ({file.stat().st_size:,} bytes); download it again"
        )
    return seen


def _read_folder(files: Sequence[Path]) -> Iterator[tuple[str, IO[bytes], int]]:
    for file in files:
        with file.open("rb") as content:
            yield file.name, content, 0


def _read_archive(path: Path) -> Iterator[tuple[str, IO[bytes], int]]:
    """The members that are read: name, content, and where it begins in the decompressed archive."""
    missing = {_CIFAR10_META, *_CIFAR10_BATCHES}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                _refuse_hostile(member, path)
                folder, name = posixpath.split(member.name)
                if folder != _CIFAR10_FOLDER or name not in (_CIFAR10_META, *_CIFAR10_BATCHES):
                    continue
                content = archive.extractfile(member)
                if name not in missing or content is None or member.size > _CIFAR10_LARGEST:
                    raise InputError(
                        f"{path}: refused, its member {member.name!r} is there twice, no file, or larger than"
                        f" 64 MiB ({member.size:,} bytes)"
                    )
                missing.remove(name)
                # Read once: seeking back, as the search for the rows does, would decompress it all again.
                yield name, io.BytesIO(content.read()), member.offset_data
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cut short, or not a .tar.gz ({error}); download it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}; download it again") from error
    if missing:
        raise InputError(f"{path}: lacks {', '.join(sorted(missing))}; download it again")


def _refuse_hostile(member: tarfile.TarInfo, path: Path) -> None:
    """Nothing is unpacked here; but an archive that would write elsewhere is not to be trusted at all."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise InputError(f"{path}: refused, its member {member.name!r} leads out of the archive")
    if not (member.isreg() or member.isdir()):
        raise InputError(f"{path}: refused, its member {member.name!r} is a link or a device")


def _class_names(content: IO[bytes], said: str) -> tuple[str, ...]:
    loaded = load_restricted(content, {}, name=said, encoding="bytes")
    words = pickled_entry(loaded, "label_names", list, said)
    names = tuple(word.decode("utf-8", "replace") if isinstance(word, bytes) else str(word) for word in words)
    if not names or len(set(names)) != len(names):
        raise InputError(f"{said}: {len(names)} label_names, {len(set(names))} of them different")
    return names


# ---------------------------------------------------------------- ImageNet of Chrabaszcz et al.


def _find_imagenet_batches(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder; name the one that holds train_data_batch_1 to 10")
    files, missing = [], []
    for name in _IMAGENET_BATCHES:
        there = [file for file in (folder / name, folder / f"{name}.npz") if file.is_file()]
        if len(there) == 2:
            raise InputError(f"{folder}: holds both {name} and {name}.npz; move one of them away")
        files += there
        missing += [] if there else [name]
    if missing:
        raise InputError(
            f"{folder}: lacks {', '.join(missing)} (.npz, or pickles without a suffix);"
            " unpack all parts of the training set into this one folder"
        )
    return files


def _open_imagenet_batch(file: Path) -> tuple[PlanarBatch, np.ndarray]:
    if file.suffix == ".npz":
        return open_npz_batch(file)
    with file.open("rb") as content:
        return open_pickled_batch(content, file, file.name)


def _read_class_map(file: Path) -> list[str]:
    """The synsets of the labels 1, 2, ... from lines such as `n02119789 1 kit_fox`."""
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        raise InputError(
            f"{file}: missing; it says which class a label means (lines such as `n02119789 1 kit_fox`); get"
            " it from https://github.com/PatrykChrabaszcz/Imagenet32_Scripts"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error
    synsets = {line[1]: line[0] for line in lines if len(line) >= 2}
    numbers = [str(number) for number in range(1, len(lines) + 1)]
    if not lines or synsets.keys() != set(numbers) or len(set(synsets.values())) != len(lines):
        raise InputError(
            f"{file}: its {len(lines)} lines do not number as many classes from 1 on;"
            " they should read like `n02119789 1 kit_fox`"
        )
    return [synsets[number] for number in numbers]


# ---------------------------------------------------------------------------------------- both


def _check_range(labels: np.ndarray, lowest: int, highest: int, said: str, names: str) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < lowest or high > highest:
        raise InputError(f"{said}: labels from {low} to {high}; those of {names} are {lowest} to {highest}")


def _identity(source: Cifar10Source | ImagenetNpzSource, files: Sequence[object]) -> str:
    about = [source.name, source.recipe, source.resolution, source.classes, files]
    digest = hashlib.sha256(json.dumps(about).encode())
    digest.update(source.labels.tobytes())
    return digest.hexdigest()
