"""Data sets of the Hugging Face Hub, written by pyarrow as there, and what may be wrong with them."""

import errno
import io
import json
import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ict_fast.data.prepare import prepare_store
from ict_fast.data.sources import parquet_files
from ict_fast.data.sources.catalogue import OPTIONS as SOURCES
from ict_fast.data.sources.catalogue import open_source
from ict_fast.data.sources.image_source import ImageSource
from ict_fast.data.sources.parquet_files import parquet_source
from ict_fast.data.store import open_store
from ict_fast.errors import InputError

OPTIONS: dict[str, Any] = {"crop": "none", "resolution": 8, "image_channels": 3}
PIXELS = np.random.default_rng(5).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
LABELS = [2, 0, 1, 2, 2, 0, 1, 1, 0, 2]
CLASSES = ["tench, Tinca tinca", "goldfish", "crane"]


def encode(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


ENCODED = [encode(pixels) for pixels in PIXELS]


def describe(label: str, classes: list[str]) -> dict[str, str]:
    features = {"image": {"_type": "Image"}, label: {"names": classes, "_type": "ClassLabel"}}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def write(
    path: Path, rows: range, columns: Mapping[str, list[Any]] | None = None, *, described: Any = ()
) -> Path:
    """Row groups of three; `described` is the schema's metadata, by default as the Hub has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if columns is None:
        columns = {
            "image": [{"bytes": ENCODED[row], "path": f"{row}.png"} for row in rows],
            "label": [LABELS[row] for row in rows],
        }
    table = pa.table(dict(columns))
    about = describe("label", CLASSES) if described == () else described
    pq.write_table(table.replace_schema_metadata(about), path, row_group_size=3)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images in two files of a training split."""
    write(tmp_path / "data/train-00001-of-00002.parquet", range(7, 10))
    write(tmp_path / "data/train-00000-of-00002.parquet", range(7))
    return tmp_path / "data"


def test_images_labels_and_classes_come_back_in_the_order_of_the_files(folder: Path) -> None:
    source = pickle.loads(pickle.dumps(parquet_source(folder, **OPTIONS)))  # as it goes to another process
    for start, stop in ((0, 10), (2, 8), (9, 10)):
        pixels, rejected = source.read(start, stop)
        assert rejected == {}
        np.testing.assert_array_equal(pixels, PIXELS[start:stop])
    assert source.labels.tolist() == LABELS
    assert source.labels.dtype == np.int64
    assert list(source.classes) == CLASSES
    assert source.item_name(5) == "train-00000-of-00002.parquet, row 5"
    assert source.item_name(8) == "train-00001-of-00002.parquet, row 1"
    assert (source.name, source.recipe) == ("images of the Parquet files data", "8x8 RGB, as stored")


def test_a_store_is_prepared_and_found_finished_again(folder: Path, tmp_path: Path) -> None:
    given = {**dict.fromkeys(SOURCES["parquet"]), "path": folder, "download": None, "resolution": 8}
    for _ in range(2):
        store = open_store(prepare_store(open_source("parquet", given), tmp_path / "store", processes=1))
    np.testing.assert_array_equal(store.images, PIXELS)
    assert (store.labels.tolist(), store.meta["classes"]) == (LABELS, CLASSES)


def test_in_order_each_row_group_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = pq.ParquetFile.read_row_group

    def watch(self: pq.ParquetFile, number: int, **options: object) -> pa.Table:
        read.append(number)
        return original(self, number, **options)

    source = parquet_source(folder, **OPTIONS)
    parquet_files._row_group.cache_clear()
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watch)
    for start in range(0, 10, 2):
        source.read(start, start + 2)
    assert read == [0, 1, 2, 0]


def test_a_single_file_with_plain_bytes_and_other_names_is_taken(tmp_path: Path) -> None:
    columns = {"id": [7, 8], "picture": ENCODED[:2], "fine_label": [4, 1], "coarse": [0, 1]}
    file = write(tmp_path / "a.parquet", range(0), columns, described=None)
    source = parquet_source(file, **OPTIONS, image_column="picture")
    assert list(source.classes) == ["0", "1", "2", "3", "4"]
    assert source.labels.tolist() == [4, 1]
    np.testing.assert_array_equal(source.read(0, 2)[0], PIXELS[:2])
    other = parquet_source(file, **OPTIONS, image_column="picture", label_column="coarse")
    assert other.labels.tolist() == [0, 1]


def test_without_labels_there_are_no_classes(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", range(0), {"img": ENCODED[:2]})
    source = parquet_source(file, **OPTIONS)
    assert (list(source.classes), source.labels.tolist()) == ([], [0, 0])


@pytest.mark.parametrize("others", [["test", "validation"], ["extra", "test"], ["unsupervised"]])
def test_of_the_hubs_splits_the_training_set_is_taken(folder: Path, capsys, others: list[str]) -> None:
    for part in others:
        write(folder / f"{part}-00000-of-00001.parquet", range(2))
    assert len(parquet_source(folder, **OPTIONS).labels) == 10
    said = f"{folder}: takes the files of train, and passes over those of {', '.join(others)}\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("others", [["test", "validation"], ["extra", "test"]])
def test_without_a_training_set_one_is_to_be_named(tmp_path: Path, others: list[str]) -> None:
    for part in others:
        write(tmp_path / f"{part}-00000-of-00001.parquet", range(2))
    with pytest.raises(InputError, match=f"has files of {', '.join(others)} and none of train; name one of"):
        parquet_source(tmp_path, **OPTIONS)
    assert len(parquet_source(tmp_path / "test-00000-of-00001.parquet", **OPTIONS).labels) == 2


def test_a_row_without_an_image_is_rejected_and_not_the_file(tmp_path: Path) -> None:
    images = [{"bytes": each, "path": "x"} for each in (ENCODED[0], None, b"", b"<html>")]
    columns = {"image": [*images, None], "label": [0] * 5}
    source = parquet_source(write(tmp_path / "a.parquet", range(0), columns), **OPTIONS)
    pixels, rejected = source.read(0, 5)
    np.testing.assert_array_equal(pixels[0], PIXELS[0])
    assert list(rejected) == [1, 2, 3, 4]
    assert rejected[1] == rejected[4] == "the row has no image, or only the path of one"
    assert rejected[3].startswith("not an image")


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"x": ENCODED[:1], "y": [0]}, {}, "has no column image or img; .* --image-column, of x, y"),
        ({"image": ENCODED[:1]}, {"image_column": "img"}, "has no column img; it has image"),
        ({"image": ENCODED[:1]}, {"label_column": "label"}, "has no column label; it has image"),
        ({"image": ["a.png"]}, {}, "column image is of string; it must be binary, or a struct with binary"),
        ({"image": [{"path": "a.png"}]}, {}, "column image is of struct<path: string>; it must be binary"),
        ({"image": ENCODED[:1], "label": ["cat"]}, {}, "column label is of string; labels are integers"),
        ({"image": ENCODED[:2], "label": [0, None]}, {}, "1 rows have no label"),
        (
            {"image": ENCODED[:1], "label": [-1]},
            {},
            "column label has label -1, which means that there is none",
        ),
        (
            {"image": ENCODED[:1], "label": pa.array([2**63 + 1], pa.uint64())},
            {},
            "column label has label 9223372036854775809; labels are below 2\\^63",
        ),
        (
            {"image": [{"bytes": None, "path": "a.png"}]},
            {},
            "column image.bytes is empty; the images themselves must be in the file",
        ),
        ({"image": ENCODED[:1], "label": [3]}, {}, "column label has label 3; there are at most 3 classes"),
        ({"image": pa.array([], pa.binary())}, {}, "has no images"),
    ],
)
def test_columns_that_are_no_images_or_labels_are_refused_by_name(
    tmp_path: Path, columns: dict[str, list[Any]], options: dict[str, str], message: str
) -> None:
    file = write(tmp_path / "a.parquet", range(0), columns)
    with pytest.raises(InputError, match=message):
        parquet_source(file, **OPTIONS, **options)


def test_endless_labels_are_refused(tmp_path: Path) -> None:
    columns = {"image": ENCODED[:1], "label": [10**12]}
    with pytest.raises(InputError, match=r"label 1000000000000; there are at most 100,000 classes"):
        parquet_source(write(tmp_path / "a.parquet", range(0), columns, described=None), **OPTIONS)


def test_a_description_that_is_none_leaves_numbers(tmp_path: Path) -> None:
    for about in ({"huggingface": "{"}, {"huggingface": "[]"}, describe("label", [0, 1, 2]), None):  # type: ignore[list-item]
        file = write(tmp_path / "a.parquet", range(3), described=about)
        assert list(parquet_source(file, **OPTIONS).classes) == ["0", "1", "2"]


def test_what_is_no_such_data_set_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is nothing here"):
        parquet_source(tmp_path / "nowhere", **OPTIONS)
    with pytest.raises(InputError, match=rf"has no \.parquet files; {folder} has some"):
        parquet_source(tmp_path, **OPTIONS)
    write(folder / "train-00002-of-00002.parquet", range(2), described=describe("label", ["a", "b", "c"]))
    with pytest.raises(InputError, match=r"train-00002.*has other columns or classes than train-00000"):
        parquet_source(folder, **OPTIONS)
    for content in (b"", b"junk" * 100):
        (folder / "train-00002-of-00002.parquet").write_bytes(content)
        with pytest.raises(InputError, match=r"train-00002\S+: not a whole Parquet file .*; get it again"):
            parquet_source(folder, **OPTIONS)


def test_damage_in_a_row_group_is_no_bad_image_and_names_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", range(3))
    content = bytearray(file.read_bytes())
    content[4:12] = b"\xff" * 8  # the header of the first page
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.parquet: not a whole Parquet file .*; get it again"):
        parquet_source(file, **OPTIONS).read(0, 3)


def test_an_error_of_the_disk_is_not_of_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = parquet_source(folder, **OPTIONS)
    parquet_files._row_group.cache_clear()

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", fail)
    with pytest.raises(OSError, match="Input/output error"):
        source.read(0, 1)
    monkeypatch.setattr(pq.ParquetFile, "read", fail)
    with pytest.raises(InputError, match="data: cannot be read: Input/output error"):
        parquet_source(folder, **OPTIONS)


def test_a_file_that_changes_meanwhile_is_not_mixed_in(folder: Path) -> None:
    source = parquet_source(folder, **OPTIONS)
    parquet_files._row_group.cache_clear()
    os.utime(folder / "train-00000-of-00002.parquet", ns=(0, 0))
    with pytest.raises(InputError, match="has changed meanwhile"):
        source.read(0, 1)


def test_stamps_change_with_their_own_file_alone(folder: Path) -> None:
    def stamps(source: ImageSource) -> list[str]:
        return [source.stamp(start, start + 2) for start in range(0, 10, 2)]

    before = stamps(parquet_source(folder, **OPTIONS))
    assert stamps(parquet_source(folder, **OPTIONS)) == before
    assert len(set(before)) == 5
    os.utime(folder / "train-00001-of-00002.parquet", ns=(0, 0))
    after = stamps(parquet_source(folder, **OPTIONS))
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, True, False, False]


def test_without_pyarrow_the_line_that_installs_it_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        InputError, match=r'needs pyarrow .*: pip install -c constraints\.txt -e "\.\[parquet\]"'
    ):
        parquet_source(folder, **OPTIONS)


@pytest.mark.parametrize("source", ["folder", "imagenet"])
@pytest.mark.parametrize("where", ["", "data", "data/train-00000-of-00002.parquet"])
def test_another_source_that_is_given_parquet_names_the_right_one(
    folder: Path, source: str, where: str
) -> None:
    given = {**dict.fromkeys(SOURCES["parquet"]), "path": folder.parent / where, "resolution": 8}
    with pytest.raises(InputError, match=r"train-00000\S+ is for `ict-fast prepare parquet`$"):
        open_source(source, given)
