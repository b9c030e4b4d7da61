"""Folders of images against the same folders read by hand: order, classes, pixels; what is wrong in them."""

import errno
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ict_fast.data.sources import folder_files
from ict_fast.data.sources.folder_files import folder_source, ilsvrc_folder_source
from ict_fast.data.sources.image_source import ImageSource
from ict_fast.errors import InputError

FOLDER = {"crop": "center-crop", "resolution": 16, "image_channels": 3}
ILSVRC = {"crop": "center-crop-dhariwal", "resolution": 16}


def draw(path: Path, value: int = 0, size: tuple[int, int] = (20, 30), kind: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, kind)


def names(source: ImageSource) -> list[str]:
    return [source.item_name(index) for index in range(len(source.labels))]


def test_subfolders_are_the_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    files = ["b/2.png", "b/10.png", "a/x.JPG", "c d/ü.webp", "b/deep/er/1.bmp"]
    for value, name in enumerate(files):
        draw(tmp_path / name, value)
    (tmp_path / "b/notes.txt").write_text("not an image")
    (tmp_path / "b/.hidden.png").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    source = folder_source(tmp_path, **FOLDER)
    assert source.classes == ["a", "b", "c d"]
    assert names(source) == ["a/x.JPG", "b/10.png", "b/2.png", "b/deep/er/1.bmp", "c d/ü.webp"]
    assert source.labels.tolist() == [0, 1, 1, 1, 2]
    assert source.labels.dtype == np.int64
    pixels, rejected = source.read(1, 4)
    assert rejected == {}
    for index, name in enumerate(names(source)[1:4]):
        with Image.open(tmp_path / name) as image:
            expected = image.crop((0, 5, 20, 25)).resize((16, 16), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(pixels[index], np.asarray(expected))


def test_images_at_the_top_have_no_classes(tmp_path: Path) -> None:
    for value, name in enumerate(["b.png", "a.png"]):
        draw(tmp_path / name, value)
    source = folder_source(tmp_path, **{**FOLDER, "image_channels": 1})
    assert (list(source.classes), source.labels.tolist(), names(source)) == ([], [0, 0], ["a.png", "b.png"])
    assert source.read(0, 2)[0].shape == (2, 16, 16, 1)
    assert source.recipe == "16x16 grey, center-crop"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("inside", ["", "a/", "a/deep/"])
def test_the_order_is_not_that_of_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str, reverse: bool
) -> None:
    def entries(folder: Path) -> list[os.DirEntry[str]]:
        return sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=reverse)

    monkeypatch.setattr(folder_files, "_entries", entries)
    for name in ("1.png", "2.png", "3.png"):
        draw(tmp_path / inside / name)
    if inside:
        draw(tmp_path / "b/0.png")
    source = folder_source(tmp_path, **FOLDER)
    assert names(source)[:3] == [f"{inside}{number}.png" for number in (1, 2, 3)]
    assert list(source.classes) == (["a", "b"] if inside else [])


def test_ilsvrc_classes_are_the_sorted_synsets(tmp_path: Path) -> None:
    for value, name in enumerate(["n01443537/n01443537_2.JPEG", "n01440764/n01440764_18.JPEG"]):
        draw(tmp_path / name, value, kind="JPEG")
    (tmp_path / "lost+found").mkdir()
    source = ilsvrc_folder_source(tmp_path, **ILSVRC)
    assert source.classes == ["n01440764", "n01443537"]
    assert names(source) == ["n01440764/n01440764_18.JPEG", "n01443537/n01443537_2.JPEG"]
    assert source.labels.tolist() == [0, 1]
    assert (source.recipe, source.image_channels) == ("16x16 RGB, center-crop-dhariwal", 3)


def test_links_are_followed_and_rings_are_not(tmp_path: Path, capsys) -> None:
    draw(tmp_path / "elsewhere/1.png")
    draw(tmp_path / "apart/2.png")
    root = tmp_path / "root"
    draw(root / "a/1.png")
    (root / "a/2.png").symlink_to(tmp_path / "elsewhere/1.png")
    (root / "a/more").symlink_to(tmp_path / "apart")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    rings = {"a/self": root / "a", "a/more/out and in": root / "a", "a/root": root, "b/root": root}
    for link, target in rings.items():
        (root / link).symlink_to(target)
    assert names(folder_source(root, **FOLDER)) == ["a/1.png", "a/2.png", "a/more/2.png", "b/1.png"]
    said = [f"{root}/{link}: passed over, a link to a folder that it lies in" for link in rings]
    assert sorted(capsys.readouterr().err.splitlines()) == sorted(said)


def test_links_that_lead_back_are_passed_over_and_said(tmp_path: Path, capsys) -> None:
    root = tmp_path / "root"
    draw(root / "a/1.png")
    (root / "self").symlink_to(".")
    (root / "up").symlink_to(tmp_path)
    (root / "ring").symlink_to("ring")  # neither a folder nor a file
    (root / "dangling").symlink_to("nowhere")
    (root / "a/ring").symlink_to("ring")
    source = folder_source(root, **FOLDER)
    assert (list(source.classes), names(source)) == (["a"], ["a/1.png"])
    said = capsys.readouterr().err.splitlines()
    assert sorted(said)[:2] == [
        f"{root}/{name}: passed over, a link to a folder that it lies in" for name in ("self", "up")
    ]
    assert said[2:] == [f"{root}: passed over 3 files that are no images by name: 3 without a suffix"]


def test_files_of_other_formats_are_counted(tmp_path: Path, capsys) -> None:
    for name in ("a/1.jfif", "a/2.jpe", "b/3.JPG"):
        draw(tmp_path / name, kind="JPEG")
    for name in ("a/4.tiff", "a/deep/5.TIFF", "b/6.avif", "b/.hidden.jp2", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    source = folder_source(tmp_path, **FOLDER)
    assert names(source) == ["a/1.jfif", "a/2.jpe", "b/3.JPG"]
    assert source.read(0, 3)[1] == {}
    counted = "passed over 4 files that are no images by name: 2 .tiff, 1 without a suffix, 1 .avif"
    assert capsys.readouterr().err == f"{tmp_path}: {counted}\n"


def test_unusable_files_are_rejected_each_with_its_reason(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    draw(tmp_path / "dot.png", size=(1, 1))
    draw(tmp_path / "wide.png", size=(30_000, 1))
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "text.jpg").write_text("<html>404</html>")
    (tmp_path / "zero.jpg").touch()
    draw(tmp_path / "cut.jpg", size=(50, 50))
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    source = folder_source(tmp_path, **{**FOLDER, "crop": "center-crop-dhariwal", "resolution": 64})
    pixels, rejected = source.read(0, len(source.labels))
    reasons = {source.item_name(index): why for index, why in rejected.items()}
    assert reasons.keys() == {
        "cut.jpg", "dangling.jpg", "folder.jpg", "pipe.jpg", "text.jpg", "wide.png", "zero.jpg"
    }  # fmt: skip
    assert reasons["cut.jpg"].startswith("cannot be decoded: image file is truncated")
    assert reasons["dangling.jpg"] == "cannot be read: No such file or directory"
    assert reasons["folder.jpg"] == reasons["pipe.jpg"] == "not a file"
    assert reasons["text.jpg"] == reasons["zero.jpg"]
    assert reasons["text.jpg"].startswith("not an image of a known format")
    assert reasons["wide.png"] == "30000x1 is too elongated for this crop"
    with Image.open(tmp_path / "dot.png") as dot:
        colour = dot.getpixel((0, 0))
    assert (pixels[names(source).index("dot.png")] == colour).all()


def test_a_file_that_may_not_be_read_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "a.png")
    source = folder_source(tmp_path, **FOLDER)

    def refuse(self: Path, *arguments: object) -> None:  # the tests may run as root, who may read all
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert source.read(0, 1)[1] == {0: "cannot be read: Permission denied"}


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENOMEM])
@pytest.mark.parametrize("call", ["open", "read", "stat"])
def test_an_error_that_passes_makes_no_bad_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    draw(tmp_path / "a.png")
    source = folder_source(tmp_path, **FOLDER)

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    file = SimpleNamespace(read=fail)
    opened = fail if call == "open" else lambda self, mode: nullcontext(file)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        if call == "stat":
            patch.setattr(Path, "stat", fail)
        with pytest.raises(OSError, match=rf"{os.strerror(code)}: '{tmp_path}/a\.png'") as caught:
            source.read(0, 1)
    assert caught.value.errno == code
    assert source.read(0, 1)[1] == {}


def test_a_folder_that_has_gone_makes_no_bad_images(tmp_path: Path) -> None:
    draw(tmp_path / "disk/a.png")
    source = folder_source(tmp_path / "disk", **FOLDER)
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    with pytest.raises(FileNotFoundError, match=r"disk/a\.png"):
        source.read(0, 1)


def test_an_error_that_passes_ends_the_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "a.png")

    def fail(path: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(folder_files.os, "stat", fail)
        with pytest.raises(InputError, match=r"a\.png: cannot be read: Input/output error"):
            folder_files._list_files(tmp_path, ["a.png"])


def test_the_identity_changes_with_whatever_changes_the_pixels(tmp_path: Path) -> None:
    draw(tmp_path / "a/1.png", 1)
    draw(tmp_path / "b/2.png", 2)
    seen = [folder_source(tmp_path, **FOLDER).identity()]
    assert folder_source(tmp_path, **FOLDER).identity() == seen[0]
    for change in ({"crop": "none"}, {"resolution": 8}, {"image_channels": 1}):
        seen.append(folder_source(tmp_path, **{**FOLDER, **change}).identity())
    draw(tmp_path / "a/3.png", 3)
    seen.append(folder_source(tmp_path, **FOLDER).identity())
    os.utime(tmp_path / "a/3.png", ns=(0, 0))
    seen.append(folder_source(tmp_path, **FOLDER).identity())
    (tmp_path / "a/3.png").write_bytes(b"x")
    os.utime(tmp_path / "a/3.png", ns=(0, 0))
    seen.append(folder_source(tmp_path, **FOLDER).identity())
    (tmp_path / "a").rename(tmp_path / "c")
    seen.append(folder_source(tmp_path, **FOLDER).identity())
    assert len(set(seen)) == len(seen)


def test_the_identity_does_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    draw(tmp_path / "here/a/1.png")
    before = folder_source(tmp_path / "here", **FOLDER).identity()
    (tmp_path / "here").rename(tmp_path / "there")
    assert folder_source(tmp_path / "there", **FOLDER).identity() == before


def test_folders_that_are_no_data_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is nothing here"):
        folder_source(tmp_path / "nowhere", **FOLDER)
    with pytest.raises(InputError, match=r"has no images \(\.jpg, "):
        folder_source(tmp_path, **FOLDER)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is not a folder"):
        folder_source(tmp_path / "file", **FOLDER)
    draw(tmp_path / "top.png")
    draw(tmp_path / "a/1.png")
    with pytest.raises(InputError, match=r"has images \(top\.png\) beside folders \(a\)"):
        folder_source(tmp_path, **FOLDER)
    (tmp_path / "top.png").unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: a class without images.*remove the folder"):
        folder_source(tmp_path, **FOLDER)


@pytest.mark.parametrize(
    "parts", [["train", "val"], ["Test", "Training", "valid"], ["train"], ["train", "test", "extra"]]
)
def test_the_parts_of_a_data_set_are_no_classes(tmp_path: Path, parts: list[str]) -> None:
    for part in parts:
        draw(tmp_path / part / "cat/1.png")
        draw(tmp_path / part / "dog/2.png")
    training = tmp_path / next(part for part in parts if part.lower().startswith("train"))
    with pytest.raises(InputError, match=rf"parts of a data set and not classes; name {training}$"):
        folder_source(tmp_path, **FOLDER)
    assert folder_source(training, **FOLDER).classes == ["cat", "dog"]


@pytest.mark.parametrize("folders", [["train", "bus"], ["train"]])
def test_a_train_is_a_class_beside_a_bus_and_where_it_holds_images(
    tmp_path: Path, folders: list[str]
) -> None:
    for folder in folders:
        draw(tmp_path / folder / "1.png")
    assert folder_source(tmp_path, **FOLDER).classes == sorted(folders)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            ["2019/cat/1", "2019/dog/2", "2020/cat/3", "2020/dog/4"],
            "{place}: its classes are the folders directly in it (2019, 2020); those in several of them"
            " (cat, dog) do not count\n",
        ),
        (["cat/images/1", "dog/images/2"], ""),
        (["cat/old/1", "cat/new/2", "dog/old/3", "dog/new/4", "dog/5"], ""),
        (["cat/old/1", "cat/new/2", "dog/red/3", "dog/blue/4"], ""),
    ],
)
def test_folders_that_look_more_like_classes_are_said(
    tmp_path: Path, files: list[str], said: str, capsys
) -> None:
    for name in files:
        draw(tmp_path / f"{name}.png")
    folder_source(tmp_path, **FOLDER)
    assert capsys.readouterr().err == said.format(place=tmp_path)


def test_ilsvrcs_folders_are_told_from_others(tmp_path: Path) -> None:
    draw(tmp_path / "train/n01440764/1.JPEG")
    with pytest.raises(InputError, match=r"has no folder named as a synset.*; .*/train has some"):
        ilsvrc_folder_source(tmp_path, **ILSVRC)
    draw(tmp_path / "kaggle/ILSVRC/Data/CLS-LOC/train/n01440764/1.JPEG")
    with pytest.raises(InputError, match=r"; .*kaggle/ILSVRC/Data/CLS-LOC/train has some"):
        ilsvrc_folder_source(tmp_path / "kaggle", **ILSVRC)
    (tmp_path / "train/n01443537").mkdir()
    with pytest.raises(InputError, match="n01443537: a class without images"):
        ilsvrc_folder_source(tmp_path / "train", **ILSVRC)
    with pytest.raises(InputError, match="there is nothing here"):
        ilsvrc_folder_source(tmp_path / "nowhere", **ILSVRC)
