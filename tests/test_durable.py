"""What is renamed to its place is on the disk before, and its name there is after: a power cut in between
leaves what was there, whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ict_fast.checkpoint import write_checkpoint
from ict_fast.data.prepare import prepare_store
from ict_fast.data.sources.folder_files import folder_source
from ict_fast.data.store import write_store
from ict_fast.durable import replace_durably
from ict_fast.interop.export import write_folder


class Disk:
    """Keeps account of what a power cut would take. Nothing is really flushed.

    Attributes:
        lost: what was renamed before it had been flushed.
        owed: folders in which a rename would not last.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.lost: list[str] = []
        self.owed: set[str] = set()
        self._flushed: set[str] = set()
        replace = os.replace

        def flush(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self._flushed.add(path)
            self.owed.discard(path)

        def writing(call: Callable) -> Callable:
            def written(descriptor: int, *arguments: object) -> object:
                self._flushed.discard(os.readlink(f"/proc/self/fd/{descriptor}"))
                return call(descriptor, *arguments)

            return written

        def rename(source: Path, target: Path) -> None:
            here = [Path(source), *Path(source).rglob("*")]
            self.lost += [str(path) for path in here if str(path) not in self._flushed]
            replace(source, target)
            if str(source) in self._flushed:
                self._flushed.add(str(target))
            self.owed.add(str(Path(target).parent))

        for name, stand_in in (
            *((name, flush) for name in ("fsync", "fdatasync")),
            *((name, writing(getattr(os, name))) for name in ("pwrite", "ftruncate")),
            ("replace", rename),
        ):
            patch.setattr(os, name, stand_in)


def _prepared(folder: Path) -> None:
    """A store of pictures, of which the first cannot be used: the others move together at the end."""
    (folder / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8)).save(folder / f"pictures/{number}.png")
    (folder / "pictures/0.png").write_text("bad")
    source = folder_source(folder / "pictures", crop="center-crop", resolution=8, image_channels=3)
    prepare_store(source, folder / "a", processes=1, max_rejected=0.5)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a file": lambda folder: replace_durably(folder / "a", b"content"),
    "a store": lambda folder: write_store(
        folder / "a", np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, int), source="s", recipe="r", classes=[]
    ),
    "a store of pictures": _prepared,
    "a checkpoint": lambda folder: write_checkpoint(folder, 1, {"ema": {"a": torch.ones(3)}}, {}, keep=2),
    "an export": lambda folder: write_folder(folder / "a", {"weights": b"content", "unet/config": b"text"}),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_is_renamed_is_on_the_disk_and_its_name_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        WRITERS[writer](tmp_path)
    assert disk.lost == []
    assert disk.owed == set()
