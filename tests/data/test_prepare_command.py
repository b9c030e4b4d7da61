"""`ict-fast prepare` as it is typed: what each source takes and refuses, and what is then on the disk."""

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ict_fast
from ict_fast.cli import main
from ict_fast.data.sources import array_sources, download
from ict_fast.data.sources.crops import CROPS
from ict_fast.data.store import open_store

REPOSITORY = Path(ict_fast.__file__).parents[1]
RANDOM = np.random.default_rng(8)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], words: str) -> str:
    assert main(words.split()) == 2
    out, error = capsys.readouterr()
    assert out == ""
    *progress, line = error.splitlines()
    assert not any("error" in each for each in progress)
    assert line.startswith("ict-fast: error: ")
    return line.removeprefix("ict-fast: error: ")


def draw(path: Path, size: tuple[int, int] = (150, 131)) -> Image.Image:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RANDOM.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    with Image.open(path) as image:
        return image.convert("RGB")


def dhariwal(image: Image.Image, side: int) -> np.ndarray:
    """The recipe for an image whose short side is 131, at 64 pixels, step by step."""
    assert (image.size, side) == ((150, 131), 64)
    halved = image.resize((75, 65), Image.Resampling.BOX)
    return np.asarray(halved.resize((74, 64), Image.Resampling.BICUBIC).crop((5, 0, 69, 64)))


# ----------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("digits x", 'prepare digits does not take PATH, which is "x"; it takes --out'),
        ("digits --processes 2", "prepare digits does not take --processes; it takes --out"),
        ("cifar10 x --crop none", "prepare cifar10 does not take --crop; it takes PATH, --processes,"),
        ("digits --restart", "prepare digits does not take --restart; it takes --out"),
        (
            "imagenet x --channels 1",
            "prepare imagenet does not take --channels; it takes PATH, --resolution,",
        ),
        ("imagenet x --download", "prepare imagenet does not take --download;"),
        ("imagenet-npz x --resolution 64", "prepare imagenet-npz does not take --resolution;"),
        (
            "edm-zip x --resolution 64",
            "prepare edm-zip does not take --resolution; it takes PATH, --processes,",
        ),
        ("imagenet", "prepare imagenet needs PATH, the archive or folder with the images"),
        ("cifar10", "prepare cifar10 needs PATH, the archive or folder with the images, or --download"),
        ("folder x", "prepare folder needs --resolution N, height and width of the images to make"),
        ("parquet x", "prepare parquet needs --resolution N, height and width of the images to make"),
        ("folder x --label-column y", "prepare folder does not take --label-column; it takes PATH,"),
        ("parquet nowhere --resolution 8", "nowhere: there is nothing here"),
        ("folder x --resolution 0", "--resolution is 0; it must be at least 1"),
        ("folder x --resolution big", "--resolution big: expected an integer"),
        ("imagenet x --processes 0", "--processes is 0; it must be at least 1"),
        ("imagenet x --max-rejected 1.5", "--max-rejected is 1.5; it must be a share, from 0 to 1"),
        ("imagenet x --max-rejected nan", "--max-rejected is nan; it must be a share, from 0 to 1"),
        ("imagenet x --crop centre-crop", '--crop "centre-crop"; did you mean "center-crop"?'),
        ("folder x --resolution 8 --channels 4", "--channels is 4; it must be 1 (grey) or 3 (RGB)"),
        ("folder x --resolution 8 --out x/y", "--out is x/y, inside the folder of the images;"),
        ("imagenets x", 'ict-fast prepare "imagenets"; did you mean "imagenet"?'),
        ("folder nowhere --resolution 8", "nowhere: there is nothing here"),
        ("imagenet nowhere", "nowhere: there is nothing here"),
        ("edm-zip nowhere", "nowhere: cannot be read: No such file or directory"),
    ],
)
def test_bad_input_is_refused_in_one_line(capsys, tmp_path: Path, words: str, said: str) -> None:
    assert refused(capsys, f"prepare {words}").startswith(said)
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_crop_and_imports_no_arrays(capsys) -> None:
    assert main(["prepare", "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"--crop {{{','.join(CROPS)}}}" in shown
    program = (
        "import sys; from ict_fast.cli import main; main(['prepare', '--help']); main(['prepare', 'folder']);"
        "sys.exit(bool({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0


# ----------------------------------------------------------------------------- what is made


def test_folders_of_synsets_become_imagenet_at_64_pixels(capsys) -> None:
    synsets = ["n15075141", "n01440764"]
    drawn = {
        synset: [draw(Path(f"train/{synset}/{synset}_{i}.JPEG")) for i in range(2)] for synset in synsets
    }
    assert main(["prepare", "imagenet", "train", "--processes", "1"]) == 0
    said, complained = capsys.readouterr()
    holds = "4 images of 64x64 RGB in 2 classes: n01440764, n15075141"
    assert said == f"imagenet: data/imagenet64, {holds}\n"
    incomplete = "incomplete: 4 of 1,281,167 images, 2 of 1,000 classes"
    assert f"ImageNet ILSVRC 2012, training set is {incomplete}\n" in complained
    store = open_store(Path("data/imagenet64"))
    expected = [dhariwal(image, 64) for synset in sorted(synsets) for image in drawn[synset]]
    np.testing.assert_array_equal(store.images, np.stack(expected))
    assert store.labels.tolist() == [0, 0, 1, 1]
    assert store.meta["classes"] == sorted(synsets)
    assert store.meta["recipe"] == "64x64 RGB, center-crop-dhariwal"
    assert store.meta["source"] == f"ImageNet ILSVRC 2012, training set ({incomplete})"

    assert main(["prepare", "imagenet", "train"]) == 0  # verified
    capsys.readouterr()
    said = refused(capsys, "prepare imagenet train --crop center-crop")
    assert said == "data/imagenet64: holds another store (other recipe); name another --out"


def test_the_tar_gives_the_same_pixels_as_the_folders() -> None:
    for synset in ("n01440764", "n15075141"):
        for number in range(2):
            draw(Path(f"train/{synset}/{synset}_{number}.JPEG"))
    with tarfile.open("ILSVRC2012_img_train.tar", "w") as outer:
        for folder in sorted(Path("train").iterdir()):
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as inner:
                for path in folder.iterdir():
                    inner.add(path, path.name)
            member = tarfile.TarInfo(f"{folder.name}.tar")
            member.size = len(content.getvalue())
            outer.addfile(member, io.BytesIO(content.getvalue()))
    options = ["--crop", "center-crop", "--resolution", "32", "--processes", "1"]
    assert main(["prepare", "imagenet", "train", "--out", "a", *options]) == 0
    assert main(["prepare", "imagenet", "ILSVRC2012_img_train.tar", "--out", "b", *options]) == 0
    assert open_store(Path("a")).fingerprint == open_store(Path("b")).fingerprint
    with Image.open("train/n01440764/n01440764_0.JPEG") as image:
        expected = image.crop((9, 0, 140, 131)).resize((32, 32), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(open_store(Path("b")).images[0], np.asarray(expected))


def test_a_folder_becomes_grey_images_and_a_list_of_those_left_out(capsys) -> None:
    drawn = [draw(Path(f"photos/{name}.png"), (20, 20)) for name in ("a", "c")]
    Path("photos/ü.jpg").write_text("<html>")
    words = "prepare folder photos --resolution 20 --crop none --channels 1 --processes 1"
    assert refused(capsys, words).startswith("1 of 3 images cannot be used, such as ü.jpg (not an image of")
    assert not Path("data/folder").exists()
    assert main([*words.split(), "--max-rejected", "0.4"]) == 0
    assert capsys.readouterr().out == (
        "folder: data/folder, 2 images of 20x20 grey without classes; 1 could not be used, see"
        " data/folder/rejected.txt\n"
    )
    store = open_store(Path("data/folder"))
    np.testing.assert_array_equal(
        store.images[..., 0], np.stack([np.asarray(image.convert("L")) for image in drawn])
    )
    assert (store.num_classes, store.image_channels, store.meta["rejected"]) == (0, 1, 1)
    assert Path("data/folder/rejected.txt").read_text().startswith("ü.jpg\tnot an image")


def test_a_packed_folder_gives_the_same_store_as_the_folder() -> None:
    for number in range(4):
        draw(Path(f"photos/{number % 2}/{number}.png"))
    with zipfile.ZipFile("photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in Path("photos").rglob("*.png"):
            archive.write(path)
    for name in ("photos", "photos.zip"):
        words = f"prepare folder {name} --resolution 8 --processes 1 --out data/{name}"
        assert main(words.split()) == 0
    stores = [open_store(Path("data") / name) for name in ("photos", "photos.zip")]
    assert stores[0].fingerprint == stores[1].fingerprint
    assert stores[0].meta["classes"] == stores[1].meta["classes"] == ["0", "1"]
    assert stores[1].meta["source"] == "images of the archive photos.zip"


def test_one_image_of_one_class_is_not_several(capsys) -> None:
    draw(Path("photos/cat/a.png"), (8, 8))
    words = "prepare folder photos --resolution 8 --processes 1 --out data/photos"
    assert main(words.split()) == 0
    assert capsys.readouterr().out == "folder: data/photos, 1 image of 8x8 RGB in 1 class: cat\n"


def test_enlarged_and_oriented_images_are_counted(capsys) -> None:
    draw(Path("photos/small.png"), (7, 30))
    draw(Path("photos/large.png"), (30, 30))
    for name, orientation in (("turned", 6), ("upright", 1), ("broken", 7000)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (9, 8)).save(f"photos/{name}.jpg", exif=exif)
    words = "prepare folder photos --resolution 8 --processes 1 --out"
    for _ in range(2):  # prepared, verified
        assert main([*words.split(), "data/photos"]) == 0
        assert capsys.readouterr().out == (
            "folder: data/photos, 5 images of 8x8 RGB without classes; 1 enlarged; 1 with an EXIF"
            " orientation, which is not applied\n"
        )


def test_a_zip_of_edm_is_taken_as_it_is() -> None:
    pixels = RANDOM.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    with zipfile.ZipFile("edm.zip", "w") as archive:
        for number, image in enumerate(pixels):
            content = io.BytesIO()
            Image.fromarray(image).save(content, "PNG")
            archive.writestr(f"00000/img{number:08d}.png", content.getvalue())
        labels = [[f"00000/img{number:08d}.png", 2 - number] for number in range(3)]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    assert main(["prepare", "edm-zip", "edm.zip", "--processes", "1"]) == 0
    store = open_store(Path("data/edm-zip"))
    np.testing.assert_array_equal(store.images, pixels)
    assert store.labels.tolist() == [2, 1, 0]


class TwoImages:
    """Stands in for the sources of arrays, which have tests of their own."""

    name, recipe, classes, resolution, image_channels = "two", "as they are", ("a", "b"), 4, 1
    labels = np.arange(2)
    opened: list[Path]

    def __init__(self, path: Path) -> None:
        type(self).opened = [path]

    def identity(self) -> str:
        return "two"

    def stamp(self, start: int, stop: int) -> str:
        return "two"

    def item_name(self, index: int) -> str:
        return str(index)

    def read(self, start: int, stop: int, remarks: object = None) -> tuple[np.ndarray, dict[int, str]]:
        return np.full((stop - start, 4, 4, 1), 7, np.uint8), {}


@pytest.mark.parametrize(
    ("words", "opened"),
    [
        ("cifar10 some/place", "some/place"),
        ("cifar10 --download", "data/got.tar.gz"),
        ("cifar10 some/place --download", "some/place/got.tar.gz"),
        ("imagenet-npz batches", "batches"),
    ],
)
def test_published_arrays_are_opened_where_they_are_or_downloaded_first(
    words: str, opened: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_sources, "Cifar10Source", TwoImages)
    monkeypatch.setattr(array_sources, "ImagenetNpzSource", TwoImages)
    monkeypatch.setattr(download, "download_cifar10", lambda folder: folder / "got.tar.gz")
    assert main(["prepare", *words.split(), "--processes", "1"]) == 0
    assert TwoImages.opened == [Path(opened)]
    assert open_store(Path("data") / words.split()[0]).images.shape == (2, 4, 4, 1)


def test_preparing_with_processes_of_its_own_imports_no_torch() -> None:
    for number in range(3):
        draw(Path(f"images/{number}.png"))
    program = (
        "import sys; from ict_fast.cli import main; from ict_fast.data import partial_store;"
        "partial_store._PIECE_BYTES = 1;"  # a piece per image, so that there is work for two
        "code = main('prepare folder images --resolution 8 --processes 2'.split());"
        "sys.exit(code or 'torch' in sys.modules)"
    )
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "folder: data/folder, 3 images of 8x8 RGB without classes\n"
    assert "preparing 3/3 (100 %)" in done.stderr
    assert open_store(Path("data/folder")).num_images == 3
