"""A store that is being written: pieces in any order, each kept through the death of the writer.

Beside the store to be lies `.<name>.partial` with images.npy, in which every item has its place from the
start, and journal.jsonl: how they are made, and a line for each piece that is whole on the disk, with its
SHA-256 and that of what it was made from. Only when all is there are the gaps of rejected images closed and
the folder renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ict_fast.data.progress import ImageProgress
from ict_fast.data.sources.source import Source
from ict_fast.data.store import is_taken
from ict_fast.data.store_format import (
    check_labels,
    describe,
    encode_labels,
    file_entry,
    image_shape_problem,
    npy_header,
)
from ict_fast.durable import flush_directory, replace_durably, write_durably
from ict_fast.errors import InputError
from ict_fast.locks import BusyError, WriterLock
from ict_fast.screen import say

REJECTED_NAME = "rejected.txt"
JOURNAL_NAME = "journal.jsonl"
_PIECE_BYTES = 2**22  # what a kill can cost each process: 341 images of 64x64, a second or a few


@dataclass(frozen=True)
class Piece:
    """The items start, ..., stop - 1, read."""

    start: int
    pixels: np.ndarray
    """uint8 (stop - start, H, W, C), zero where an item is rejected."""
    sha256: str
    """Of the pixels."""
    rejected: dict[int, str] = field(default_factory=dict)
    """Index of the item, and why."""
    remarks: Counter[str] = field(default_factory=Counter)
    """How many other items there is something to say of, by what."""

    @property
    def stop(self) -> int:
        return self.start + len(self.pixels)


class PartialStore:
    """The folder beside `out`, locked. Made by `partial_store`.

    Attributes:
        folder: where it is.
        rejected: index and reason of the items that turned out to be unusable, so far.
    """

    def __init__(self, out: Path, folder: Path, lock: WriterLock, source: Source, restart: bool) -> None:
        self.folder = folder
        self.rejected: dict[int, str] = {}
        self._out, self._lock, self._source = out, lock, source
        shape = self._shape = _shape(source)
        self._image_bytes = shape[1] * shape[2] * shape[3]
        self._piece_length = max(1, _PIECE_BYTES // self._image_bytes)
        self._header = npy_header(shape, np.dtype(np.uint8))
        self._lines: dict[int, dict[str, Any]] = {}
        """The journal's line of each piece that is whole, by its first item."""
        done = [] if restart else self._take_over()
        for leftover in folder.iterdir():
            if not (done and leftover.name in ("images.npy", JOURNAL_NAME)):
                leftover.unlink()
        self._images = os.open(folder / "images.npy", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._verify(done)
            self._require_space()
            _write_all(self._images, memoryview(self._header), 0)
            self._write_journal()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leaves everything as it is, for the next process to go on with."""
        os.close(self._images)

    def missing(self) -> list[tuple[int, int]]:
        """The pieces that are still to be written, as (start, stop)."""
        starts = range(0, self._shape[0], self._piece_length)
        return [(start, self._stop(start)) for start in starts if start not in self._lines]

    def write(self, piece: Piece) -> None:
        """Puts a piece in its place, and notes it in the journal once it is on the disk.

        Raises:
            InputError: another process has taken the folder over.
            OSError: as of a full disk.
        """
        self._lock.require()
        _write_all(self._images, piece.pixels.reshape(-1).data, self._offset(piece.start))
        os.fdatasync(self._images)
        line = {
            "start": piece.start,
            "stop": piece.stop,
            "stamp": self._source.stamp(piece.start, piece.stop),
            "sha256": piece.sha256,
            "rejected": piece.rejected,
            "remarks": piece.remarks,
        }
        with (self.folder / JOURNAL_NAME).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps(line) + "\n")
        self._lines[piece.start] = line
        self.rejected |= piece.rejected

    def forget_rejected(self) -> None:
        """Counts the pieces that hold rejected items as missing: what was wrong may have been repaired."""
        self._lines = {start: line for start, line in self._lines.items() if not line["rejected"]}
        self.rejected = {}
        self._write_journal()

    def list_rejected(self, names: Sequence[str]) -> Path:
        """Writes rejected.txt, a line "name<TAB>reason" per rejected item in their order.

        Args:
            names: of the rejected items, in the order of their indices.
        """
        reasons = [self.rejected[index] for index in sorted(self.rejected)]
        lines = (f"{_printable(name)}\t{_printable(why)}\n" for name, why in zip(names, reasons, strict=True))
        path = self.folder / REJECTED_NAME
        replace_durably(path, "".join(lines).encode())
        return path

    def finish(self) -> None:
        """Closes the gaps of the rejected items, and makes the folder the store.

        A process that dies while the gaps are closed leaves pieces that no longer match the journal; the next
        one reads them again.

        Raises:
            InputError: labels outside the classes, a class that has lost all its images, or pieces that
                another process has changed.
            OSError: as of a full disk.
        """
        labels, classes = self._source.labels, self._source.classes
        keep = np.ones(len(labels), dtype=bool)
        keep[list(self.rejected)] = False
        kept = labels[keep]
        lost = np.setdiff1d(labels, kept)
        if len(lost):
            self.forget_rejected()
            whose = f"class {classes[int(lost[0])]}" if classes else "the source"
            raise InputError(
                f"every image of {whose} was rejected; see {self.folder / REJECTED_NAME}, repair them and run"
                " the same command again"
            )
        check_labels(kept, len(classes), "labels")
        self._lock.require()
        image_entry = self._compact(keep)
        encoded_labels = encode_labels(kept)
        write_durably(self.folder / "labels.npy", encoded_labels)
        remarks: Counter[str] = Counter()
        for line in self._lines.values():
            remarks.update(line["remarks"])
        meta = {
            **describe(kept_name(self._source, len(self.rejected)), self._source.recipe, classes),
            "identity": self._source.identity(),
            "pillow": metadata.version("pillow"),
            "rejected": len(self.rejected),
            "remarks": dict(sorted(remarks.items())),
            "files": {"images.npy": image_entry, "labels.npy": file_entry(encoded_labels)},
        }
        write_durably(self.folder / "meta.json", json.dumps(meta, indent=1).encode())
        flush_directory(self.folder)
        self._lock.require()
        os.replace(self.folder, self._out)
        flush_directory(self._out.parent)
        # Not before the rename: without the journal, a process that died between the two would start anew.
        (self._out / JOURNAL_NAME).unlink(missing_ok=True)

    def _stop(self, start: int) -> int:
        return min(start + self._piece_length, self._shape[0])

    def _offset(self, item: int) -> int:
        return len(self._header) + item * self._image_bytes

    def _take_over(self) -> list[dict[str, Any]]:
        """The lines of the pieces that an earlier process has written and that are still of these files.

        Raises:
            InputError: they are of another recipe, or all of them of another source.
        """
        head, *done = _read_journal(self.folder / JOURNAL_NAME) or [{}]
        if not done:
            return []
        before = head if isinstance(head, dict) else {}
        lines = [line for line in done if self._is_a_piece(line)]
        current = [line for line in lines if self._source.stamp(line["start"], line["stop"]) == line["stamp"]]
        for what, now in self._journal_head().items():
            # A source's name may tell how many files there are: one may have been removed.
            if before.get(what) != now and not (what == "source" and (current or not lines)):
                other = f'another {what} ("{before.get(what)}", now "{now}")'
                raise InputError(
                    f"{self.folder}: {len(done):,} pieces were made with {other}; go on with that, or add"
                    " --restart, which deletes them"
                )
        if len(current) < len(lines):
            changed = f"{len(lines) - len(current):,} of {len(lines):,} pieces"
            say(f"{self.folder}: {changed} were made from files that have changed; they are read again")
        return current

    def _verify(self, lines: list[dict[str, Any]]) -> None:
        """Keeps the lines whose pieces are whole."""
        images = sum(line["stop"] - line["start"] for line in lines)
        with ImageProgress("verifying", images) as progress:
            for line in lines:
                if self._is_whole(line):
                    line["rejected"] = {int(index): why for index, why in line["rejected"].items()}
                    self._lines[line["start"]] = line
                    self.rejected |= line["rejected"]
                progress.advance(line["stop"] - line["start"])

    def _is_a_piece(self, line: Any) -> bool:
        try:
            start, stop, rejected = line["start"], line["stop"], line["rejected"]
            aligned = 0 <= start < stop == self._stop(start) and start % self._piece_length == 0
            known = {"stamp", "sha256", "remarks"} <= line.keys()
            return aligned and known and all(start <= int(index) < stop for index in rejected)
        except (TypeError, KeyError, ValueError):  # someone has edited it
            return False

    def _is_whole(self, line: dict[str, Any]) -> bool:
        return hashlib.sha256(self._content(line["start"])).hexdigest() == line["sha256"]

    def _content(self, start: int) -> bytes:
        """The pixels of a piece, as far as they are there."""
        length = self._offset(self._stop(start)) - self._offset(start)
        return os.pread(self._images, length, self._offset(start))

    def _journal_head(self) -> dict[str, Any]:
        """How these pieces are made: pixels may differ between versions of Pillow, so none are mixed."""
        return {
            "recipe": self._source.recipe,
            "version of Pillow": metadata.version("pillow"),
            "images in a piece": self._piece_length,
            "source": self._source.name,
        }

    def _write_journal(self) -> None:
        lines = [self._journal_head(), *self._lines.values()]
        content = "".join(json.dumps(line) + "\n" for line in lines)
        replace_durably(self.folder / JOURNAL_NAME, content.encode())

    def _require_space(self) -> None:
        there = os.fstat(self._images).st_blocks * 512
        needed = self._offset(self._shape[0]) - there
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise InputError(
                f"{self._out}: needs {needed / 1e9:.3g} GB and the disk has {free / 1e9:.3g} GB left"
            )

    def _compact(self, keep: np.ndarray) -> dict[str, Any]:
        """Moves the kept images together, in their order; returns the file's entry in meta.json."""
        header = npy_header((int(keep.sum()), *self._shape[1:]), np.dtype(np.uint8))
        assert len(header) == len(self._header)  # NumPy pads it for any number of images
        digest, end = hashlib.sha256(header), len(header)
        with ImageProgress("hashing", len(keep)) as progress:
            for start in range(0, len(keep), self._piece_length):
                stop = self._stop(start)
                content = self._content(start)
                if hashlib.sha256(content).hexdigest() != self._lines[start]["sha256"]:
                    raise InputError(
                        f"{self.folder / 'images.npy'}: altered by another process; the same command reads"
                        " again what was"
                    )
                block = np.frombuffer(content, np.uint8).reshape(stop - start, -1)[keep[start:stop]]
                if end != self._offset(start) or len(block) < stop - start:
                    _write_all(self._images, block.reshape(-1).data, end)
                digest.update(block.data)
                end += block.nbytes
                progress.advance(stop - start)
        _write_all(self._images, memoryview(header), 0)
        os.ftruncate(self._images, end)
        os.fsync(self._images)
        return {"bytes": end, "sha256": digest.hexdigest()}


@contextmanager
def partial_store(out: Path, source: Source, *, restart: bool = False) -> Iterator[PartialStore]:
    """Opens the work on a store, an earlier process's or new, and locks it against a second writer.

    Args:
        out: the store to be; does not exist, or is an empty folder.
        source: of its items; what was made of files that have changed since is made again.
        restart: throw away what is there.
    Raises:
        InputError: a shape that a store cannot hold; work on another source or with another recipe; a second
            writer; a full disk, there or while the caller writes.
    """
    problem = image_shape_problem(_shape(source))
    if problem:
        raise InputError(f"images: {problem}")
    folder = out.parent / f".{out.name}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = WriterLock(folder)
    except OSError as error:
        raise InputError(f"{out}: cannot be created: {error.strerror or error}") from error
    try:
        if is_taken(out):  # since the caller looked
            raise BusyError(f"{out}: another process has just written it; run the same command again")
        is_new = not folder.exists()
        folder.mkdir(exist_ok=True)
        try:
            store = PartialStore(out, folder, lock, source, restart)
        except BaseException:
            if is_new:  # there is nothing to go on with
                shutil.rmtree(folder, ignore_errors=True)
            raise
        try:
            yield store
        finally:
            store.close()
    except OSError as error:
        raise InputError(
            f"{out}: cannot be written: {error.strerror or error}; when that is settled, the same command"
            " continues"
        ) from error
    finally:
        lock.release()


def kept_name(source: Source, rejected: int) -> str:
    """What meta.json calls the images that are left of a source."""
    return source.name + (f", without {rejected:,} of {len(source.labels):,} images" if rejected else "")


def _shape(source: Source) -> tuple[int, int, int, int]:
    """(N, H, W, C) of all items, those that will be rejected included."""
    return len(source.labels), source.resolution, source.resolution, source.image_channels


def _write_all(descriptor: int, content: memoryview, offset: int) -> None:
    """A single `pwrite` may write a part, as when the disk fills up; the next one then says why."""
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def _read_journal(path: Path) -> list[dict[str, Any]]:
    """The lines up to the first that was cut short."""
    lines: list[dict[str, Any]] = []
    content = path.read_bytes() if path.exists() else b""
    for text in content.splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _printable(text: str) -> str:
    """Without what would break a line or is no character: file names may hold any bytes."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
