"""`ict-fast edit`: from picture files to picture files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ict_fast.cli import main


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two grey pictures of 8x8, one of 4x4, one 8 wide and 4 high, masks of all kinds, and a text."""
    random = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / f"in/{name}.png")
    Image.fromarray(random.integers(0, 256, (4, 4), dtype=np.uint8)).save(tmp_path / "small.png")
    Image.fromarray(random.integers(0, 256, (4, 8), dtype=np.uint8)).save(tmp_path / "wide.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 6:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "text.png").write_text("not a picture")
    for name, colour in (("black", 0), ("white", 255)):
        Image.new("L", (8, 8), colour).save(tmp_path / f"{name}.png")
    # Black where it is seen, and white beneath what is not, as drawing programs leave it.
    seen = Image.fromarray(mask)
    Image.merge("LA", (seen, Image.fromarray(255 - mask))).save(tmp_path / "drawn.png")
    Image.fromarray(mask // 255).convert("P").save(tmp_path / "palette.png", transparency=1)
    Image.merge("RGBA", (seen, seen, seen, Image.new("L", (8, 8), 255))).save(tmp_path / "opaque.png")
    return tmp_path


def _edit(trained: Path, folder: Path, words: str) -> int:
    return main(
        ["edit", *[word.replace("RUN", str(trained)).replace("IN", str(folder)) for word in words.split()]]
    )


@pytest.mark.parametrize("mask", ["mask.png", "opaque.png"])
def test_variants_of_every_picture_keep_what_the_mask_shows(trained: Path, pictures: Path, mask: str) -> None:
    words = f"inpaint RUN --input IN/in --mask IN/{mask} --variants 2 --steps 3 --out IN/edited.npz"
    assert _edit(trained, pictures, words) == 0
    edited = np.load(pictures / "edited.npz")["arr_0"]
    assert edited.shape == (4, 8, 8, 1)
    for number, image in enumerate(edited):
        given = np.asarray(Image.open(pictures / f"in/{'ab'[number % 2]}.png"))
        np.testing.assert_array_equal(image[:, :6, 0], given[:, :6])
    assert (edited[0] != edited[2]).any(), "the variants are the same"


@pytest.mark.parametrize(
    ("words", "columns", "rows"),
    [
        ("inpaint RUN --input IN/in/a.png IN/in/b.png --mask left --steps 2", 2, 2),
        ("upscale RUN --input IN/small.png --steps 2 --variants 3", 1, 4),
        ("stroke RUN --input IN/in --sigma 2", 2, 2),
    ],
)
def test_a_grid_has_what_was_given_on_top(
    trained: Path, pictures: Path, words: str, columns: int, rows: int
) -> None:
    assert _edit(trained, pictures, f"{words} --out IN/grid.png") == 0
    grid = np.asarray(Image.open(pictures / "grid.png"))
    tile = 9 * 6  # 8 pixels and a border of 1, six times enlarged
    assert grid.shape == (rows * tile + 6, columns * tile + 6)
    top = grid[6 : 6 + 48 : 6, 6 : 6 + 48 : 6]
    name = "small.png" if "upscale" in words else "in/a.png"
    given = np.asarray(Image.open(pictures / name))
    if "upscale" in words:
        given = given.repeat(2, 0).repeat(2, 1)
    if "left" in words:
        given = np.where(np.arange(8) < 4, 128, given)
    np.testing.assert_array_equal(top, given)


def test_a_folder_gets_a_picture_each(trained: Path, pictures: Path, capsys: pytest.CaptureFixture) -> None:
    assert _edit(trained, pictures, "stroke RUN --input IN/in/a.png --out IN/out") == 0
    assert capsys.readouterr().out == f"stroke: 1 image, 1 of each: {pictures}/out\n"
    assert _edit(trained, pictures, "stroke RUN --input IN/in --out IN/out") == 0
    assert sorted(path.name for path in (pictures / "out").iterdir()) == ["000000.png", "000001.png"]


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ("stroke IN --input IN/numbered --out IN/numbered", "numbered/000001.png"),
        ("stroke IN --input IN/numbered/000001.png --out IN/other/../numbered", "numbered/000001.png"),
        ("stroke IN --input IN/in --out IN/in/a.png", "in/a.png"),
        ("stroke IN --input IN/link.png --out IN/in/a.png", "link.png"),
        ("stroke IN --input IN/link.png --out IN/link.png", "link.png"),
        ("inpaint IN --input IN/in --mask IN/mask.png --out IN/mask.png", "mask.png"),
    ],
)
def test_what_is_read_is_never_overwritten(
    pictures: Path, capsys: pytest.CaptureFixture, words: str, lost: str
) -> None:
    for name in ("numbered", "other"):
        (pictures / name).mkdir()
    (pictures / "in/b.png").rename(pictures / "numbered/000001.png")
    (pictures / "link.png").symlink_to(pictures / "in/a.png")
    variants = " --variants 2" if "numbered" in words else ""
    assert _edit(pictures, pictures, words + variants) == 2  # before the model is looked for: there is none
    assert f"which would overwrite {pictures / lost}; choose another place" in capsys.readouterr().err


def test_a_folder_gives_every_image_that_prepare_would_take(trained: Path, pictures: Path) -> None:
    for name in ("c.jfif", "d.JPE"):
        shutil.copy(pictures / "in/a.png", pictures / "in" / name)
    # And nothing that is no file, though it is named like an image.
    (pictures / "in/folder.png").mkdir()
    (pictures / "in/gone.png").symlink_to("nothing.png")
    os.mkfifo(pictures / "in/pipe.png")
    words = "stroke RUN --input IN/in --sigma 2 --steps 1 --out IN/edited.npz"
    assert _edit(trained, pictures, words) == 0
    assert len(np.load(pictures / "edited.npz")["arr_0"]) == 4


def test_no_image_is_read_that_prepare_would_find_too_large(
    trained: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("ict_fast.data.sources.folder_files.MAX_ENCODED_BYTES", 10)
    assert _edit(trained, pictures, "stroke RUN --input IN/in/a.png --out IN/edited.png") == 2
    assert f"{pictures}/in/a.png: a file of more than 10 bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("inpaint RUN --input IN/in", "inpaint needs --mask"),
        ("stroke RUN --input IN/in --mask left", "stroke takes no --mask"),
        ("inpaint RUN --input IN/in --mask lft", 'did you mean "left"'),
        ("inpaint RUN --input IN/in --mask IN/small.png", "4x4; the model makes 8x8"),
        ("inpaint RUN --input IN/in --mask IN/drawn.png", "IN/drawn.png: has transparent pixels"),
        ("inpaint RUN --input IN/in --mask IN/palette.png", "IN/palette.png: has transparent pixels"),
        ("inpaint RUN --input IN/in --mask IN/black.png", "IN/black.png: has no white pixel"),
        ("inpaint RUN --input IN/in --mask IN/white.png", "IN/white.png: is white everywhere"),
        ("inpaint RUN --input IN/text.png --mask left", "not an image"),
        ("inpaint RUN --input IN/nothing.png --mask left", "does not exist"),
        ("stroke RUN --input IN/pipe.png", "--input IN/pipe.png: is no file"),
        ("stroke RUN --input IN/in/a.png IN/small.png", "images of one size"),
        ("stroke RUN --input IN/small.png", "IN/small.png: 4x4; the model makes 8x8"),
        ("stroke RUN --input IN/wide.png", "IN/wide.png: 8x4; the model makes 8x8"),
        ("upscale RUN --input IN/wide.png", "images of 8x4; this model makes 8x8"),
        ("stroke RUN --input IN/in --variants 1000000000000", "of memory; make fewer at a time"),
        ("upscale RUN --input IN/in", "square images that are smaller by a whole factor, such as 4x4"),
        ("upscale RUN --input IN/small.png --sigma 3", "--sigma belongs to stroke"),
        ("colorize RUN --input IN/in", "grey images"),
        ("stroke RUN --input IN/in --labels 1", "unconditional"),
        ("stroke RUN --input IN/in --labels 99999999999999999999", "which is no class; classes are counted"),
        ("stroke RUN --input IN/in --variants 0", "--variants is 0"),
        ("stroke IN/nowhere --input IN/in", "there is no run"),
        ("paint RUN --input IN/in", 'did you mean "inpaint"'),
    ],
)
def test_what_cannot_be_edited_is_one_line(
    trained: Path, pictures: Path, capsys: pytest.CaptureFixture, words: str, reason: str
) -> None:
    os.mkfifo(pictures / "pipe.png")  # which would be waited for
    assert _edit(trained, pictures, f"{words} --out IN/edited.png") == 2
    error = capsys.readouterr().err
    assert reason.replace("IN", str(pictures)) in error
    assert error.count("\n") == 1
    assert not (pictures / "edited.png").exists()
