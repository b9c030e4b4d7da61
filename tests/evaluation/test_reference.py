"""What may be compared with: stores, statistics, samples; and what is refused, in one line."""

import dataclasses
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ict_fast.cli import main
from ict_fast.config import Config, DataConfig
from ict_fast.consistency import load_model
from ict_fast.data.store import write_store
from ict_fast.errors import InputError
from ict_fast.evaluation.chunks import Finished, reference_chunks
from ict_fast.evaluation.measured_reference import MOST_FEATURES, chosen_images, put_together
from ict_fast.evaluation.reference import Images, Reference, check_reference, labels_as_in, open_reference
from ict_fast.training.trainer import train


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def gaussian(size=5):
    root = np.random.default_rng(0).normal(size=(size, size))
    return {"mu": np.arange(size) / 7, "sigma": root @ root.T}


def images(count=6, size=8, channels=1):
    return np.random.default_rng(1).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def store(path, recipe, count=6):
    return write_store(
        path, images(count), np.zeros(count, np.int64), source="test", recipe=recipe, classes=()
    )


def trained_on(path):
    return dataclasses.replace(Config(), data=DataConfig(path=str(path)))


def test_statistics_of_an_npz_are_read_in_float64(tmp_path):
    values = {name: value.astype(np.float32) for name, value in gaussian().items()}
    reference = open_reference(save(tmp_path / "stats.npz", **values))
    assert reference.kind == "statistics"
    assert reference.images is None
    assert reference.statistics.mean.dtype == reference.statistics.covariance.dtype == np.float64
    assert np.array_equal(reference.statistics.covariance, values["sigma"])


def test_samples_of_an_npz_are_read_whoever_wrote_their_labels(tmp_path):
    reference = open_reference(save(tmp_path / "samples.npz", arr_0=images(), arr_1=np.arange(6)))
    assert (reference.kind, reference.resolution, len(reference.images)) == ("samples", 8, 6)
    assert np.array_equal(reference.images.array, images())


def test_a_file_with_both_keeps_its_statistics_and_a_part_of_the_images(tmp_path):
    """As OpenAI's VIRTUAL files: statistics of the whole set, and 10,000 of its images."""
    path = save(tmp_path / "VIRTUAL_imagenet64_labeled.npz", arr_0=images(size=64, channels=3), **gaussian())
    reference = open_reference(path)
    assert reference.statistics is not None
    assert len(reference.images) == 6
    assert reference.recipe == "center-crop-dhariwal"


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu has shape \(3,\) and sigma \(4, 4\)"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "hold NaN"),
        ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "not symmetric"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu has shape \(0,\)"),
        (
            {"mu": np.zeros(3), "sigma": np.full((3, 3), "1")},
            "sigma <U1; they must be floats",
        ),
        ({"mu": np.zeros(3), "sigma": 1j * np.eye(3)}, "sigma complex128; they must be floats"),
        ({"mu": np.zeros(3), "sigma": -np.eye(3)}, "sigma has the eigenvalue -1, so it is no covariance"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2], [2, 1]])}, "sigma has the eigenvalue -1, so"),
        ({"mu": np.zeros(3), "sigma": 1e308 * np.eye(3)}, "or huge values"),
        ({"mu": np.full(3, 1e200), "sigma": np.eye(3)}, "or huge values"),
        ({"mu": np.zeros(3)}, "holds mu; --reference takes an .npz with mu and sigma"),
        ({"x": np.zeros(3)}, "holds x; --reference takes"),
        ({"arr_0": np.zeros((4, 8, 8, 3))}, "arr_0 is float64"),
        ({"arr_0": np.zeros((4, 3, 8, 8), np.uint8)}, "arr_0 is uint8 of shape"),
        ({"mu": np.array([print], dtype=object), "sigma": np.eye(1)}, "holds a pickle, which is not read"),
    ],
)
def test_a_file_that_cannot_be_a_reference_is_refused(tmp_path, arrays, said):
    with pytest.raises(InputError, match=said) as refused:
        open_reference(save(tmp_path / "reference.npz", **arrays))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n", b"mu 0 sigma 1\n", b"\x80\x04K\x01."])
def test_a_file_of_another_kind_is_not_said_to_hold_a_pickle(tmp_path, content):
    path = tmp_path / "reference.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"reference\.npz: no \.npz, or truncated or damaged; "):
        open_reference(path)


def test_a_file_that_is_not_there_is_not_to_be_prepared(tmp_path):
    with pytest.raises(InputError, match=r"cifar10-32x32\.npz: there is no such file; docs/data\.md has"):
        open_reference(tmp_path / "cifar10-32x32.npz")


def test_a_single_array_is_refused(tmp_path):
    np.save(tmp_path / "images.npy", images())
    with pytest.raises(InputError, match=r"images\.npy: is a single array; --reference takes an \.npz"):
        open_reference(tmp_path / "images.npy")


@pytest.mark.parametrize("keep", [0, 100, -30])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = save(tmp_path / "stats.npz", **gaussian())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="truncated or damaged"):
        open_reference(path)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["arr_0", "sigma"])
def test_an_array_that_is_damaged_is_refused_when_it_is_read(tmp_path, write, name):
    arrays = {"arr_0": images(size=32)} if name == "arr_0" else gaussian(64)
    path = tmp_path / "reference.npz"
    write(path, **arrays)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        begin = archive.getinfo(f"{name}.npy").header_offset
        middle = begin + archive.getinfo(f"{name}.npy").compress_size // 2
    content[middle : middle + 8] = bytes(255 - byte for byte in content[middle : middle + 8])
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"reference\.npz: .*damaged"):
        assert open_reference(path).images.array.size


@pytest.mark.parametrize("name", ["real.npz", "images.npy"])
def test_images_that_go_away_are_said_to_be_unreadable(tmp_path, name):
    with pytest.raises(InputError, match=rf"{name}: cannot be read: No such file"):
        _ = Images(tmp_path / name, (4, 8, 8, 1)).array


def test_another_crop_recipe_is_refused_unless_told_to(tmp_path):
    ours = store(tmp_path / "ours", "8x8 grey, center-crop")
    theirs = open_reference(store(tmp_path / "theirs", "8x8 grey, center-crop-dhariwal"))
    config = trained_on(ours)
    with pytest.raises(InputError, match=r"recipe '8x8 grey, center-crop-dhariwal'.*--allow-other-recipe"):
        check_reference(theirs, config, allow_other_recipe=False)
    assert check_reference(theirs, config, allow_other_recipe=True) == []
    assert check_reference(open_reference(ours), config, allow_other_recipe=False) == []


def test_published_statistics_have_the_recipe_of_their_name(tmp_path):
    config = trained_on(store(tmp_path / "ours", "64x64 RGB, center-crop"))
    config = dataclasses.replace(
        config, network=dataclasses.replace(config.network, resolution=64, image_channels=3)
    )
    edm = open_reference(save(tmp_path / "imagenet-64x64.npz", **gaussian()))
    openai = open_reference(save(tmp_path / "VIRTUAL_imagenet64_labeled.npz", **gaussian()))
    assert check_reference(edm, config, allow_other_recipe=False) == []
    with pytest.raises(InputError, match="center-crop-dhariwal"):
        check_reference(openai, config, allow_other_recipe=False)


@pytest.mark.parametrize(
    ("recipe", "data"), [("8x8 grey, as stored", "there"), ("8x8 grey, center-crop", "gone")]
)
def test_a_recipe_that_is_not_known_is_warned_of(tmp_path, recipe, data):
    reference = open_reference(store(tmp_path / "theirs", recipe))
    store(tmp_path / "there", "8x8 grey, center-crop")
    [warning] = check_reference(reference, trained_on(tmp_path / data), allow_other_recipe=False)
    assert "not known" in warning


def test_the_recipe_of_other_images_in_the_datas_place_is_not_the_models(tmp_path):
    reference = open_reference(store(tmp_path / "theirs", "8x8 grey, center-crop-dhariwal"))
    config = trained_on(store(tmp_path / "ours", "8x8 grey, center-crop"))
    fingerprint = open_reference(tmp_path / "ours").fingerprint
    with pytest.raises(InputError, match="--allow-other-recipe"):
        check_reference(reference, config, allow_other_recipe=False, data_fingerprint=fingerprint)
    [warning] = check_reference(reference, config, allow_other_recipe=False, data_fingerprint="0" * 64)
    assert "the crop recipe of the data that the model was trained on is not known" in warning


@pytest.mark.parametrize("command", ["evaluate", "search-sigma"])
def test_elsewhere_a_runs_relative_path_is_said_to_be_one(trained, tmp_path, monkeypatch, capsys, command):
    model = load_model(trained)
    data = Path(model.config.data.path)
    model.config = dataclasses.replace(model.config, data=DataConfig(path="data/digits"))
    monkeypatch.setattr("ict_fast.consistency.load_model", lambda *_, **__: model)
    monkeypatch.chdir(tmp_path)
    assert main([command, str(trained), "--count", "4"]) == 2
    said = capsys.readouterr().err
    assert (
        "data/digits, are not here: the path is from the directory in which the run was trained; name" in said
    )

    shutil.copytree(data, "moved", ignore=shutil.ignore_patterns("evaluation"))
    same = open_reference(Path("moved"))
    fingerprint = model.data_fingerprint
    assert check_reference(same, model.config, allow_other_recipe=False, data_fingerprint=fingerprint) == []
    other = open_reference(store(tmp_path / "other", "8x8 grey, center-crop"))
    [warning] = check_reference(other, model.config, allow_other_recipe=False, data_fingerprint=fingerprint)
    assert (
        "(data/digits, not here: the path is from the directory in which the run was trained) is" in warning
    )
    [warning] = check_reference(other, model.config, allow_other_recipe=False)  # of imported weights
    assert "directory" not in warning


@pytest.mark.parametrize("command", ["evaluate", "search-sigma"])
def test_other_images_in_the_datas_place_are_compared_with_only_where_they_are_named(
    tiny, tmp_path, monkeypatch, capsys, command
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny.data.path, "data")
    config = dataclasses.replace(tiny, data=DataConfig(path="data"))
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, total_steps=1))
    train(config, out=tmp_path / "run", device="cpu")
    words = ["--count", "4", *(["--high", "0.1"] if command == "search-sigma" else ["--steps", "1"])]
    assert main([command, "run", *words]) == 0
    shutil.rmtree("data")
    kept = np.load(f"{tiny.data.path}/images.npy")[::2]
    write_store(
        Path("data"), kept, np.zeros(len(kept), np.int64), source="test", recipe="8x8 grey", classes=()
    )
    capsys.readouterr()
    assert main([command, "run", *words]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "data holds other images than the model was trained on" in line
    assert "--reference" in line
    assert main([command, "run", *words, "--reference", "data"]) == 0


def test_another_resolution_is_refused(tmp_path):
    cifar10 = open_reference(save(tmp_path / "cifar10-32x32.npz", **gaussian()))
    with pytest.raises(InputError, match=r"of images of 32x32, the model makes 8x8"):
        check_reference(cifar10, Config(), allow_other_recipe=False)
    samples = open_reference(save(tmp_path / "samples.npz", arr_0=images(size=16)))
    with pytest.raises(InputError, match=r"holds images of 16x16 .* the model makes 8x8"):
        check_reference(samples, Config(), allow_other_recipe=False)


def test_a_singular_covariance_in_single_precision_is_one(tmp_path):
    """Of fewer samples than features; rounding leaves eigenvalues of both signs."""
    samples = np.random.default_rng(0).normal(size=(20, 300))
    covariance = np.cov(samples, rowvar=False).astype(np.float32)
    assert np.linalg.eigvalsh(covariance.astype(np.float64))[0] < 0
    reference = open_reference(save(tmp_path / "stats.npz", mu=samples.mean(0), sigma=covariance))
    assert reference.statistics is not None


def test_of_a_store_sorted_by_class_labels_and_features_are_drawn_from_everywhere():
    """What is fewer than the store holds would else be the first classes alone."""
    count = 1000
    sorted_store = Reference(
        path=Path("store"),
        kind="store",
        fingerprint="",
        images=Images(Path("images.npy"), (count, 8, 8, 1)),
        labels=np.arange(count) // 100,
        num_classes=10,
    )
    labels = labels_as_in(sorted_store, 10, 300)
    assert np.bincount(labels, minlength=10) == pytest.approx(30, abs=15)
    finished, chunks = Finished(None), reference_chunks(count)
    for chunk in chunks:
        numbers = np.arange(chunk.first, chunk.first + chunk.count)[:, None]
        finished.keep(chunk, {"features": numbers, "mean": np.zeros(1), "products": np.zeros((1, 1))})
    features = put_together(sorted_store, finished, chunks).features
    assert sorted(features[:, 0]) == list(range(count))
    assert np.bincount(features[:300, 0] // 100, minlength=10) == pytest.approx(30, abs=15)


def test_of_a_large_store_the_features_that_are_kept_are_of_images_from_everywhere():
    count = 8 * MOST_FEATURES
    chosen = chosen_images(count)
    assert len(chosen) == MOST_FEATURES
    assert (np.diff(chosen) > 0).all()
    assert np.bincount(chosen * 10 // count, minlength=10) == pytest.approx(MOST_FEATURES / 10, rel=0.05)


def test_the_statistics_of_a_file_count_and_not_those_of_the_part_of_the_images_in_it(tmp_path):
    path = save(tmp_path / "virtual.npz", arr_0=images(), **gaussian(2))
    reference, finished, [chunk] = open_reference(path), Finished(None), reference_chunks(6)
    features = np.random.default_rng(2).normal(size=(6, 2))
    finished.keep(chunk, {"features": features, "mean": features.mean(0), "products": np.eye(2)})
    measured = put_together(reference, finished, [chunk])
    assert np.array_equal(measured.statistics.mean, gaussian(2)["mu"])
    assert np.array_equal(measured.statistics.covariance, gaussian(2)["sigma"])
    assert measured.count is None
    assert sorted(measured.features.tolist()) == sorted(features.tolist())


def test_where_the_reference_has_no_labels_every_class_is_sampled_equally_often(tmp_path):
    reference = open_reference(save(tmp_path / "samples.npz", arr_0=images()))
    assert np.bincount(labels_as_in(reference, 7, 21)).tolist() == [3] * 7
    assert labels_as_in(reference, 0, 21) is None
