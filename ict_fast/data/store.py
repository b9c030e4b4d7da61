"""The on-disk format of a data set: one memory-mapped array of images, one of labels, and what they are.

images.npy  uint8 (N, H, W, C): one raw array beats every sharded or encoded form (0.6 M images/s at 64x64).
labels.npy  int64 (N,), in [0, number of classes); all zero where there are no classes.
meta.json   format, source, recipe, classes, and the size and SHA-256 of both arrays.
rejected.txt, if the source had images that cannot be used: their names and why.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from ict_fast.data.store_format import (
    FORMAT,
    VERSION,
    check_labels,
    describe,
    encode_labels,
    file_entry,
    image_shape_problem,
    npy_header,
)
from ict_fast.durable import flush_directory, sha256_file, write_durably
from ict_fast.errors import InputError
from ict_fast.locks import WriterLock

HASH_ALWAYS_BELOW = 1 << 30  # bytes; hashing ImageNet-64 (15.7 GB) at every start would cost 10 s or more

_MADE_FROM = {  # where the presets look for their data
    "digits": "digits",
    "cifar10": "cifar10 --download",
    "imagenet64": "imagenet ILSVRC2012_img_train.tar",
}


@dataclass(frozen=True)
class Store:
    """A verified data set. `images` is memory-mapped and read-only; keep its files while it is in use."""

    path: Path
    images: np.ndarray
    """uint8 (N, H, W, C), H = W."""
    labels: np.ndarray
    """int64 (N,)."""
    meta: dict[str, Any]
    """meta.json: source, recipe, classes, files."""

    @property
    def num_images(self) -> int:
        return self.images.shape[0]

    @property
    def resolution(self) -> int:
        """Height and width in pixels."""
        return self.images.shape[1]

    @property
    def image_channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return self.images.shape[3]

    @property
    def num_classes(self) -> int:
        """0 where the images have no labels."""
        return len(self.meta["classes"])

    def require_whole(self) -> None:
        """To be called before images are read: to touch what a truncated file has lost is to die of SIGBUS.

        Raises:
            OSError: the file has become shorter, or its file system is gone.
        """
        mapped = cast(mmap.mmap, self.images.base)
        if mapped.size() < self.meta["files"]["images.npy"]["bytes"]:  # of the file as it is now
            raise OSError(errno.EIO, "truncated while it was in use", str(self.path / "images.npy"))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the SHA-256 of the images and of the labels: equal for equal data."""
        return _fingerprint(self.meta["files"])


def write_store(
    out: Path,
    images: np.ndarray | Iterable[np.ndarray],
    labels: np.ndarray,
    *,
    source: str,
    recipe: str,
    classes: Sequence[str],
) -> Path:
    """Writes a store in one step: it is there whole, or not at all.

    A store that is there already is compared and verified instead of rebuilt.

    Args:
        out: the folder to create; it must not exist, be empty, or hold the very same store.
        images: uint8 (N, H, W, C) with H = W and C = 1 or 3, or blocks of it in order, which need not fit in
            memory together.
        labels: integers (N,), indices into `classes`; all zero if `classes` is empty.
        source: where the images come from.
        recipe: how their pixels were computed; results of different recipes do not compare.
        classes: the names of the classes, in the order of the labels.
    Returns:
        out.
    Raises:
        InputError: `out` holds something else, is being written by another process, or the disk is full;
            images or labels that the format cannot hold.
    """
    if not np.issubdtype(labels.dtype, np.integer):
        raise InputError(f"labels are of type {labels.dtype}; they must be integers")
    labels = np.ascontiguousarray(labels, dtype=np.int64)
    check_labels(labels, len(classes), "labels")
    blocks = iter([images] if isinstance(images, np.ndarray) else images)
    about = describe(source, recipe, classes)

    if is_taken(out):
        return _keep_equal(out, about, blocks, labels)

    out = place(out)
    partial = out.parent / f".{out.name}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = WriterLock(partial)
    except OSError as error:
        raise InputError(f"{out}: cannot be created: {error.strerror or error}") from error
    try:
        if is_taken(out):  # since we looked
            return _keep_equal(out, about, blocks, labels)
        shutil.rmtree(partial, ignore_errors=True)  # of a writer that was killed
        partial.mkdir()
        with (partial / "images.npy").open("wb") as file:
            image_entry = _write_images(file, blocks, len(labels), out)
            file.flush()
            os.fsync(file.fileno())
        encoded_labels = encode_labels(labels)
        write_durably(partial / "labels.npy", encoded_labels)
        files = {"images.npy": image_entry, "labels.npy": file_entry(encoded_labels)}
        write_durably(partial / "meta.json", json.dumps({**about, "files": files}, indent=1).encode())
        flush_directory(partial)
        lock.require()
        os.replace(partial, out)
        flush_directory(out.parent)
    except BaseException as error:
        if lock.is_held():
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"{out}: cannot be written: {error.strerror or error}") from error
        raise
    finally:
        lock.release()
    return out


def open_store(path: Path, *, verify: bool = False) -> Store:
    """Opens a store after checking it.

    Sizes, types, shapes and labels are always checked; the SHA-256 of both arrays if they are below 1 GiB.

    Args:
        path: folder with images.npy, labels.npy and meta.json.
        verify: check the SHA-256 of a larger store too.
    Raises:
        InputError: naming the file that is missing, truncated, altered or foreign, and what to do.
    """
    make = f"`ict-fast prepare {_MADE_FROM.get(path.name, '<source>')} --out {path}`"
    if not path.exists():
        raise InputError(f"{path}: there is no data here; make it with {make}")
    if not path.is_dir():
        raise InputError(f"{path}: is a file; name the folder that `ict-fast prepare` has made")
    if (path / "checkpoints").is_dir() and not (path / "meta.json").exists():
        raise InputError(f"{path}: is a run; name a folder of images that `ict-fast prepare` has made")
    meta = _read_meta(path / "meta.json", make)

    again = f"delete {path} and make it again with {make}"
    for name, entry in meta["files"].items():
        file = path / name
        if not file.is_file():
            raise InputError(f"{file}: missing; {again}")
        size = file.stat().st_size
        if size < entry["bytes"]:
            raise InputError(f"{file}: truncated, {size} of {entry['bytes']} bytes; {again}")
        if size > entry["bytes"]:
            raise InputError(f"{file}: altered, {size} bytes instead of {entry['bytes']}; {again}")
    images = _map_array(path / "images.npy", np.dtype(np.uint8), 4, again)
    labels = np.array(_map_array(path / "labels.npy", np.dtype(np.int64), 1, again))
    problem = image_shape_problem(images.shape)
    if problem:
        raise InputError(f"{path / 'images.npy'}: {problem}; {again}")
    if len(images) != len(labels):
        raise InputError(f"{path / 'labels.npy'}: {len(labels)} labels for {len(images)} images; {again}")
    check_labels(labels, len(meta["classes"]), str(path / "labels.npy"))

    if verify or sum(entry["bytes"] for entry in meta["files"].values()) < HASH_ALWAYS_BELOW:
        _verify(path, meta["files"], again)
    return Store(path=path, images=images, labels=labels, meta=meta)


def _keep_equal(out: Path, about: dict[str, Any], blocks: Iterator[np.ndarray], labels: np.ndarray) -> Path:
    """Verifies the store at `out` and that it is what would have been written."""
    if not (out / "meta.json").is_file():
        raise InputError(f"{out}: exists and is not a prepared store; name another --out")
    there = open_store(out, verify=True).meta
    ours = {
        **about,
        "images": _write_images(None, blocks, len(labels), out)["sha256"],
        "labels": file_entry(encode_labels(labels))["sha256"],
    }
    theirs = {**there, **{name: there["files"][f"{name}.npy"]["sha256"] for name in ("images", "labels")}}
    different = [name for name, value in ours.items() if theirs.get(name) != value]
    if different:
        raise InputError(f"{out}: holds another store (other {', '.join(different)}); name another --out")
    return out


def place(out: Path) -> Path:
    """Where a store can be put by a rename: what `out`, if it is a link, leads to.

    Raises:
        InputError: a mount point; `.` or `..`.
    """
    if out.name in ("", ".."):  # what is begun would lie inside of it
        raise InputError(f"{out}: a store is renamed to its place, which needs a name; name a folder in it")
    out = out.resolve() if out.is_symlink() else out  # what a link names may be on a larger disk
    if os.path.ismount(out):
        raise InputError(f"{out}: is a mount point, which nothing can be renamed to; name a folder in it")
    return out


def is_taken(out: Path) -> bool:
    """Whether there is anything but an empty folder."""
    return out.exists() and not (out.is_dir() and not any(out.iterdir()))


def _write_images(
    file: BinaryIO | None, blocks: Iterator[np.ndarray], num_images: int, out: Path
) -> dict[str, Any]:
    """Writes (or only hashes, if file is None) the blocks as one .npy; returns its entry in meta.json."""
    digest, written, count = hashlib.sha256(), 0, 0
    shape: tuple[int, ...] | None = None
    for block in blocks:
        if block.dtype != np.uint8:
            raise InputError(f"images are of type {block.dtype}; a store holds uint8")
        if shape is None:
            problem = image_shape_problem((num_images, *block.shape[1:]))
            if problem:
                raise InputError(f"images: {problem}")
            shape = block.shape[1:]
            header = npy_header((num_images, *shape), np.dtype(np.uint8))
            needed = len(header) + num_images * int(np.prod(shape))
            if file is not None:
                free = shutil.disk_usage(out.parent).free
                if free < needed:
                    raise InputError(
                        f"{out}: needs {needed / 1e9:.3g} GB and the disk has {free / 1e9:.3g} GB left"
                    )
                file.write(header)
            digest.update(header)
            written = len(header)
        if block.shape[1:] != shape:
            raise InputError(f"images of shapes {shape} and {block.shape[1:]}; a store holds one shape")
        count += len(block)
        content = np.ascontiguousarray(block).data
        if file is not None:
            file.write(content)
        digest.update(content)
        written += content.nbytes
    if shape is None or count != num_images:
        raise InputError(f"{count} images for {num_images} labels")
    return {"bytes": written, "sha256": digest.hexdigest()}


def _verify(path: Path, files: dict[str, Any], again: str) -> None:
    """Compares the content of the files with their SHA-256; shows how far it is if that takes long."""
    total, done = sum(entry["bytes"] for entry in files.values()), 0
    with _live_line(total) as show:

        def progress(count: int) -> None:
            nonlocal done
            done += count
            if show is not None:
                show(done / total, f"verifying {path}")

        for name, entry in files.items():
            if sha256_file(path / name, progress) != entry["sha256"]:
                raise InputError(f"{path / name}: altered, its SHA-256 is not that of meta.json; {again}")


def _live_line(total: int) -> AbstractContextManager[Callable[[float, str], None] | None]:
    if total < HASH_ALWAYS_BELOW:
        return nullcontext()
    from ict_fast.screen import live_line  # loaders are measured where its libraries are not installed

    return live_line()


def _read_meta(file: Path, make: str) -> dict[str, Any]:
    try:
        meta = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{file}: missing, so this is not a prepared store; make one with {make}") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not readable as JSON; delete the folder and run {make}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise InputError(f"{file}: not written by ict-fast; make a store with {make}")
    if meta.get("version") != VERSION:
        raise InputError(
            f"{file}: format version {meta.get('version')}; this ict-fast reads version {VERSION};"
            f" make the store again with {make}"
        )
    files, classes = meta.get("files"), meta.get("classes")
    well_formed = (
        isinstance(classes, list)
        and len(classes) == meta.get("num_classes")
        and isinstance(files, dict)
        and set(files) == {"images.npy", "labels.npy"}
        and all(isinstance(entry, dict) for entry in files.values())
        and all(isinstance(entry.get("bytes"), int) for entry in files.values())
        and all(isinstance(entry.get("sha256"), str) for entry in files.values())
    )
    if not well_formed:
        raise InputError(f"{file}: altered, its fields are not a store's; delete the folder and run {make}")
    return meta


def _map_array(file: Path, dtype: np.dtype, ndim: int, again: str) -> np.ndarray:
    """Memory-maps a .npy read-only; object arrays, which would be pickles, are refused."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}; {again}") from error
    except (ValueError, TypeError, SyntaxError, EOFError, OverflowError) as error:
        raise InputError(f"{file}: not a plain .npy array; {again}") from error
    if not isinstance(array, np.memmap) or array.dtype != dtype or array.ndim != ndim:
        kind = getattr(array, "dtype", type(array).__name__)
        raise InputError(
            f"{file}: holds {kind} in {getattr(array, 'ndim', 0)} dimensions;"
            f" a store has {dtype} in {ndim}; {again}"
        )
    if not array.flags.c_contiguous:
        raise InputError(f"{file}: in Fortran order; a store is in C order; {again}")
    return array


def _fingerprint(files: dict[str, Any]) -> str:
    joined = "".join(files[name]["sha256"] for name in ("images.npy", "labels.npy"))
    return hashlib.sha256(joined.encode()).hexdigest()
