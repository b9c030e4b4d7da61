"""Files of samples: what OpenAI's evaluator reads, and what writing them costs."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ict_fast.errors import InputError
from ict_fast.results import require_grid, require_room, save_samples, unfinished


def test_an_npz_of_samples_has_the_arrays_of_openais_evaluator(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    save_samples(images, list(range(20)), tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        assert np.array_equal(archive["arr_0"], images)
        assert archive["arr_1"].dtype == np.int64
        assert archive["arr_1"].tolist() == list(range(20))
    save_samples(images, None, tmp_path / "unconditional.npz")
    with np.load(tmp_path / "unconditional.npz") as archive:
        assert archive.files == ["arr_0"]


def test_an_npz_is_written_without_a_second_copy_in_memory(tmp_path: Path) -> None:
    images = np.zeros((6000, 64, 64, 3), np.uint8)  # 74 MB; numpy writes 17 MB at a time
    tracemalloc.start()
    try:
        save_samples(images, None, tmp_path / "samples.npz")
        assert tracemalloc.get_traced_memory()[1] < images.nbytes / 2
    finally:
        tracemalloc.stop()


def test_an_npz_that_cannot_be_written_whole_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "samples.npz"
    save_samples(np.zeros((2, 8, 8, 1), np.uint8), None, out)
    before = out.read_bytes()

    def full(file: object, *arrays: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(InputError, match="No space left"):
        save_samples(np.ones((2, 8, 8, 1), np.uint8), None, out)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]


def test_a_folder_of_pictures_is_flushed_once_and_no_picture_is_seen_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, flushed, done = tmp_path / "pictures", [], []
    save_samples(np.zeros((6, 8, 8, 1), np.uint8), None, out)
    monkeypatch.setattr(os, "fsync", flushed.append)
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    save_samples(images, None, out, done.append)
    assert len(flushed) == 1
    assert done == list(range(1, 21))
    assert [path.name for path in sorted(out.iterdir())] == [f"{number:06d}.png" for number in range(20)]
    for number, image in enumerate(images):
        assert np.array_equal(np.asarray(Image.open(out / f"{number:06d}.png")), image)

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left"):
        save_samples(255 - images, None, out)
    assert len(list(out.iterdir())) == 20
    assert np.array_equal(np.asarray(Image.open(out / "000000.png")), images[0])


def test_a_folder_that_was_interrupted_is_said_to_hold_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, images = tmp_path / "pictures", np.zeros((1200, 8, 8, 1), np.uint8)

    def stop(done: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_samples(images, None, out, stop)
    assert len(list(out.iterdir())) == 3
    assert capsys.readouterr().err == f"3 of 1,200 images are in {out}\n"
    monkeypatch.setattr(os, "replace", lambda source, target: os.close(-1))
    with pytest.raises(InputError, match="Bad file descriptor"):
        save_samples(images, None, tmp_path / "none")
    assert capsys.readouterr().err == "", "there is nothing to tell of"


def test_more_pixels_than_there_is_room_for_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    require_room(tmp_path / "new/a.npz", 10**6)
    require_room(tmp_path / "a.png", 10**6 + 1)  # how small it will be is not known
    with pytest.raises(InputError, match=r"of disk left for .*a\.npz; make fewer"):
        require_room(tmp_path / "new/a.npz", 10**6 + 1)
    with pytest.raises(InputError, match="of memory; make fewer"):
        require_room(tmp_path / "a.png", 10**15)


def test_a_grid_that_nothing_could_show_is_refused_and_one_file_each_is_not(tmp_path: Path) -> None:
    for count, resolution in ((100_000, 8), (50_000, 32), (15_000, 64)):
        require_grid(tmp_path / "a.png", count, resolution)
    said = r"a grid of 50,000 images of 64x64 is a picture of 14,561x14,561 pixels, .*; name a folder"
    with pytest.raises(InputError, match=said):
        require_grid(tmp_path / "a.png", 50_000, 64)
    for other in ("folder", "a.npz"):
        require_grid(tmp_path / other, 50_000, 64)
    with pytest.raises(InputError, match=r"of 65,001x1,301 pixels"):  # a column for each file that is edited
        require_grid(tmp_path / "a.png", 20_000, 64, columns=1000)


def test_two_processes_do_not_share_unfinished_work(tmp_path: Path) -> None:
    with (
        unfinished(tmp_path / "evaluation.json"),
        pytest.raises(InputError, match="another process"),
        unfinished(tmp_path / "evaluation.json"),
    ):
        pass
