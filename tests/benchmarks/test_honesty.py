"""The honesty checks tell a copier, a collapsed model and a confused one from real digits."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.distance import cdist

from ict_fast import presets
from ict_fast.data.store import Store, open_store
from ict_fast.training.trainer import train

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import honesty  # noqa: E402


@pytest.fixture(scope="module")
def store(digits_store: Path) -> Store:
    return open_store(digits_store)


def test_nearest_is_scipys(store: Store) -> None:
    images = np.array(store.images[:50])
    flat = images.reshape(50, -1) / 127.5
    expected = cdist(flat[:20], flat[20:])
    distances, numbers = honesty.nearest(images[:20], images[20:])
    np.testing.assert_allclose(distances, expected.min(1), rtol=1e-12)
    assert (numbers == expected.argmin(1)).all()
    among = cdist(flat, flat) + np.diag(np.full(50, np.inf))
    np.testing.assert_allclose(honesty.nearest(images, images, same=True)[0], among.min(1), rtol=1e-12)


def test_copies_are_found(store: Store) -> None:
    copies = np.array(store.images[:1000])
    found = honesty.measure(copies, np.array(store.labels[:1000]), store)
    assert found["neighbours"]["copies"] == 1000
    assert found["neighbours"]["nearer_than_1_percent_of_real"] == 1.0
    assert found["classes"]["as_asked"] > 0.97


def test_samples_are_as_far_from_each_other_as_real_digits_are_among_as_many(store: Store) -> None:
    """Of samples that are the real digits, and many more: more candidates would bring the nearest nearer."""
    real = np.array(store.images)
    found = honesty.measure(np.concatenate([real, real[::-1], real]), None, store)["neighbours"]
    assert found["sample_to_other_sample"] == found["real_to_other_real"]


def test_a_collapsed_model_has_no_recall_and_one_class(store: Store) -> None:
    noise = np.random.default_rng(0).integers(0, 2, (1000, 8, 8, 1), dtype=np.uint8)
    collapsed = store.images[3] + noise * (store.images[3] < 255)
    found = honesty.measure(collapsed.astype(np.uint8), None, store)
    assert found["manifold"]["samples"]["recall"] < 0.01
    assert found["classes"]["share_drawn"][int(store.labels[3])] > 0.99
    assert "as_asked" not in found["classes"]
    assert found["classes"]["largest_difference"] > 0.85


def test_uniform_noise_has_no_precision(store: Store) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1000, 8, 8, 1), dtype=np.uint8)
    found = honesty.measure(noise, np.arange(1000) % 10, store)
    assert found["manifold"]["samples"]["precision"] < 0.01
    assert found["manifold"]["halves"]["precision"] > 0.8
    assert (
        found["neighbours"]["sample_to_training"]["1 %"] > found["neighbours"]["real_to_other_real"]["50 %"]
    )


def test_the_picture_puts_samples_over_their_neighbours(store: Store, tmp_path: Path) -> None:
    honesty.picture(np.array(store.images[:30]), store, tmp_path / "honesty.png")
    with Image.open(tmp_path / "honesty.png") as picture:
        pixels = np.asarray(picture)
    # Tiles of 8 pixels, each enlarged 6 times, one white pixel between: two rows, the same images in both.
    assert pixels.shape == (6 * (2 * 9 + 1), 6 * (20 * 9 + 1))
    np.testing.assert_array_equal(pixels[6:54], pixels[60:108])


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert honesty.main([str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err


def of_source(picture: Path) -> str:
    with Image.open(picture) as drawn:
        return str(drawn.info["source-sha256"])


def test_the_report_of_two_runs_says_how_and_when_and_gives_every_class(
    trained: Path, digits_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = presets.get("digits")
    config = replace(
        preset,
        data=replace(preset.data, path=str(digits_store)),
        network=replace(preset.network, channels=8),
        training=replace(preset.training, total_steps=8, batch_size=8),
        logging=replace(preset.logging, grid_every=0),
    )
    asked = train(config, out=tmp_path / "runs/asked", device="cpu").out
    words = [str(asked), "--count", "1797", "--out", str(tmp_path)]
    capsys.readouterr()
    assert honesty.main([*words, "--unconditional", str(trained)]) == 0
    written = (tmp_path / "honesty.json").read_bytes()
    report = json.loads(written)
    page = capsys.readouterr().out
    assert of_source(tmp_path / "honesty.png") == hashlib.sha256(written).hexdigest()
    assert datetime.fromisoformat(report["date"]).tzinfo is not None
    assert report["date"][:10] in page
    assert {"ict-fast", "torch", "numpy", "python"} <= set(report["versions"])
    assert report["command"] == "python benchmarks/honesty.py runs/asked --unconditional runs/run"
    assert "as_asked" in report["classes"]
    assert "as_asked" not in report["unconditional"]["classes"]
    rows = [line.split("|")[2:-1] for line in page.splitlines() if "by the classifier |" in line]
    for row, classes in zip(rows, (report["classes"], report["unconditional"]["classes"]), strict=True):
        assert [float(cell) for cell in row] == [round(100 * share, 1) for share in classes["share_drawn"]]

    # The other way round the balance of the second was asked for.
    assert honesty.main([str(trained), "--count", "1797", "--unconditional", str(asked)]) == 2
    assert "takes one without" in capsys.readouterr().err
    assert honesty.main([str(trained), "--count", "1796"]) == 2
    assert "at least 1,797" in capsys.readouterr().err


def test_the_page_names_the_distance_from_the_data_as_a_weakness() -> None:
    report = json.loads((ROOT / "benchmarks/results/honesty.json").read_bytes())
    for sample, words in ((2.5, "25% farther from"), (1.8, "10% nearer to")):
        report["neighbours"]["sample_to_training"]["50 %"] = sample
        report["neighbours"]["real_to_other_real"]["50 %"] = 2.0
        assert f"a sample lies {words} the" in honesty.section(report)


def test_one_sample_of_ten_thousand_is_not_rounded_away() -> None:
    report = json.loads((ROOT / "benchmarks/results/honesty.json").read_bytes())
    report["neighbours"]["nearer_than_1_percent_of_real"] = 1 / report["count"]
    assert "0.01% are nearer to one" in honesty.section(report)


def test_the_committed_picture_is_that_of_the_committed_report() -> None:
    results = ROOT / "benchmarks/results"
    written = (results / "honesty.json").read_bytes()
    assert of_source(results / "honesty.png") == hashlib.sha256(written).hexdigest()
