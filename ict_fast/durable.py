"""Writing that survives a power cut: flushed files, flushed directories, replacement in one step.

A rename is atomic, but only a flushed directory makes it last, and only a flushed file its content.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_BLOCK = 1 << 20  # bytes


def sha256_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's content in hexadecimal.

    Args:
        progress: told how many more bytes were read.
    Raises:
        OSError: if it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if progress is not None:
                progress(len(block))
    return digest.hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Writes a new file and flushes it to the disk.

    Raises:
        OSError: disk full, no permission; a part of the file may be left behind.
    """
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush_directory(path: Path) -> None:
    """Makes the creations and renames inside a directory last.

    Raises:
        OSError: if it cannot be opened or flushed.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(path: Path, content: bytes) -> None:
    """Writes a file so that readers see the old content or the new, never a part.

    Raises:
        OSError: disk full, no permission; the old file is then untouched.
    """
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: Path, *, flush: bool = True) -> Iterator[BinaryIO]:
    """Gives a file to write into, which takes the place of `path` at the end; for content too large to hold.

    Args:
        flush: False for one of thousands of small files, whose directory is flushed after the last: none is
            ever seen in part, but a power cut may take those of the last seconds.
    Raises:
        OSError: disk full, no permission; the old file is then untouched.
    """
    partial = path.with_name(f".tmp-{path.name}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            if flush:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if flush:
        flush_directory(path.parent)
