"""A packed folder gives what the folder gives; damaged and hostile archives are refused."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ict_fast.data.sources.archives import archive_source
from ict_fast.data.sources.folder_files import folder_source
from ict_fast.errors import InputError

OPTIONS = {"crop": "center-crop", "resolution": 16, "image_channels": 3}
NAMES = ["b/2.png", "b/10.jpg", "a/x.PNG", "c d/ü.webp", "b/deep/er/1.bmp"]
KINDS = ["tar", "stored", "deflated"]


def image(value: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(value).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def pack(path: Path, kind: str, members: dict[str, bytes]) -> Path:
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    else:
        with zipfile.ZipFile(
            path, "w", zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED
        ) as zipped:
            for name, content in members.items():
                zipped.writestr(name, content)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["", "photos/", "deep/er/photos/"])
@pytest.mark.parametrize("names", [NAMES, ["2.png", "1.png"]])
def test_an_archive_gives_what_the_folder_gives(
    tmp_path: Path, kind: str, prefix: str, names: list[str], capsys
) -> None:
    members = {name: image(number) for number, name in enumerate(names)}
    for name, content in members.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(content)
    others = {"__MACOSX/._1.png": b"x", "README": b"x", f"{prefix}.hidden/1.png": b"x"}
    packed = {prefix + name: content for name, content in members.items()}
    ours = archive_source(pack(tmp_path / "a", kind, {**others, **packed}), **OPTIONS)
    assert "a: passed over 1 files that are no images by name: 1 without a suffix" in capsys.readouterr().err
    folder = folder_source(tmp_path / "root", **OPTIONS)
    count = len(names)
    assert list(ours.classes) == list(folder.classes)
    assert ours.labels.tolist() == folder.labels.tolist()
    assert ours.labels.dtype == np.int64
    assert [ours.item_name(i) for i in range(count)] == [prefix + folder.item_name(i) for i in range(count)]
    for index, pixels in enumerate(folder.read(0, count)[0]):
        np.testing.assert_array_equal(ours.read(index, index + 1)[0][0], pixels)
    assert ours.recipe == folder.recipe


@pytest.mark.parametrize("kind", ["stored", "deflated"])
def test_backslashes_of_windows_separate_folders_in_a_zip(tmp_path: Path, kind: str) -> None:
    members = {"set/": b"", "set/b/": b"", **{f"set/{name}": image(i) for i, name in enumerate(NAMES)}}
    usual = archive_source(pack(tmp_path / "usual", kind, members), **OPTIONS)
    other = {name.replace("/", "\\"): content for name, content in members.items()}
    windows = archive_source(pack(tmp_path / "windows", kind, other), **OPTIONS)
    assert list(windows.classes) == list(usual.classes) == ["a", "b", "c d"]
    assert windows.labels.tolist() == usual.labels.tolist()
    assert [windows.item_name(i) for i in range(5)] == [usual.item_name(i) for i in range(5)]
    pixels, rejected = windows.read(0, 5)
    np.testing.assert_array_equal(pixels, usual.read(0, 5)[0])
    assert rejected == {}
    hostile = pack(tmp_path / "hostile", kind, {"1.png": image(0), "..\\2.png": image(1)})
    with pytest.raises(InputError, match=r"'\.\./2\.png' leads elsewhere"):
        archive_source(hostile, **OPTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_is_rejected_and_not_the_archive(tmp_path: Path, kind: str) -> None:
    source = archive_source(pack(tmp_path / "a", kind, {"1.png": b"<html>", "2.png": image(0)}), **OPTIONS)
    assert list(source.read(0, 2)[1]) == [0]


@pytest.mark.parametrize("kind", ["stored", "deflated"])
def test_damage_in_a_member_is_noticed(tmp_path: Path, kind: str) -> None:
    content = bytearray(pack(tmp_path / "a", kind, {"1.png": image(1), "2.png": image(0)}).read_bytes())
    content[200] ^= 1
    (tmp_path / "a").write_bytes(content)
    assert archive_source(tmp_path / "a", **OPTIONS).read(0, 2)[1] == {
        0: "damaged: not what the archive's checksum says"
    }


def test_a_member_that_unpacks_to_more_than_it_says_is_cut_there(tmp_path: Path) -> None:
    content = bytearray(pack(tmp_path / "a", "deflated", {"1.png": bytes(10**7)}).read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = (100).to_bytes(4, "little")
    (tmp_path / "a").write_bytes(content)
    assert archive_source(tmp_path / "a", **OPTIONS).read(0, 1)[1] == {
        0: "damaged: not what the archive's checksum says"
    }


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_that_is_no_folder_of_images_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        archive_source(tmp_path / "a", **OPTIONS)
    pack(tmp_path / "a", kind, {"README": b"x"})
    with pytest.raises(InputError, match=r"has no images \(\.jpg, "):
        archive_source(tmp_path / "a", **OPTIONS)
    pack(tmp_path / "a", kind, {"top.png": image(0), "cats/1.png": image(1)})
    with pytest.raises(InputError, match=r"has images \(top\.png\) beside folders \(cats\)"):
        archive_source(tmp_path / "a", **OPTIONS)
    pack(tmp_path / "a", kind, {"1.png": image(0), "../2.png": image(1)})
    with pytest.raises(InputError, match=r"'\.\./2\.png' leads elsewhere"):
        archive_source(tmp_path / "a", **OPTIONS)
    content = pack(tmp_path / "a", kind, {"1.png": image(0), "2.png": image(1)}).read_bytes()
    (tmp_path / "a").write_bytes(content[: len(content) // 2 if kind != "tar" else 1700])
    with pytest.raises(InputError, match=r"get it again|decompress it first"):
        archive_source(tmp_path / "a", **OPTIONS)


def test_a_member_twice_and_a_compressed_tar_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a", "w") as archive:
        for name in ("1.png", "./1.png"):
            archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(InputError, match=r"has the member 1\.png twice"):
        archive_source(tmp_path / "a", **OPTIONS)
    with tarfile.open(tmp_path / "a", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("1.png"))
    with pytest.raises(
        InputError, match=r"compressed by gzip, and read in place: decompress it first \(gzip -dk\)"
    ):
        archive_source(tmp_path / "a", **OPTIONS)
    with zipfile.ZipFile(tmp_path / "a", "w", zipfile.ZIP_LZMA) as zipped:
        zipped.writestr("1.png", image(0))
    with pytest.raises(InputError, match=r"1\.png is neither stored nor deflated"):
        archive_source(tmp_path / "a", **OPTIONS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["", "imagenette2/"])
def test_the_parts_of_a_data_set_are_no_classes(tmp_path: Path, kind: str, prefix: str) -> None:
    names = [f"{prefix}{part}/{each}/1.png" for part in ("train", "val") for each in ("cat", "dog")]
    both = pack(tmp_path / "a", kind, dict.fromkeys(names, image(0)))
    with pytest.raises(InputError, match=rf"has train, val, which are parts .*; pack {prefix}train alone"):
        archive_source(both, **OPTIONS)
    one = pack(tmp_path / "b", kind, dict.fromkeys(names[:2], image(0)))
    assert archive_source(one, **OPTIONS).classes == ["cat", "dog"]


@pytest.mark.parametrize("kind", KINDS)
def test_who_has_imagenet_of_kaggle_is_sent_to_its_own_source(tmp_path: Path, kind: str) -> None:
    tree = "ILSVRC/Data/CLS-LOC"
    names = [f"{tree}/train/n01440764/1.JPEG", f"{tree}/val/1.JPEG", f"{tree}/test/1.JPEG"]
    with pytest.raises(InputError, match=r"has test, train, val, .*; `ict-fast prepare imagenet` takes it"):
        archive_source(pack(tmp_path / "a", kind, dict.fromkeys(names, image(0))), **OPTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_folders_that_look_more_like_classes_are_said(tmp_path: Path, kind: str, capsys) -> None:
    names = [f"photos/{year}/{each}/1.png" for year in (2019, 2020) for each in ("cat", "dog")]
    archive_source(pack(tmp_path / "a", kind, dict.fromkeys(names, image(0))), **OPTIONS)
    assert (
        "directly in it (2019, 2020); those in several of them (cat, dog) do not" in capsys.readouterr().err
    )
