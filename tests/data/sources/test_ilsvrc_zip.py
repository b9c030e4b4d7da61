"""ImageNet in a ZIP, as Kaggle gives it out, against the same files in folders."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ict_fast.data.sources.catalogue import OPTIONS as SOURCES
from ict_fast.data.sources.catalogue import open_source
from ict_fast.data.sources.folder_files import ilsvrc_folder_source
from ict_fast.data.sources.ilsvrc_zip import ilsvrc_zip_source
from ict_fast.errors import InputError

OPTIONS = {"crop": "center-crop-dhariwal", "resolution": 16}
TREE = "ILSVRC/Data/CLS-LOC"
TRAINING = ["n01443537/n01443537_2.JPEG", "n01440764/n01440764_18.JPEG", "n01440764/n01440764_10.JPEG"]


def jpeg(value: int) -> bytes:
    pixels = np.random.default_rng(value).integers(0, 256, (33, 40, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


def pack(archive: Path, members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(archive, "w", how) as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return archive


def kaggle() -> dict[str, bytes]:
    return {
        "ILSVRC/Annotations/CLS-LOC/train/n01440764/n01440764_18.xml": b"x",
        "ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_1.xml": b"x",
        f"{TREE}/test/ILSVRC2012_test_1.JPEG": jpeg(8),
        **{f"{TREE}/train/{name}": jpeg(value) for value, name in enumerate(TRAINING)},
        f"{TREE}/val/ILSVRC2012_val_1.JPEG": jpeg(9),
        "LOC_synset_mapping.txt": b"x",
    }


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_of_kaggles_archive_the_training_set_is_taken(tmp_path: Path, how: int, capsys) -> None:
    for value, name in enumerate(TRAINING):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(jpeg(value))
    archive = pack(tmp_path / "imagenet-object-localization-challenge.zip", kaggle(), how)
    given = {**dict.fromkeys(SOURCES["folder"]), "path": archive, "download": None, "resolution": 16}
    source = open_source("imagenet", given)
    said = capsys.readouterr().err.splitlines()
    folders = ilsvrc_folder_source(tmp_path / "train", **OPTIONS)
    assert source.classes == folders.classes == ["n01440764", "n01443537"]
    assert source.labels.tolist() == folders.labels.tolist() == [0, 0, 1]
    assert [source.item_name(index) for index in range(3)] == sorted(
        f"{TREE}/train/{each}" for each in TRAINING
    )
    np.testing.assert_array_equal(source.read(0, 3)[0], folders.read(0, 3)[0])
    assert (source.name, source.recipe) == (folders.name, folders.recipe)
    assert said == [
        f"{archive}: takes CLS-LOC/train only, and passed over 2 images of CLS-LOC/val and /test",
        f"{archive}: passed over 2 files that are no images by name: 1 .xml, 1 .txt",
        "ImageNet ILSVRC 2012, training set is incomplete: 3 of 1,281,167 images, 2 of 1,000 classes",
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"x/stray.JPEG": b"x"}, r"'x/stray\.JPEG' lies in no folder named as a synset"),
        ({"val/n01440764/1.JPEG": b"x"}, r"has synsets in ILSVRC/Data/CLS-LOC/train and in val"),
        ({f"{TREE}/train/n01440765/": b""}, "n01440765 is a class without images"),
        ({f"{TREE}/train/n01440765/notes.txt": b"x"}, "n01440765 is a class without images"),
        ({"../n01440764/1.JPEG": b"x"}, "leads elsewhere"),
    ],
)
def test_an_archive_whose_classes_nobody_can_tell_is_refused(
    tmp_path: Path, more: dict[str, bytes], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ilsvrc_zip_source(pack(tmp_path / "a.zip", {**kaggle(), **more}), **OPTIONS)


def test_what_is_no_such_zip_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with pytest.raises(InputError, match="cannot be read: No such file"):
        ilsvrc_zip_source(archive, **OPTIONS)
    with pytest.raises(InputError, match=r"has no images \(\.jpg, "):
        ilsvrc_zip_source(pack(archive, {f"{TREE}/val/1.JPEG": b"x"}), **OPTIONS)
    content = pack(archive, kaggle()).read_bytes()
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="not a whole ZIP"):
        ilsvrc_zip_source(archive, **OPTIONS)
