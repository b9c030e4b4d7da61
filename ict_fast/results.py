"""What a command leaves behind: where it may go, and pictures and arrays of samples."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ict_fast.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

# Of a run or an export; of a checkpoint or a store, in whose folder they are; and what may be beside these.
_OF_A_MODEL = frozenset(("config.json", "run.json", "init.json", "model_index.json"))
_DESCRIPTIONS = ("MANIFEST.json", "meta.json")
_MEASUREMENTS = ("evaluation", "search-sigma")


def require_run(path: Path) -> None:
    """Raises InputError unless there is something at `path` to load."""
    if not path.exists():
        raise InputError(f"there is no run or checkpoint at {path}; `ict-fast train --out {path}` makes one")


def run_folder(path: Path) -> Path:
    """The run that `path`, a run, the folder of its checkpoints or one of them, belongs to."""
    whole = path.absolute()
    if whole.name == "checkpoints" and not (whole / "checkpoints").exists():
        return path.parent if path.name else whole.parent
    return whole.parent.parent if whole.parent.name == "checkpoints" else path


def require_place(folder: Path, option: str) -> None:
    """Raises InputError unless `folder` is, or can become, a folder that can be written into."""
    nearest = _nearest(folder)
    if not nearest.is_dir():
        raise InputError(f"{option} is {folder}, but {nearest} is not a folder; choose another place")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{option} is {folder}, but {nearest} cannot be written; choose another place")


def require_weights_place(folder: Path, option: str) -> None:
    """Raises InputError unless weights can be written into `folder`, see `require_place`, and read again."""
    require_place(folder, option)
    try:
        str(folder).encode()
    except UnicodeEncodeError:  # safetensors opens no such path
        raise InputError(
            f"{option} is {folder}, a name that is not UTF-8, and weights in such a place cannot be read"
            " again; choose another place"
        ) from None


def require_file_place(file: Path, option: str, name: str) -> None:
    """Raises InputError unless `file` can be written.

    Args:
        option: what names it, for the message.
        name: one that the file could have in a folder; its suffix must be the file's.
    """
    if file.is_dir():
        raise InputError(f"{option} is {file}, a folder; name a file to write, such as {file / name}")
    require_place(file.parent, option)
    if file.exists() and not file.is_file():
        raise InputError(f"{option} is {file}, a device or a pipe, which would be replaced; name a file")
    suffix = Path(name).suffix
    if file.suffix != suffix:
        raise InputError(f"{option} is {file}; it must end with {suffix}, such as {name}")


def require_measurement_place(file: Path, option: str, name: str, sources: Sequence[Path | None]) -> None:
    """Raises InputError unless a measurement can be written to `file`, and nothing else is lost by it.

    Args:
        option, name: see `require_file_place`.
        sources: files that are read, none of which may be lost; None for what is not given.
    """
    require_file_place(file, option, name)
    for source in sources:
        if source is not None and file.resolve() in _places(source):
            raise InputError(f"{option} is {file}, which would overwrite {source}; choose another place")
    inside = any((file.parent / description).exists() for description in _DESCRIPTIONS)
    if (file.name in _OF_A_MODEL and file.exists()) or (inside and not file.name.startswith(_MEASUREMENTS)):
        raise InputError(
            f"{option} is {file}, a place for the files of a model or of a data set; choose another, such as"
            f" {name}"
        )


def require_sample_place(out: Path, count: int, sources: Sequence[Path] = ()) -> None:
    """Raises InputError unless `save_samples` can write `count` images to `out`.

    Args:
        sources: files that are read, none of which may be lost.
    """
    if _is_folder(out):
        require_place(out, "--out")
        others = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
        others = [name for name in others if not _is_image_name(name, count)]
        if others:
            raise InputError(f"--out is {out}, which holds {others[0]}; images need a folder of their own")
    elif out.suffix in (".png", ".npz"):
        require_place(out.parent, "--out")
    else:
        raise InputError(f"--out is {out}; it must end with .png or .npz, or name a folder")
    place = out.resolve()
    for source in sources:
        for file in _places(source):
            inside = file.parent == place and _is_image_name(file.name, count)
            if inside or file == place:
                raise InputError(f"--out is {out}, which would overwrite {source}; choose another place")


def require_room(out: Path, size: int) -> None:
    """Raises InputError unless `size` bytes of pixels fit into memory, and on the disk if they go to an .npz.

    What PNGs will take is not known before.
    """
    rooms = {"memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")}
    if out.suffix == ".npz" and not _is_folder(out):
        rooms[f"disk left for {out}"] = shutil.disk_usage(_nearest(out.parent)).free
    for room, free in rooms.items():
        if size > free:
            raise InputError(
                f"the images take {size / 1e9:,.1f} GB, and there are {free / 1e9:,.1f} GB of {room};"
                " make fewer at a time"
            )


def require_grid(out: Path, count: int, resolution: int, columns: int | None = None) -> None:
    """Raises InputError if `out` is one picture, and a grid of so many images too large to be looked at.

    Args:
        columns: images in a row; by default about as many as rows.
    """
    from ict_fast.data.pictures import LARGEST_GRID, grid_shape

    height, width = grid_shape(count, resolution, resolution, columns)
    if out.suffix == ".png" and not _is_folder(out) and height * width > LARGEST_GRID:
        raise InputError(
            f"--out is {out}, and a grid of {count:,} images of {resolution}x{resolution} is a picture of"
            f" {width:,}x{height:,} pixels, too large to be shown; name a folder, for a PNG of each, or a"
            " FILE.npz"
        )


def save_samples(
    images: np.ndarray,
    labels: Sequence[int] | torch.Tensor | None,
    out: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Writes images as a grid (.png), as arrays (.npz: arr_0, arr_1), or as one PNG each (a folder).

    Args:
        images: uint8 (N, H, W, C).
        labels: one per image, or None for an unconditional model.
        out: see `require_sample_place`.
        progress: called with the number of PNGs written, if there is one for each image.
    Raises:
        InputError: if it cannot be written.
    """
    import numpy as np

    from ict_fast.data.pictures import image_grid, save_png
    from ict_fast.durable import flush_directory, replacing
    from ict_fast.screen import say

    with _writing(out):
        if not _is_folder(out) and out.suffix == ".png":
            save_png(image_grid(images), out)
        elif not _is_folder(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            with replacing(out) as file:  # the arrays of 50,000 images are 0.6 GB: never twice in memory
                np.savez(file, images, *([] if labels is None else [np.asarray(labels, dtype=np.int64)]))
        else:
            from PIL import Image

            out.mkdir(parents=True, exist_ok=True)
            done = 0
            try:
                for image in images:
                    save_png(
                        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image),
                        out / _image_name(done),
                        flush=False,
                    )
                    done += 1
                    progress(done)
            except BaseException:
                if done:  # a part of them looks like all of them
                    say(f"{done:,} of {len(images):,} images are in {out}")
                raise
            flush_directory(out)


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` for what an interrupted command has done; removed once it is empty.

    Raises:
        InputError: if another process measures for `out`, or the folder cannot be created.
    """
    with only_writer(out):
        folder = _partial(out)
        with _writing(folder):
            folder.mkdir(exist_ok=True)
        try:
            yield folder
        finally:
            for place in (*folder.glob("*"), folder):
                with suppress(OSError):  # it holds something
                    place.rmdir()


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Keeps every other process from measuring for `out`, whose folder is created.

    Raises:
        InputError: if another process does, or the lock cannot be created.
    """
    from ict_fast.locks import WriterLock

    folder = _partial(out)
    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = WriterLock(folder)
    try:
        yield
    finally:
        lock.release()


def write_picture(path: Path, picture: Image.Image) -> None:
    """Writes a picture as PNG, whole or not at all, creating its folder.

    Raises:
        InputError: if it cannot be written.
    """
    from ict_fast.data.pictures import save_png

    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(picture, path)


def write(path: Path, content: bytes, option: str = "--out") -> None:
    """Writes a file whole or not at all, creating its folder.

    Args:
        option: what names it, for the message.
    Raises:
        InputError: if it cannot be written; an older file is then untouched.
    """
    from ict_fast.durable import replace_durably

    with _writing(path, option):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_durably(path, content)


def _partial(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def _places(source: Path) -> tuple[Path, Path]:
    """Where a file lies, and where the link to it, if it is named by one."""
    return source.resolve(), source.parent.resolve() / source.name


def _image_name(number: int) -> str:
    return f"{number:06d}.png"


def _is_image_name(name: str, count: int) -> bool:
    """Whether `name` is `_image_name` of a number below `count`."""
    number = name.removesuffix(".png")
    return number.isdecimal() and int(number) < count and name == _image_name(int(number))


def _is_folder(out: Path) -> bool:
    """Whether samples go into a folder of that name."""
    return out.is_dir() or not out.suffix


def _nearest(path: Path) -> Path:
    """What is there of a path: itself, or the first of its parents."""
    nearest = path.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    return nearest


@contextmanager
def _writing(path: Path, option: str = "--out") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror or error}; choose another {option}"
        ) from error
