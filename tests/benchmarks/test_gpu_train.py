"""Part train of run_gpu.py: its copy of the digits, its distance, its images, and how long it trains."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ict_fast import consistency
from ict_fast.data.prepare import load_digits

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
digits_copy: Any = importlib.import_module("digits_copy")
gpu_train: Any = importlib.import_module("gpu_train")
CPU = torch.device("cpu")


def test_the_copy_holds_scikit_learns_digits() -> None:
    images, labels = load_digits()
    assert np.array_equal(digits_copy.load()["images"], images)
    assert np.array_equal(digits_copy.load()["labels"], labels)


def test_its_distance_is_torchmetrics(torchmetrics_distance: Callable[..., float]) -> None:
    images, _ = load_digits()
    blurred = ((images.astype(int) + np.roll(images, 1, axis=2)) // 2).astype(np.uint8)[:700]
    theirs = torchmetrics_distance(images, blurred)
    ours = digits_copy.frechet_distance(
        *(digits_copy.features(torch.from_numpy(each).permute(0, 3, 1, 2)) for each in (blurred, images))
    )
    assert theirs > 1
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_means_over_blocks_give_the_digits_back(tmp_path: Path) -> None:
    store = gpu_train.digits_store(tmp_path / "store")
    assert store.images.shape == (1797, 32, 32, 1)
    pixels = torch.from_numpy(np.array(store.images[:50])).permute(0, 3, 1, 2)
    images = pixels.float() / 127.5 - 1
    digits = torch.from_numpy(load_digits()[0][:50]).permute(0, 3, 1, 2)
    assert torch.equal(gpu_train.to_digits(images), digits)
    assert gpu_train.within_blocks(images) < 1e-6
    moved = images + 0.1 * torch.tensor([1.0, -1.0]).repeat(16)  # deviates by 0.1 within every block
    assert gpu_train.within_blocks(moved) == pytest.approx(0.1, rel=1e-3)
    assert np.array_equal(gpu_train.unpacked(gpu_train.packed(pixels)), pixels.numpy())


def test_it_trains_through_all_stages_and_evaluates() -> None:
    """The record of the tiny form, whose figures say nothing."""
    config = gpu_train.train_config(CPU)
    *_, record = gpu_train.measure_training(config, CPU, budget_seconds=1.0)
    stages = consistency.stages(record["total_steps"], config.method)
    assert [each["num_scales"] for each in record["stages"]] == [stage.num_scales for stage in stages]
    assert record["stages"][-1]["num_scales"] == 1281
    assert record["stages"][-1]["last_step"] == record["total_steps"]
    assert all(each["skipped"] == 0 for each in record["stages"])
    assert record["one_step"]["finite"]
    assert 0 < record["reference"]["halves"] < record["reference"]["noise"]


def test_a_run_whose_length_is_chosen_late_is_the_run_of_that_length() -> None:
    # The steps before the choice see N and rates that no possible length would change.
    config = gpu_train.train_config(torch.device("cuda"))
    before = 1 + gpu_train.CALIBRATION_STEPS["cuda"]
    least, most = 16 * gpu_train.CALIBRATION_STEPS["cuda"], gpu_train.MOST_STEPS["cuda"]
    for total in (least, 1000, most):
        for step in range(before):
            assert consistency.num_scales(step, total, config.method) == 11
    assert config.optimizer.lr_decay == 0
