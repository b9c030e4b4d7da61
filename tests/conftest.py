"""Set-up that several test files share."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from ict_fast import presets
from ict_fast.config import Config

# One thread, here and in every process that a test starts: results are compared to the last bit, and
# processes that run side by side on two cores would spin against each other with more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


# Files whose long work runs beside all other tests, one thing after the other, on the second core. Each has a
# function `beside`: name -> what to do.
_BESIDE = ("test_interpreted.py", "test_readme.py")
_DONE: dict[ModuleType, dict[str, Future[Any]]] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for work beside the other tests comes last."""
    items.sort(key=lambda item: item.path.name in _BESIDE)


def pytest_collection_finish(session: pytest.Session) -> None:
    waiting = [item for item in session.items if item.path.name in _BESIDE]
    if not 0 < len(waiting) < len(session.items) or session.config.option.collectonly:
        return
    pool = ThreadPoolExecutor(max_workers=1)
    for module in dict.fromkeys(item.module for item in waiting):  # type: ignore[attr-defined]
        _DONE[module] = {name: pool.submit(work) for name, work in module.beside().items()}


def pytest_sessionfinish() -> None:
    """A session that ends early does not wait for what has not begun."""
    for work in _DONE.values():
        for future in work.values():
            future.cancel()


@pytest.fixture
def done_beside(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """Gives the result of a piece of work of this file by its name; does it now, if nothing ran beside."""

    def result(name: str) -> Any:
        started = _DONE.get(request.module)
        return request.module.beside()[name]() if started is None else started[name].result()

    return result


@pytest.fixture(scope="session")
def digits_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared digits."""
    from ict_fast.data.prepare import prepare_digits

    return prepare_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture
def tiny(digits_store: Path) -> Config:
    """The digits preset shrunk until a step takes milliseconds; unconditional, dropout, all eight stages."""
    preset = presets.get("digits")
    return replace(
        preset,
        data=replace(preset.data, path=str(digits_store), flip=True),
        network=replace(preset.network, channels=8, num_classes=0, dropout=0.2),
        training=replace(preset.training, total_steps=24, batch_size=16),
        logging=replace(preset.logging, log_every=4, grid_every=0, checkpoint_every=5),
    )


@pytest.fixture(scope="session")
def trained(digits_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 24 steps of a tiny unconditional network; read only."""
    from ict_fast.training.trainer import train

    preset = presets.get("digits")
    config = replace(
        preset,
        data=replace(preset.data, path=str(digits_store)),
        network=replace(preset.network, channels=8, num_classes=0),
        training=replace(preset.training, total_steps=24, batch_size=16),
        logging=replace(preset.logging, grid_every=0),
    )
    return train(config, out=tmp_path_factory.mktemp("trained") / "run", device="cpu").out


@pytest.fixture(scope="session")
def torchmetrics_distance() -> Callable[[np.ndarray, np.ndarray], float]:
    """The Fréchet distance between sets of digits by torchmetrics: real and other uint8 (N, 8, 8, 1)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    from ict_fast.evaluation import digits_features

    def distance(real: np.ndarray, images: np.ndarray) -> float:
        metric = FrechetInceptionDistance(feature=digits_features(), normalize=False)
        for is_real, pixels in ((True, real), (False, images)):
            metric.update(torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2), real=is_real)
        return float(metric.compute())

    return distance
