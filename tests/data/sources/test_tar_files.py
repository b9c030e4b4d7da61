"""ILSVRC's archive, built as it is distributed and as people pack it again; and archives that mean harm."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ict_fast.data.sources.folder_files import ilsvrc_folder_source
from ict_fast.data.sources.ilsvrc import training_set
from ict_fast.data.sources.tar_files import ilsvrc_tar_source
from ict_fast.errors import InputError

OPTIONS = {"crop": "center-crop-dhariwal", "resolution": 16}
SYNSETS = {"n01443537": 3, "n01440764": 2, "n15075141": 4}


def jpeg(value: int) -> bytes:
    pixels = np.random.default_rng(value).integers(0, 256, (33 + value, 40, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


def images() -> dict[str, bytes]:
    numbers = [(synset, number) for synset, count in SYNSETS.items() for number in range(count)]
    return {f"{synset}/{synset}_{number}.JPEG": jpeg(i) for i, (synset, number) in enumerate(numbers)}


def tar(
    members: dict[str, bytes] | list[tuple[str | tarfile.TarInfo, bytes]], form: int = tarfile.GNU_FORMAT
) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form) as archive:
        for member, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def nested() -> list[tuple[str, bytes]]:
    """A tar per synset, in no particular order, as ILSVRC2012_img_train.tar has them."""
    return [
        (
            f"{synset}.tar",
            tar({name.split("/")[1]: data for name, data in images().items() if name.startswith(synset)}),
        )
        for synset in SYNSETS
    ]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return tmp_path / "ILSVRC2012_img_train.tar"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("layout", ["a tar per synset", "folders", "./folders", "deep folders"])
def test_the_archive_gives_what_the_folders_give(
    tmp_path: Path, archive: Path, layout: str, form: int
) -> None:
    for name, data in images().items():
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(data)
    prefix = {"folders": "", "./folders": "./", "deep folders": f"{'x' * 80}/train/"}.get(layout)
    if prefix is None:
        archive.write_bytes(tar(nested(), form))
    else:
        folder = tarfile.TarInfo(f"{prefix}n01443537")
        folder.type = tarfile.DIRTYPE
        readme = [(folder, b""), (f"{prefix}README", b"x")]
        archive.write_bytes(tar([*readme, *((prefix + name, data) for name, data in images().items())], form))
    ours = ilsvrc_tar_source(archive, **OPTIONS)
    folders = ilsvrc_folder_source(tmp_path / "train", **OPTIONS)
    assert ours.classes == folders.classes == sorted(SYNSETS)
    assert ours.labels.tolist() == folders.labels.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert [ours.item_name(index)[-16:] for index in range(9)] == [
        folders.item_name(index)[-16:] for index in range(9)
    ]
    assert [ours.files.read(index) for index in range(9)] == [
        images()[folders.item_name(i)] for i in range(9)
    ]
    np.testing.assert_array_equal(ours.read(0, 9)[0], folders.read(0, 9)[0])
    assert ours.read(0, 9)[1] == {}
    assert (ours.name, ours.recipe) == (folders.name, folders.recipe)


def test_a_bad_image_is_rejected_and_not_the_archive(archive: Path) -> None:
    archive.write_bytes(tar({"n01440764/a.JPEG": jpeg(0), "n01440764/b.JPEG": b"<html>"}))
    rejected = ilsvrc_tar_source(archive, **OPTIONS).read(0, 2)[1]
    assert list(rejected) == [1]
    assert "not an image" in rejected[1]


@pytest.mark.parametrize(
    ("first", "second", "places"),
    [
        ("train/n01440764/a.JPEG", "val/n01440764/b.JPEG", "train and in val"),
        ("n01440764/a.JPEG", "val/n01443537/b.JPEG", r"\. and in val"),
        ("x/train/n01440764.tar", "x/val/n01443537/b.JPEG", "x/train and in x/val"),
        ("train/n01440764/n01440764/a.JPEG", "n01443537/b.JPEG", r"train and in \."),
    ],
)
def test_a_training_and_a_validation_set_are_not_mixed(
    archive: Path, first: str, second: str, places: str
) -> None:
    content = tar({"a.JPEG": jpeg(0)}) if first.endswith(".tar") else jpeg(0)
    archive.write_bytes(tar({first: content, second: jpeg(1)}))
    with pytest.raises(InputError, match=f"has synsets in {places}, as of a training and a validation set"):
        ilsvrc_tar_source(archive, **OPTIONS)


def test_of_kaggles_tree_the_training_set_is_taken(archive: Path, capsys) -> None:
    tree = "ILSVRC/Data/CLS-LOC"
    members = {
        "ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_1.xml": b"x",
        f"{tree}/test/ILSVRC2012_test_1.JPEG": jpeg(0),
        **{f"{tree}/train/{name}": data for name, data in images().items()},
        f"{tree}/val/ILSVRC2012_val_1.JPEG": jpeg(1),
        f"{tree}/val/n09999999/ILSVRC2012_val_2.JPEG": jpeg(2),  # as some people sort it
    }
    archive.write_bytes(tar(members))
    source = ilsvrc_tar_source(archive, **OPTIONS)
    assert source.classes == sorted(SYNSETS)
    assert list(source.files.names) == sorted(f"{tree}/train/{name}" for name in images())
    said = "takes CLS-LOC/train only, and passed over 3 images of CLS-LOC/val and /test"
    assert f"{archive}: {said}\n" in capsys.readouterr().err


def test_what_is_passed_over_and_what_is_missing_is_said(archive: Path, capsys) -> None:
    members = {"n01440764/a.JPEG": jpeg(0), "n01440764/b.tiff": b"x", "README": b"x", ".hidden": b"x"}
    archive.write_bytes(tar(members))
    name = "ImageNet ILSVRC 2012, training set"
    incomplete = "incomplete: 1 of 1,281,167 images, 1 of 1,000 classes"
    assert ilsvrc_tar_source(archive, **OPTIONS).name == f"{name} ({incomplete})"
    assert capsys.readouterr().err.splitlines() == [
        f"{archive}: passed over 2 files that are no images by name: 1 .tiff, 1 without a suffix",
        f"{name} is {incomplete}",
    ]


def test_the_whole_training_set_is_called_so(capsys) -> None:
    assert training_set(1_281_167, 1_000) == "ImageNet ILSVRC 2012, training set"
    assert capsys.readouterr().err == ""
    assert "(not the published one: 1,281,168 of" in training_set(1_281_168, 1_000)


def hostile(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


LEADS_AWAY = [
    (hostile("/etc/n01440764/x.JPEG"), "'/etc/n01440764/x.JPEG'.* leads elsewhere"),
    (hostile("n01440764/../../x.JPEG"), "x.JPEG'.* leads elsewhere"),
    (hostile("../n01440764.tar"), r"'\.\./n01440764\.tar'.* leads elsewhere"),
    (hostile("n01440764/x.JPEG", tarfile.SYMTYPE, "/etc/passwd"), "x.JPEG'.* is not a plain file"),
    (hostile("n01440764/x.JPEG", tarfile.LNKTYPE, "n01440764/a.JPEG"), "x.JPEG'.* is not a plain file"),
    (hostile("n01440764/x.JPEG", tarfile.FIFOTYPE), "x.JPEG'.* is not a plain file"),
    (hostile("n01440764/x.JPEG", tarfile.CHRTYPE), "x.JPEG'.* is not a plain file"),
]
AMBIGUOUS = [
    (hostile("n01440764/a.JPEG"), "has the member n01440764/a.JPEG twice"),
    (hostile("./n01440764/a.JPEG"), "has the member n01440764/a.JPEG twice"),
    (hostile("stray.JPEG"), "'stray.JPEG' lies in no folder named as a synset"),
]


@pytest.mark.parametrize(
    ("member", "message", "inside"),
    [
        *((member, message, False) for member, message in LEADS_AWAY + AMBIGUOUS),
        *((member, message, True) for member, message in LEADS_AWAY),
    ],
)
def test_an_archive_that_means_harm_is_refused_by_the_members_name(
    archive: Path, member: tarfile.TarInfo, message: str, inside: bool
) -> None:
    content = tar([("n01440764/a.JPEG", jpeg(0)), (member, b""), ("n01440764/z.JPEG", jpeg(1))])
    archive.write_bytes(tar({"n01440764.tar": content}) if inside else content)
    with pytest.raises(InputError, match=message) as caught:
        ilsvrc_tar_source(archive, **OPTIONS)
    assert str(archive) in str(caught.value)


def test_a_synset_that_comes_twice_or_without_images_is_refused(archive: Path) -> None:
    one = ("n01440764.tar", tar({"a.JPEG": jpeg(0)}))
    archive.write_bytes(tar([one, ("n01440764.tar", tar({"b.JPEG": jpeg(1)}))]))
    with pytest.raises(InputError, match=r"has n01440764\.tar twice"):
        ilsvrc_tar_source(archive, **OPTIONS)
    archive.write_bytes(tar([one, ("n01443537.tar", tar({}))]))
    with pytest.raises(InputError, match=r"n01443537\.tar is a class without images"):
        ilsvrc_tar_source(archive, **OPTIONS)
    archive.write_bytes(tar({"README": b"x"}))
    with pytest.raises(InputError, match="has no images"):
        ilsvrc_tar_source(archive, **OPTIONS)


@pytest.mark.parametrize("empty", ["n01443537", "train/n01443537/README", "n01443537/.a.JPEG"])
def test_a_folder_without_images_is_refused_and_does_not_shift_the_classes(archive: Path, empty: str) -> None:
    folder = tarfile.TarInfo("n01443537")
    folder.type = tarfile.DIRTYPE
    first, last = ("n01440764/a.JPEG", jpeg(0)), ("n15075141/a.JPEG", jpeg(1))
    hollow = [(folder, b"")] if "/" not in empty else [(folder, b""), (empty, jpeg(2))]
    archive.write_bytes(tar([first, *hollow, last]))
    with pytest.raises(InputError, match="n01443537 is a class without images"):
        ilsvrc_tar_source(archive, **OPTIONS)
    archive.write_bytes(tar([first, (folder, b""), ("n01443537/n01443537.tar", tar({"b.JPEG": jpeg(3)}))]))
    assert list(ilsvrc_tar_source(archive, **OPTIONS).classes) == ["n01440764", "n01443537"]


def test_hidden_folders_are_passed_over_as_they_are_in_a_folder(archive: Path) -> None:
    hidden = {".trash/n15075141/a.JPEG": jpeg(1), "n01440764/.thumbs/a.JPEG": jpeg(2)}
    archive.write_bytes(tar({"./n01440764/a.JPEG": jpeg(0), **hidden}))
    source = ilsvrc_tar_source(archive, **OPTIONS)
    assert list(source.files.names) == ["n01440764/a.JPEG"]
    assert list(source.classes) == ["n01440764"]


@pytest.mark.parametrize("layout", ["nested", "folders"])
def test_an_archive_cut_anywhere_is_refused(archive: Path, layout: str) -> None:
    content = tar(nested() if layout == "nested" else images())
    end = len(content.rstrip(b"\0"))  # of the last image, but for its own zeros
    for kept in (0, 100, 512, 700, 1024, 2048, len(content) // 2, end - 1, end // 512 * 512):
        archive.write_bytes(content[:kept])
        with pytest.raises(
            InputError, match=r"not a whole tar|damaged or truncated|beyond its end|get it again"
        ):
            ilsvrc_tar_source(archive, **OPTIONS)


@pytest.mark.parametrize("layout", ["nested", "folders"])
def test_a_damaged_header_is_noticed(archive: Path, layout: str) -> None:
    content = bytearray(tar(nested() if layout == "nested" else images()))
    place = content.rindex(b"n15075141_3.JPEG")
    content[place] ^= 1  # its checksum is then wrong, and tarfile would take it for the end
    archive.write_bytes(content)
    with pytest.raises(InputError, match="damaged or truncated at byte"):
        ilsvrc_tar_source(archive, **OPTIONS)


def test_a_negative_size_does_not_lead_around_for_ever(archive: Path) -> None:
    content = bytearray(tar(images()))
    header = content.index(b"n01443537/n01443537_1.JPEG")
    content[header + 124 : header + 136] = (-4096).to_bytes(12, "big", signed=True)
    content[header + 148 : header + 156] = b" " * 8
    content[header + 148 : header + 156] = b"%06o\0 " % sum(content[header : header + 512])
    archive.write_bytes(content)
    with pytest.raises(InputError, match=r"damaged|not a whole tar"):
        ilsvrc_tar_source(archive, **OPTIONS)


def test_members_beyond_the_end_of_a_synsets_archive_are_refused(archive: Path) -> None:
    content = bytearray(tar(nested()))
    header = content.index(b"n01443537.tar")
    content[header + 124 : header + 136] = b"%011o\0" % 512
    content[header + 148 : header + 156] = b" " * 8
    content[header + 148 : header + 156] = b"%06o\0 " % sum(content[header : header + 512])
    archive.write_bytes(content)
    with pytest.raises(InputError, match=r"n01443537\.tar has members beyond its end"):
        ilsvrc_tar_source(archive, **OPTIONS)


def test_what_is_no_plain_tar_is_refused(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        ilsvrc_tar_source(archive, **OPTIONS)
    with tarfile.open(archive, "w:gz") as packed:
        packed.addfile(tarfile.TarInfo("n01440764/a.JPEG"))
    with pytest.raises(
        InputError, match=r"compressed by gzip, and read in place: decompress it first \(gzip -dk\)"
    ):
        ilsvrc_tar_source(archive, **OPTIONS)
    for mode in ("bz2", "xz"):
        with tarfile.open(archive, f"w:{mode}"):
            pass
        with pytest.raises(InputError, match=rf"compressed by {mode.replace('bz2', 'bzip2')}, "):
            ilsvrc_tar_source(archive, **OPTIONS)
    archive.write_bytes(jpeg(0))
    with pytest.raises(InputError, match="not a whole tar"):
        ilsvrc_tar_source(archive, **OPTIONS)


def test_a_folder_may_be_called_as_what_is_compressed_begins(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar"
    archive.write_bytes(tar({"BZhang/n01440764/a.JPEG": jpeg(0)}))
    assert ilsvrc_tar_source(archive, **OPTIONS).classes == ["n01440764"]


def test_the_identity_is_that_of_the_members(archive: Path) -> None:
    archive.write_bytes(tar(images()))
    first = ilsvrc_tar_source(archive, **OPTIONS)
    assert ilsvrc_tar_source(archive, **OPTIONS).identity() == first.identity()
    assert ilsvrc_tar_source(archive, **{**OPTIONS, "resolution": 8}).identity() != first.identity()
    archive.write_bytes(tar({**images(), "n01440764/more.JPEG": b"x"}))
    assert ilsvrc_tar_source(archive, **OPTIONS).identity() != first.identity()
