"""CIFAR-10 and downsampled ImageNet, in their published formats, come out as the pictures that went in."""

import hashlib
import io
import itertools
import os
import pickle
import struct
import tarfile
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from ict_fast.data.sources.array_sources import CIFAR10_MD5, Cifar10Source, ImagenetNpzSource
from ict_fast.data.sources.source import Source
from ict_fast.errors import InputError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PER_BATCH = 12
# The order in which the published archive holds its files.
MEMBERS = ["data_batch_4", "readme.html", "test_batch", "data_batch_3", "batches.meta", "data_batch_2"]
MEMBERS += ["data_batch_5", "data_batch_1"]


class Python2Pickler(pickle._Pickler):
    """Writes strings as Python 2 did, which Python 3 reads and cannot write."""

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)

    def save_string(self, text: str | bytes) -> None:
        content = text.encode() if isinstance(text, str) else text
        short = len(content) < 256
        self.write(b"U" + bytes([len(content)]) if short else b"T" + struct.pack("<i", len(content)))
        self.write(content)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_string


def python_2_pickle(value: object) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def pictures(count: int, resolution: int, seed: int) -> list[Image.Image]:
    """Smooth colours and an unsmooth corner: a mistaken plane, row or column shows."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [
        Image.fromarray(each).resize((resolution, resolution), Image.Resampling.BICUBIC) for each in noise
    ]


def planar(images: Iterable[Image.Image]) -> np.ndarray:
    """uint8 (n, 3 R R): PIL's bands, one after the other."""
    rows = [b"".join(band.tobytes() for band in image.split()) for image in images]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)


def interleaved(images: Iterable[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


CIFAR_IMAGES = [pictures(PER_BATCH, 32, seed) for seed in range(5)]
CIFAR_LABELS = [
    [int(label) for label in np.random.default_rng(seed).integers(0, 10, PER_BATCH)] for seed in range(5)
]
ALL_CIFAR_IMAGES = interleaved(itertools.chain.from_iterable(CIFAR_IMAGES))


def cifar_batch(number: int, **changes: object) -> dict[str, object]:
    """What data_batch_<number> holds, from 1."""
    return {
        "batch_label": f"training batch {number} of 5",
        "labels": CIFAR_LABELS[number - 1],
        "data": planar(CIFAR_IMAGES[number - 1]),
        "filenames": [f"leptodactylus_pentadactylus_s_{index:06}.png" for index in range(PER_BATCH)],
        **changes,
    }


def cifar_files(**changes: bytes) -> dict[str, bytes]:
    """Every file of the archive by name; `changes` replaces some."""
    batches = {f"data_batch_{number}": python_2_pickle(cifar_batch(number)) for number in range(1, 6)}
    meta = {"num_cases_per_batch": 10000, "label_names": CLASSES, "num_vis": 3072}
    rest = {"readme.html": b"<html></html>", "test_batch": batches["data_batch_1"]}
    return {**batches, "batches.meta": python_2_pickle(meta), **rest, **changes}


def write_archive(path: Path, files: dict[str, bytes], *more: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        folder = tarfile.TarInfo("cifar-10-batches-py")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name in MEMBERS:
            if name in files:
                member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                member.size = len(files[name])
                archive.addfile(member, io.BytesIO(files[name]))
        for member in more:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def md5s(path: Path, files: dict[str, bytes]) -> dict[str, str]:
    """What `Cifar10Source` must be told of files of ours, whose MD5s are not the published ones."""
    archive = {"cifar-10-python.tar.gz": md5(path.read_bytes())} if path.is_file() else {}
    return archive | {name: md5(content) for name, content in files.items()}


def open_archive(path: Path) -> Cifar10Source:
    return Cifar10Source(path, md5s(path, {}))


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# ------------------------------------------------------------------------------------ CIFAR-10


def test_cifar10_from_its_archive_is_what_pil_sees(tmp_path: Path) -> None:
    source: Source = open_archive(write_archive(tmp_path / "cifar-10-python.tar.gz", cifar_files()))
    images, rejected = source.read(0, 5 * PER_BATCH)
    np.testing.assert_array_equal(images, ALL_CIFAR_IMAGES)
    np.testing.assert_array_equal(source.labels, np.concatenate(CIFAR_LABELS))
    assert (images.dtype, source.labels.dtype, rejected) == (np.uint8, np.int64, {})
    assert (list(source.classes), source.resolution, source.image_channels) == (CLASSES, 32, 3)
    assert (source.item_name(0), source.item_name(PER_BATCH + 3)) == ("data_batch_1[0]", "data_batch_2[3]")


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
def test_cifar10_from_its_folder_is_the_same(tmp_path: Path, inner: str) -> None:
    files = cifar_files()
    write_folder(tmp_path / "a" / inner, files)
    source = Cifar10Source(tmp_path / "a", md5s(tmp_path, files))
    np.testing.assert_array_equal(source.read(0, 5 * PER_BATCH)[0], ALL_CIFAR_IMAGES)
    np.testing.assert_array_equal(source.labels, np.concatenate(CIFAR_LABELS))


def test_any_part_can_be_read_in_any_order_and_in_another_process(tmp_path: Path) -> None:
    source = open_archive(write_archive(tmp_path / "a.tar.gz", cifar_files()))
    for start, stop in ((50, 60), (0, 1), (7, 31), (59, 60), (12, 24), (5, 5)):
        np.testing.assert_array_equal(source.read(start, stop)[0], ALL_CIFAR_IMAGES[start:stop])
    sent = pickle.loads(pickle.dumps(source))  # as to a worker, with a stream open
    np.testing.assert_array_equal(sent.read(7, 31)[0], ALL_CIFAR_IMAGES[7:31])
    assert sent.identity() == source.identity()


def test_only_the_published_archive_is_accepted(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "cifar-10-python.tar.gz", cifar_files())
    with pytest.raises(InputError, match="download it again") as caught:
        Cifar10Source(path)
    for named in (str(path), md5(path.read_bytes()), "c58f30108f718f92721af3b95e74349a"):
        assert named in str(caught.value)
    folder = write_folder(tmp_path / "a", cifar_files())
    with pytest.raises(InputError, match=r"batches\.meta: cut short, or not the published file"):
        Cifar10Source(folder)


def test_identity_follows_what_was_read_and_not_where_it_lies(tmp_path: Path) -> None:
    def identity(name: str, **changes: bytes) -> str:
        return open_archive(write_archive(tmp_path / name, cifar_files(**changes))).identity()

    first = identity("a.tar.gz")
    (tmp_path / "moved").mkdir()
    (tmp_path / "a.tar.gz").rename(tmp_path / "moved/b.tar.gz")
    assert open_archive(tmp_path / "moved/b.tar.gz").identity() == first
    repainted = python_2_pickle(cifar_batch(1, data=255 - planar(CIFAR_IMAGES[0])))
    relabelled = python_2_pickle(cifar_batch(1, labels=CIFAR_LABELS[1]))
    assert len({first, identity("c", data_batch_1=repainted), identity("d", data_batch_1=relabelled)}) == 3
    assert len(first) == 64


class _Payload:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.proof}",))


def test_a_batch_that_would_run_a_command_is_refused_by_the_commands_name(tmp_path: Path) -> None:
    hostile = pickle.dumps({"data": _Payload(tmp_path / "executed"), "labels": [0]}, 2)
    path = write_archive(tmp_path / "a.tar.gz", cifar_files(data_batch_3=hostile))
    with pytest.raises(InputError, match=r"data_batch_3: refused, it asks for '(posix|os)\.system'"):
        open_archive(path)
    assert not (tmp_path / "executed").exists()


SHORT = planar(CIFAR_IMAGES[0])[:, :3000]
BAD_BATCHES: dict[str, tuple[bytes, str]] = {
    "rows of another length": (python_2_pickle(cifar_batch(1, data=SHORT)), r"uint8, shape \(12, 3000\)"),
    "images of 16x16": (
        python_2_pickle(cifar_batch(1, data=planar(pictures(PER_BATCH, 16, 0)))),
        "images of 16x16; CIFAR-10 has 32x32",
    ),
    "floating point": (python_2_pickle(cifar_batch(1, data=np.zeros((12, 3072)))), "data of float64"),
    "no images": (python_2_pickle(cifar_batch(1, data=np.zeros((0, 3072), np.uint8))), "truncated|shape"),
    "Fortran order": (
        python_2_pickle(cifar_batch(1, data=np.asfortranarray(planar(CIFAR_IMAGES[0])))),
        "Fortran order",
    ),
    "a label too high": (
        python_2_pickle(cifar_batch(1, labels=[10] * 12)),
        "labels from 10 to 10; .* 0 to 9",
    ),
    "a label too low": (python_2_pickle(cifar_batch(1, labels=[-1] * 12)), "labels from -1 to -1"),
    "a label too few": (python_2_pickle(cifar_batch(1, labels=[1] * 11)), r"shape \(11,\); .* 12 images"),
    "labels of text": (python_2_pickle(cifar_batch(1, labels=["cat"] * 12)), "integer for each"),
    "labels in a heap": (python_2_pickle(cifar_batch(1, labels=[[1], 2])), "integer for each"),
    "no labels": (python_2_pickle({"data": planar(CIFAR_IMAGES[0])}), 'holds no "labels"'),
    "no dict": (python_2_pickle([1, 2]), 'holds no "data"'),
    "no pickle": (b"<html>404 Not Found</html>", "not a pickle"),
    "cut short": (python_2_pickle(cifar_batch(1))[:20000], "truncated"),
    "Python 3 in protocol 2": (pickle.dumps(cifar_batch(1), 2), r"stored as text; .* numpy\.savez"),
}


@pytest.mark.parametrize("fault", BAD_BATCHES)
@pytest.mark.parametrize("kind", ["archive", "folder"])
def test_a_bad_batch_is_named_with_its_fault(tmp_path: Path, fault: str, kind: str) -> None:
    content, message = BAD_BATCHES[fault]
    files = cifar_files(data_batch_1=content)
    if kind == "archive":
        path = write_archive(tmp_path / "a.tar.gz", files)
    else:
        path = write_folder(tmp_path / "a", files)
    with pytest.raises(InputError, match=rf"data_batch_1: .*({message})") as caught:
        Cifar10Source(path, md5s(path, files))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [[], ["cat", "cat"], ["cat", "dog"]])
def test_class_names_must_fit_the_labels(tmp_path: Path, names: list[str]) -> None:
    files = cifar_files(**{"batches.meta": python_2_pickle({"label_names": names})})
    with pytest.raises(
        InputError, match=r"label_names, \d of them different|those of batches.meta are 0 to 1"
    ):
        open_archive(write_archive(tmp_path / "a.tar.gz", files))


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, target, size
    return made


@pytest.mark.parametrize(
    ("hostile", "message"),
    [
        (member("../outside"), r"'\.\./outside' leads out"),
        (member("cifar-10-batches-py/../../outside"), "leads out"),
        (member("/etc/cron.d/x"), "'/etc/cron.d/x' leads out"),
        (member("cifar-10-batches-py/x", tarfile.SYMTYPE, "/etc/passwd"), "is a link or a device"),
        (member("x", tarfile.LNKTYPE, "cifar-10-batches-py/data_batch_1"), "is a link or a device"),
        (member("x", tarfile.FIFOTYPE), "is a link or a device"),
        (member("cifar-10-batches-py/data_batch_1", size=3), "'.*data_batch_1' is there twice"),
    ],
)
def test_a_hostile_archive_is_refused_whole(tmp_path: Path, hostile: tarfile.TarInfo, message: str) -> None:
    path = write_archive(tmp_path / "a.tar.gz", cifar_files(), hostile)
    with pytest.raises(InputError, match=f"refused, its member .*{message.lstrip(chr(39))}"):
        open_archive(path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar.gz"]  # nothing was unpacked


def test_a_member_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    files = cifar_files()
    del files["data_batch_1"]
    path = write_archive(
        tmp_path / "a.tar.gz", files, member("cifar-10-batches-py/data_batch_1", size=65 << 20)
    )
    with pytest.raises(InputError, match=r"larger than 64 MiB \(68,157,440 bytes\)"):
        open_archive(path)


def test_an_archive_that_is_cut_short_or_lacks_a_file_says_so(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "a.tar.gz", cifar_files())
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) * 9 // 10):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"a\.tar\.gz: .*(cut short|truncated|lacks|not a pickle)"):
            open_archive(path)
    path.write_bytes(b"not an archive at all" * 100)
    with pytest.raises(InputError, match=r"not a \.tar\.gz"):
        open_archive(path)
    files = cifar_files()
    del files["data_batch_2"]
    with pytest.raises(InputError, match="lacks data_batch_2; download it again"):
        open_archive(write_archive(tmp_path / "b.tar.gz", files))
    with pytest.raises(InputError, match=r"data_batch_2: missing"):
        Cifar10Source(write_folder(tmp_path / "b", files), md5s(tmp_path, cifar_files()))
    with pytest.raises(InputError, match=r"c\.tar\.gz: missing"):
        Cifar10Source(tmp_path / "c.tar.gz", CIFAR10_MD5)


# ------------------------------------------------- ImageNet, downsampled by Chrabaszcz et al.

# Five classes, whose order in the map is not the sorted one, as in the published map.
SYNSETS = ["n02119789", "n02100735", "n01440764", "n02110185", "n01443537"]
MAP = "".join(f"{synset} {number} name_{number}\n" for number, synset in enumerate(SYNSETS, start=1))
COUNTS = [4, 5, 3, 4, 4, 4, 6, 4, 4, 4]


def imagenet_labels(number: int) -> np.ndarray:
    """Of batch `number`, from 1, counting classes from 1."""
    return np.random.default_rng(number).integers(1, 6, COUNTS[number - 1])


def imagenet_folder(
    folder: Path, write: Callable[..., object], resolution: int = 8, **changes: object
) -> Path:
    """Ten batches, each written by `write(file, data=, labels=, mean=)`; `changes` go to the third."""
    folder.mkdir()
    (folder / "map_clsloc.txt").write_text(MAP)
    for number, count in enumerate(COUNTS, start=1):
        data = planar(pictures(count, resolution, number))
        arrays = {"data": data, "labels": imagenet_labels(number), "mean": data.mean(0)}
        write(folder / f"train_data_batch_{number}", **{**arrays, **(changes if number == 3 else {})})
    return folder


def write_pickle(protocol: int) -> Callable[..., None]:
    def write(file: Path, labels: np.ndarray, **arrays: object) -> None:
        file.write_bytes(pickle.dumps({**arrays, "labels": labels.tolist()}, protocol))

    return write


def write_python_2_pickle(file: Path, labels: np.ndarray, **arrays: object) -> None:
    file.write_bytes(python_2_pickle({**arrays, "labels": labels.tolist()}))


FORMATS: dict[str, Callable[..., object]] = {
    "stored npz": np.savez,
    "compressed npz": np.savez_compressed,
    "pickle of Python 2": write_python_2_pickle,
    "pickle, protocol 3": write_pickle(3),
    "pickle, protocol 4": write_pickle(4),
}


@pytest.mark.parametrize("format_", FORMATS)
def test_imagenet_in_every_published_format_is_what_pil_sees(tmp_path: Path, format_: str) -> None:
    source: Source = ImagenetNpzSource(imagenet_folder(tmp_path / "a", FORMATS[format_]))
    expected = np.concatenate([interleaved(pictures(count, 8, n)) for n, count in enumerate(COUNTS, start=1)])
    images, rejected = source.read(0, sum(COUNTS))
    np.testing.assert_array_equal(images, expected)
    assert rejected == {}
    for start, stop in ((30, 42), (0, 10), (3, 13), (41, 42), (9, 9)):
        np.testing.assert_array_equal(source.read(start, stop)[0], expected[start:stop])
        np.testing.assert_array_equal(
            pickle.loads(pickle.dumps(source)).read(start, stop)[0], expected[start:stop]
        )
    assert (source.item_name(4), source.recipe) == ("train_data_batch_2[0]", "8x8 RGB, chrabaszcz")


@pytest.mark.parametrize("resolution", [8, 16, 32, 64])
def test_the_resolution_is_found_in_the_rows(tmp_path: Path, resolution: int) -> None:
    source = ImagenetNpzSource(imagenet_folder(tmp_path / "a", np.savez, resolution))
    assert source.resolution == resolution
    np.testing.assert_array_equal(source.read(0, 4)[0], interleaved(pictures(4, resolution, 1)))


def test_labels_are_the_sorted_synsets_as_in_every_imagenet_source(tmp_path: Path) -> None:
    source = ImagenetNpzSource(imagenet_folder(tmp_path / "a", np.savez))
    assert list(source.classes) == ["n01440764", "n01443537", "n02100735", "n02110185", "n02119789"]
    published = np.concatenate([imagenet_labels(number) for number in range(1, 11)])
    assert set(published) == {1, 2, 3, 4, 5}
    for label, number in zip(source.labels, published, strict=True):
        assert source.classes[label] == SYNSETS[number - 1]
    assert source.labels.dtype == np.int64


def test_the_class_map_is_asked_for_not_invented(tmp_path: Path) -> None:
    folder = imagenet_folder(tmp_path / "a", np.savez)
    (folder / "map_clsloc.txt").unlink()
    with pytest.raises(InputError, match=r"map_clsloc\.txt: missing; .*Imagenet32_Scripts"):
        ImagenetNpzSource(folder)


@pytest.mark.parametrize(
    "text",
    ["", "n1 1\nn2 1\n", "n1 0\nn2 1\n", "n1 1\nn1 2\n", "1 n1\n2 n2\n", "n1\n", "n1 1\nn2 2\n\nn3 4\n"],
)
def test_a_class_map_that_does_not_number_its_classes_is_refused(tmp_path: Path, text: str) -> None:
    folder = imagenet_folder(tmp_path / "a", np.savez)
    (folder / "map_clsloc.txt").write_text(text)
    with pytest.raises(InputError, match=r"map_clsloc\.txt: its \d lines do not number"):
        ImagenetNpzSource(folder)


def test_a_class_map_that_lost_its_end_is_noticed(tmp_path: Path) -> None:
    folder = imagenet_folder(tmp_path / "a", np.savez)
    (folder / "map_clsloc.txt").write_text("".join(MAP.splitlines(keepends=True)[:3]))
    with pytest.raises(InputError, match=r"labels from \d to 5; those of map_clsloc.txt are 1 to 3"):
        ImagenetNpzSource(folder)


def test_identity_follows_labels_files_and_dates(tmp_path: Path) -> None:
    folder = imagenet_folder(tmp_path / "a", np.savez)
    first = ImagenetNpzSource(folder).identity()
    assert ImagenetNpzSource(folder).identity() == first
    other_order = (
        MAP.replace("n02119789 1", "x 1").replace("n02100735 2", "n02119789 2").replace("x", "n02100735")
    )
    (folder / "map_clsloc.txt").write_text(other_order)
    relabelled = ImagenetNpzSource(folder).identity()
    (folder / "map_clsloc.txt").write_text(MAP)
    os.utime(folder / "train_data_batch_5.npz", ns=(1, 1))
    assert len({first, relabelled, ImagenetNpzSource(folder).identity()}) == 3


THIRD = planar(pictures(3, 8, 3))
BAD_ARRAYS: dict[str, tuple[dict[str, object], str]] = {
    "rows of another length": ({"data": THIRD[:, :100]}, r"uint8, shape \(3, 100\)"),
    "an odd resolution": ({"data": planar(pictures(3, 10, 3))}, r"uint8, shape \(3, 300\); .*8, 16, 32, 64"),
    "another resolution": ({"data": planar(pictures(3, 16, 3))}, "images of 16x16, and of 8x8 in"),
    "images in four dimensions": ({"data": THIRD.reshape(3, 3, 8, 8)}, r"shape \(3, 3, 8, 8\)"),
    "floating point": ({"data": THIRD / 255}, "data of float64"),
    "Fortran order": ({"data": np.asfortranarray(THIRD)}, "Fortran order"),
    "a label of 0": (
        {"labels": np.array([0, 1, 2])},
        "labels from 0 to 2; those of map_clsloc.txt are 1 to 5",
    ),
    "a label of 6": ({"labels": np.array([6, 1, 2])}, "labels from 1 to 6"),
    "two labels": ({"labels": np.array([1, 2])}, r"labels of int64, shape \(2,\); .* 3 images"),
    "labels of floats": ({"labels": np.array([1.0, 2.0, 3.0])}, "labels of float64"),
}


@pytest.mark.parametrize("fault", BAD_ARRAYS)
@pytest.mark.parametrize(
    "format_", ["stored npz", "compressed npz", "pickle of Python 2", "pickle, protocol 4"]
)
def test_a_bad_array_is_named_with_its_fault(tmp_path: Path, fault: str, format_: str) -> None:
    changes, message = BAD_ARRAYS[fault]
    folder = imagenet_folder(tmp_path / "a", FORMATS[format_], **changes)
    with pytest.raises(InputError, match=rf"train_data_batch_3(\.npz)?: .*{message}") as caught:
        ImagenetNpzSource(folder)
    assert "\n" not in str(caught.value)


def test_no_object_is_built_from_an_npz(tmp_path: Path) -> None:
    hostile = np.array([_Payload(tmp_path / "executed")] * 3, dtype=object)
    for number, changes in enumerate(
        ({"data": hostile}, {"labels": hostile}, {"data": hostile.reshape(3, 1)})
    ):
        folder = imagenet_folder(tmp_path / str(number), np.savez, **changes)
        with pytest.raises(InputError, match=r"(data|labels) of object"):
            ImagenetNpzSource(folder)
    folder = imagenet_folder(tmp_path / "b", write_pickle(4), data=_Payload(tmp_path / "executed"))
    with pytest.raises(InputError, match=r"train_data_batch_3: refused, it asks for '(posix|os)\.system'"):
        ImagenetNpzSource(folder)
    assert not (tmp_path / "executed").exists()


def _rewrite_zip(file: Path, change: Callable[[dict[str, bytes]], list[tuple[str, bytes]]]) -> None:
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as archive:
        warnings.filterwarnings("ignore", message="Duplicate name")
        for name, content in change(members):
            archive.writestr(name, content)


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut in the middle": (lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]), "cut short"),
    "cut at its end": (lambda f: f.write_bytes(f.read_bytes()[:-30]), "cut short"),
    "empty": (lambda f: f.write_bytes(b""), "cut short, or not an .npz"),
    "no zip": (lambda f: f.write_bytes(b"<html>" * 100), "cut short, or not an .npz"),
    "no data": (
        lambda f: np.savez(f, labels=np.ones(3, int)),
        "holds labels.npy; it should hold one data.npy",
    ),
    "no labels": (lambda f: np.savez(f, data=THIRD), "it should hold one labels.npy"),
    "data twice": (
        lambda f: _rewrite_zip(f, lambda m: [*m.items(), ("data.npy", m["data.npy"])]),
        "it should hold one data.npy",
    ),
    "fewer rows than announced": (
        lambda f: _rewrite_zip(f, lambda m: list({**m, "data.npy": m["data.npy"][:-1]}.items())),
        "does not hold the 3 images of its header",
    ),
    "fewer labels than announced": (
        lambda f: _rewrite_zip(f, lambda m: list({**m, "labels.npy": m["labels.npy"][:-8]}.items())),
        "labels of int64, shape",
    ),
    "no .npy": (
        lambda f: _rewrite_zip(f, lambda m: list({**m, "data.npy": b"x" * 1000}.items())),
        "cut short, or not an .npz",
    ),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_bad_npz_is_named_with_its_fault(tmp_path: Path, fault: str) -> None:
    spoil, message = BAD_FILES[fault]
    folder = imagenet_folder(tmp_path / "a", np.savez)
    spoil(folder / "train_data_batch_3.npz")
    with pytest.raises(InputError, match=rf"train_data_batch_3\.npz: .*{message}"):
        ImagenetNpzSource(folder)


@pytest.mark.parametrize("name", ["stored npz", "compressed npz"])
def test_a_pixel_that_was_damaged_on_the_way_is_noticed(tmp_path: Path, name: str) -> None:
    folder = imagenet_folder(tmp_path / "a", FORMATS[name], 64)
    file = folder / "train_data_batch_2.npz"
    content = bytearray(file.read_bytes())
    content[2000] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"train_data_batch_2.*(CRC|invalid)"):
        ImagenetNpzSource(folder).read(0, sum(COUNTS))


def test_a_file_that_is_spoilt_after_opening_is_noticed_in_reading(tmp_path: Path) -> None:
    for name in ("stored npz", "compressed npz"):
        folder = imagenet_folder(tmp_path / name, FORMATS[name], 64)
        source = ImagenetNpzSource(folder)
        file = folder / "train_data_batch_2.npz"
        content = file.read_bytes()
        file.write_bytes(
            content[:200] + bytes(20) + content[220:] if name == "compressed npz" else content[:9000]
        )
        np.testing.assert_array_equal(source.read(0, 4)[0], interleaved(pictures(4, 64, 1)))
        with pytest.raises(InputError, match=r"train_data_batch_2 cannot be read: .*; get the file again"):
            source.read(4, 9)
        file.unlink()
        with pytest.raises(InputError, match="No such file"):
            pickle.loads(pickle.dumps(source)).read(4, 9)


def test_missing_and_ambiguous_batches_are_named(tmp_path: Path) -> None:
    folder = imagenet_folder(tmp_path / "a", np.savez)
    (folder / "train_data_batch_7").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds both train_data_batch_7 and train_data_batch_7\.npz"):
        ImagenetNpzSource(folder)
    for number in (7, 10):
        (folder / f"train_data_batch_{number}.npz").unlink()
    (folder / "train_data_batch_7").unlink()
    with pytest.raises(InputError, match=r"lacks train_data_batch_7, train_data_batch_10 .* this one folder"):
        ImagenetNpzSource(folder)
    with pytest.raises(InputError, match="not a folder"):
        ImagenetNpzSource(folder / "train_data_batch_1.npz")


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_reading_takes_little_memory_however_large_the_batch(tmp_path: Path, write: Callable) -> None:
    folder = imagenet_folder(tmp_path / "a", write, 64)
    data = np.zeros((8000, 64 * 64 * 3), np.uint8)
    data[-1] = planar(pictures(1, 64, 0))[0]
    write(folder / "train_data_batch_10.npz", data=data, labels=np.ones(8000, int))
    del data
    tracemalloc.start()
    source = ImagenetNpzSource(folder)
    last = source.read(len(source.labels) - 1, len(source.labels))[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(last, interleaved(pictures(1, 64, 0)))
    assert peak < 8000 * 12288 / 2  # the zip stream skips 16 MiB at a time
