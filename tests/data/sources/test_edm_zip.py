"""Data sets in the form of EDM, built as its tool builds them, and what may be wrong with them."""

import io
import json
import stat
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ict_fast.data.sources.edm_zip import edm_zip_source
from ict_fast.errors import InputError

PIXELS = np.random.default_rng(3).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
NAMES = [f"{index // 4:05d}/img{index:08d}.png" for index in range(6)]
LABELS = [2, 0, 1, 2, 2, 0]


def encode(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", compress_level=0, optimize=False)
    return content.getvalue()


def write(path: Path, labels: Any, images: dict[str, bytes] | None = None, *, reverse: bool = False) -> Path:
    """As EDM's dataset_tool.py does: images stored, dataset.json last."""
    if images is None:
        images = {name: encode(pixels) for name, pixels in zip(NAMES, PIXELS, strict=True)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(images, reverse=reverse):
            archive.writestr(name, images[name])
        archive.writestr(
            "dataset.json", labels if isinstance(labels, str) else json.dumps({"labels": labels})
        )
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return tmp_path / "data.zip"


PAIRS = [[name, label] for name, label in zip(NAMES, LABELS, strict=True)]


@pytest.mark.parametrize("reverse", [False, True])
def test_images_and_labels_come_back_in_the_order_of_the_names(archive: Path, reverse: bool) -> None:
    source = edm_zip_source(write(archive, PAIRS[::-1], reverse=reverse))
    pixels, rejected = source.read(0, 6)
    assert rejected == {}
    np.testing.assert_array_equal(pixels, PIXELS)
    np.testing.assert_array_equal(source.read(2, 4)[0], PIXELS[2:4])
    assert source.labels.tolist() == LABELS
    assert source.classes == ["0", "1", "2"]
    assert [source.item_name(index) for index in range(6)] == NAMES
    assert (source.resolution, source.image_channels, source.recipe) == (8, 3, "8x8 RGB, as stored")


@pytest.mark.parametrize("names", ["/", "\\"])
def test_backslashes_of_windows_separate_folders(archive: Path, names: str) -> None:
    """In the names of the members, and in those of dataset.json or not."""
    images = {name.replace("/", "\\"): encode(pixels) for name, pixels in zip(NAMES, PIXELS, strict=True)}
    pairs = [[name.replace("/", names), label] for name, label in PAIRS]
    source = edm_zip_source(write(archive, pairs, images))
    assert source.labels.tolist() == LABELS
    np.testing.assert_array_equal(source.read(0, 6)[0], PIXELS)


def test_null_labels_mean_no_classes(archive: Path) -> None:
    source = edm_zip_source(write(archive, None))
    assert (list(source.classes), source.labels.tolist()) == ([], [0] * 6)


def test_grey_data_sets_stay_grey(archive: Path) -> None:
    images = {name: encode(pixels[..., 0]) for name, pixels in zip(NAMES, PIXELS, strict=True)}
    source = edm_zip_source(write(archive, None, images))
    np.testing.assert_array_equal(source.read(0, 6)[0], PIXELS[..., :1])


def test_a_grey_image_at_the_beginning_takes_no_colour_from_the_others(archive: Path) -> None:
    images = {name: encode(pixels) for name, pixels in zip(NAMES, PIXELS, strict=True)}
    images[NAMES[0]] = encode(PIXELS[0, ..., 0])
    pixels, rejected = edm_zip_source(write(archive, None, images)).read(0, 6)
    assert rejected == {}
    np.testing.assert_array_equal(pixels[0], PIXELS[0, ..., :1].repeat(3, axis=-1))
    np.testing.assert_array_equal(pixels[1:], PIXELS[1:])


def test_a_part_of_a_data_set_keeps_the_numbers_of_the_whole(archive: Path) -> None:
    source = edm_zip_source(write(archive, [[name, 999] for name in NAMES]))
    assert (len(source.classes), source.labels.tolist()) == (1000, [999] * 6)


def test_extra_fields_of_the_local_headers_do_not_shift_the_images(archive: Path) -> None:
    with zipfile.ZipFile(archive, "w") as opened:
        for name, pixels in zip(NAMES, PIXELS, strict=True):
            with opened.open(name, "w", force_zip64=True) as member:  # 20 bytes that the directory lacks
                member.write(encode(pixels))
        opened.writestr("dataset.json", json.dumps({"labels": PAIRS}))
    np.testing.assert_array_equal(edm_zip_source(archive).read(0, 6)[0], PIXELS)


def test_images_of_another_size_and_damaged_ones_are_rejected(archive: Path) -> None:
    images = {name: encode(pixels) for name, pixels in zip(NAMES, PIXELS, strict=True)}
    images[NAMES[0]] = b"not a PNG"
    images[NAMES[3]] = encode(PIXELS[3][:4])
    content = write(archive, PAIRS, images).read_bytes()
    place = content.index(images[NAMES[4]]) + len(images[NAMES[4]]) // 2
    archive.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    pixels, rejected = edm_zip_source(archive).read(0, 6)
    assert rejected == {
        0: "not an image of a known format (JPEG, PNG, WebP, BMP, GIF)",
        3: "8x4 instead of 8x8",
        4: "damaged: not what the archive's checksum says",
    }
    np.testing.assert_array_equal(pixels[[1, 2, 5]], PIXELS[[1, 2, 5]])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[name, -1] for name in NAMES], "the label of 00000/img00000000.png is -1; it must be an integer"),
        ([[name, 10**9] for name in NAMES], "is 1000000000; it must be an integer from 0 to 99999"),
        ([[name, 1.5] for name in NAMES], "is 1.5; it must be an integer"),
        ([[name, True] for name in NAMES], "is True; it must be an integer"),
        ([[name, [0, 1]] for name in NAMES], r"is \[0, 1\]; it must be an integer"),
        (PAIRS[:-1], "has no label for 00001/img00000005.png"),
        ([*PAIRS, PAIRS[0]], "has a label twice for the same name"),
        ([*PAIRS, ["00009/lost.png", 0]], "has a label for 00009/lost.png, which is not in the archive"),
        ([0, 1, 2], '"labels" must be null or a list of'),
        ({"a": 1}, '"labels" must be null or a list of'),
        ("[]", '"labels" must be null or a list of'),
        ("{", "dataset.json is not readable as JSON"),
        ("[" * 100_000, "dataset.json is not readable as JSON"),
    ],
)
def test_labels_that_are_none_are_refused(archive: Path, labels: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        edm_zip_source(write(archive, labels))


def _link() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("00000/link.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("../evil.png", r"'\.\./evil\.png' leads elsewhere"),
        ("/etc/evil.png", "'/etc/evil.png' leads elsewhere"),
        ("00000/../../evil.png", "leads elsewhere"),
        (_link(), "00000/link.png' is a link"),
        (NAMES[0], "has the member 00000/img00000000.png twice"),
        ("00000//img00000000.png", "twice"),
        ("dataset.json", "has the member dataset.json twice"),
        ("00000/img00000007.npy", "is not a PNG; only EDM data sets of pixels"),
    ],
)
def test_an_archive_that_means_harm_is_refused_by_the_members_name(
    archive: Path, member: str | zipfile.ZipInfo, message: str
) -> None:
    write(archive, None)
    with zipfile.ZipFile(archive, "a") as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile says that the name is there already
        opened.writestr(member, encode(PIXELS[0]))
    with pytest.raises(InputError, match=message):
        edm_zip_source(archive)


def test_compressed_images_are_refused(archive: Path) -> None:
    write(archive, None)
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("00000/z.png", encode(PIXELS[0]), zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"z\.png is compressed"):
        edm_zip_source(archive)


def test_encrypted_members_are_refused(archive: Path) -> None:
    content = bytearray(write(archive, None).read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    with pytest.raises(InputError, match=r"img00000000\.png is encrypted"):
        edm_zip_source(archive)


def test_a_directory_that_lies_about_places_is_refused(archive: Path) -> None:
    content = bytearray(write(archive, None).read_bytes())
    entry = content.index(b"PK\x01\x02")
    for field in (20, 24):  # compressed size, size
        changed = bytearray(content)
        changed[entry + 20 : entry + 28] = (2**31).to_bytes(4, "little") * 2
        archive.write_bytes(changed)
        with pytest.raises(InputError, match="lies beyond the archive's end"):
            edm_zip_source(archive)
        content[entry + field] ^= 1
        archive.write_bytes(content)
        with pytest.raises(InputError, match="is compressed"):
            edm_zip_source(archive)
        content[entry + field] ^= 1


def test_what_is_no_data_set_of_edm_is_refused(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        edm_zip_source(archive)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        edm_zip_source(tmp_path)
    content = write(archive, None).read_bytes()
    for kept in (0, 100, len(content) // 2, len(content) - 1):
        archive.write_bytes(content[:kept])
        with pytest.raises(InputError, match="not a whole ZIP"):
            edm_zip_source(archive)
    write(archive, None, {})
    with pytest.raises(InputError, match="has no images"):
        edm_zip_source(archive)
    write(archive, None, {NAMES[0]: b"nothing"})
    with pytest.raises(InputError, match="has no image that can be decoded"):
        edm_zip_source(archive)
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("a.png", encode(PIXELS[0]))
    with pytest.raises(InputError, match=r"has no dataset\.json"):
        edm_zip_source(archive)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_no_damage_is_more_than_a_refusal_or_a_rejected_image(archive: Path, compression: int) -> None:
    with zipfile.ZipFile(archive, "w") as opened:
        for name, pixels in zip(NAMES, PIXELS, strict=True):
            opened.writestr(name, encode(pixels))
        opened.writestr("dataset.json", json.dumps({"labels": PAIRS}), compression)
    whole = archive.read_bytes()
    directory = whole.index(b"dataset.json")  # its content, and then the list of the members
    random = np.random.default_rng(2)
    refused = 0
    for sample in range(150):
        damaged = bytearray(whole)
        place = int(random.integers(directory if sample % 4 else 0, len(whole)))
        damaged[place] = int(random.integers(256))
        archive.write_bytes(damaged[:place] if sample % 10 == 0 else damaged)
        try:
            edm_zip_source(archive).read(0, 6)
        except InputError:
            refused += 1
    assert refused > 50


def test_a_member_without_a_name_is_refused(archive: Path) -> None:
    content = bytearray(write(archive, None).read_bytes())
    entry = content.index(b"PK\x01\x02")
    length = len(NAMES[0])
    content[entry + 28 : entry + 32] = bytes((0, 0, length, 0))  # the name is taken for an extra field
    archive.write_bytes(content)
    with pytest.raises(InputError, match=r"not a whole ZIP|is not a PNG"):
        edm_zip_source(archive)
