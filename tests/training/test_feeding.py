"""What loaders deliver and a step consumes: the arithmetic by a made-up clock, choices by made-up rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ict_fast import presets
from ict_fast.config import Config
from ict_fast.data.dali_loader import dali_problem
from ict_fast.data.loaders import LOADERS
from ict_fast.data.store import open_store, write_store
from ict_fast.errors import InputError
from ict_fast.training import feeding
from ict_fast.training.feeding import Feeding, Rate, loader_rate, measure, step_rate

CPU = torch.device("cpu")


def ignore(fraction: float, what: str) -> None:
    pass


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements stop after their least number of steps."""
    monkeypatch.setattr(feeding, "_SECONDS", 0.0)


def a_store(path: Path, resolution: int, channels: int, classes: int, count: int = 5) -> Path:
    images = np.zeros((count, resolution, resolution, channels), np.uint8)
    names = [str(number) for number in range(classes)]
    labels = np.arange(count) % max(classes, 1)
    return write_store(path, images, labels, source="test", recipe="zero", classes=names)


@pytest.mark.parametrize(("cost", "steps"), [(0.25, 6), (2.0, 3), (0.01, 150)])
def test_a_rate_is_images_per_second_of_a_clock(
    monkeypatch: pytest.MonkeyPatch, cost: float, steps: int
) -> None:
    now, calls = [100.0], []

    def run(step: int) -> None:
        calls.append(step)
        now[0] += cost if step >= 2 else 50.0  # what does not count may take long

    monkeypatch.setattr(feeding.time, "perf_counter", lambda: now[0])
    assert feeding._images_per_second(run, 10, CPU) == pytest.approx(10 / cost)
    assert calls[:4] == [0, 1, 2, 3]
    assert abs(len(calls) - 2 - steps) <= 1  # 1.5 s, and three steps at least


def test_who_delivers_less_than_the_step_consumes_starves_it() -> None:
    rates = {"dali": Rate(5.0), "resident": Rate(None, reason="too large"), "memmap": Rate(20.0)}
    found = Feeding("", "", "", Rate(10.0), rates, "memmap")
    assert (found.starving, found.fastest) == (["dali"], "memmap")
    assert replace(found, step=Rate(None, reason="large")).starving == []


def test_everything_is_measured_on_the_preset_that_takes_the_images(
    at_once: None, digits_store: Path
) -> None:
    told: list[tuple[float, str]] = []
    found = measure(digits_store, None, 16, progress=lambda *progress: told.append(progress))
    assert (found.preset, found.device, found.auto) == ("digits", "cpu", "memmap")
    assert list(found.loaders) == ["dali", "resident", "memmap"]
    for rate in [found.step, *found.loaders.values()]:
        if rate is not found.loaders["dali"] or dali_problem() is None:
            assert rate.images_per_second > 0
            assert rate.batch_size == 16
    assert [fraction for fraction, _ in told] == [0, 0.25, 0.5, 0.75]
    assert told[-1][1] == "training step"


def test_images_that_no_preset_takes_are_loaded_but_not_trained_on(at_once: None, tmp_path: Path) -> None:
    found = measure(a_store(tmp_path / "s", 5, 3, 0), None, 4, progress=ignore)
    assert found.step == Rate(None, reason="no preset takes 5x5 images of 3 channels")
    assert found.loaders["memmap"].images_per_second > 0
    with pytest.raises(InputError, match="right for them: none takes such images"):
        measure(tmp_path / "s", "digits", 4, progress=ignore)


@pytest.mark.parametrize(("resolution", "preset", "size"), [(32, "cifar10", "56 M"), (64, "imagenet64", "")])
def test_a_network_for_a_gpu_is_not_trained_on_a_cpu(
    at_once: None, tmp_path: Path, resolution: int, preset: str, size: str
) -> None:
    found = measure(a_store(tmp_path / "s", resolution, 3, 4), None, 4, progress=ignore)
    assert found.preset == preset
    assert found.step.images_per_second is None
    assert found.step.reason.startswith(size)
    assert found.step.reason.endswith("M parameters are for a GPU")


def test_each_loader_begins_in_another_epoch(
    at_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(a_store(tmp_path / "s", 8, 1, 0, count=10))
    first: dict[str, int] = {}

    def watched(name: str) -> Callable:
        def load(self, step: int):
            first.setdefault(name, step)
            return original(self, step)

        original = LOADERS[name]._load
        return load

    names = [name for name in LOADERS if name != "dali" or dali_problem() is None]
    for name in names:
        monkeypatch.setattr(LOADERS[name], "_load", watched(name))
    config = presets.get("digits")
    config = replace(config, training=replace(config.training, batch_size=4))
    for name in names:
        loader_rate(name, config, store, CPU)
    epochs = {name: step * 4 // 10 for name, step in first.items()}
    assert len(set(epochs.values())) == len(names)


def test_a_loader_that_cannot_be_used_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits_store: Path
) -> None:
    monkeypatch.setattr("ict_fast.data.resident_loader.free_bytes", lambda device: 7)
    rate = loader_rate("resident", presets.get("digits"), open_store(digits_store), CPU)
    assert rate.images_per_second is None
    assert "7 bytes are free" in rate.reason


def test_a_loader_that_breaks_says_so_in_its_row_and_the_others_are_measured(
    at_once: None, monkeypatch: pytest.MonkeyPatch, digits_store: Path
) -> None:
    def fail(self: object, step: int) -> None:
        raise RuntimeError("CUDA error: out of luck\nStacktrace (12 entries):")

    monkeypatch.setattr(LOADERS["resident"], "_load", fail)
    found = measure(digits_store, None, 16, progress=ignore)
    assert found.loaders["resident"] == Rate(None, reason="CUDA error: out of luck")
    assert found.loaders["memmap"].images_per_second > 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, digits_store: Path) -> Callable[..., tuple[Rate, list[int]]]:
    """Measures a step on a GPU that has the given rates, by batch size; beyond them its memory ends."""

    def measured(batch_size: int, rates: dict[int, float]) -> tuple[Rate, list[int]]:
        tried: list[int] = []

        def rate(run: object, size: int, device: torch.device) -> float:
            tried.append(size)
            if size not in rates:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return rates[size]

        def loader(name: str, config: Config, store: object, device: torch.device, size: int):
            return LOADERS[name](store, batch_size=size, seed=0, flip=False, device=CPU)

        monkeypatch.setattr(feeding, "TrainStep", lambda config, device: lambda step, micro_batches: None)
        monkeypatch.setattr(feeding, "_images_per_second", rate)
        monkeypatch.setattr(feeding, "_loader", loader)
        config = presets.get("digits")
        config = replace(config, training=replace(config.training, batch_size=batch_size))
        return step_rate(config, open_store(digits_store), torch.device("cuda")), tried

    return measured


def test_on_a_gpu_batches_grow_while_that_gains(gpu: Callable[..., tuple[Rate, list[int]]]) -> None:
    rates = {32: 100.0, 64: 190.0, 128: 300.0, 256: 303.0, 512: 900.0}
    assert gpu(1024, rates) == (Rate(303.0, 256), [32, 64, 128, 256])
    assert gpu(100, {32: 100.0, 64: 190.0, 100: 250.0}) == (Rate(250.0, 100), [32, 64, 100])
    assert gpu(16, {16: 40.0}) == (Rate(40.0, 16), [16])


def test_on_a_gpu_the_memory_ends_the_growth(gpu: Callable[..., tuple[Rate, list[int]]]) -> None:
    assert gpu(1024, {32: 100.0, 64: 190.0}) == (Rate(190.0, 64), [32, 64, 128])
    nothing, _ = gpu(1024, {})
    assert nothing == Rate(None, reason="no batch fits into its memory")
