"""Set-up that several test files share."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ict_fast import presets
from ict_fast.config import Config
from ict_kernels import backend

# One thread, here and in every process that a test starts: results are compared to the last bit, and
# processes that run side by side on two cores would spin against each other with more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# In every new cache Inductor compiles a program for each of the processor's vector units, to see whether the
# compiler knows them, which takes as long as two blocks. One that knows the newest of them knows all.
_NEWEST = ("-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16", "-mamx-int8")
with suppress(OSError):
    asked = [os.environ.get("CXX", "g++"), *_NEWEST, "-fsyntax-only", "-x", "c++", os.devnull]
    if subprocess.run(asked, capture_output=True, check=False).returncode == 0:
        os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

sys.path.append(str(Path(__file__).parent))  # for forked.py


# The files that take longest begin first: of several workers, none is left alone with one of them at the end.
_LONGEST = (
    "training/test_processes.py",
    "kernels/test_interpreted.py",
    "test_readme.py",
    "training/test_compilation.py",
    "training/test_resume.py",
    "benchmarks/test_run_gpu.py",
    "consistency/test_exactness.py",
    "evaluation/test_processes.py",
    "ablation/test_ablate.py",
    "benchmarks/test_gpu_train.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {Path(__file__).parent / name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_collection_finish() -> None:
    """What has been imported until now will stay: the garbage collector need not look at it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def bf16_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in bf16 are in bf16, also on a processor where the networks take them in fp32."""
    monkeypatch.setattr(backend, "_CPU_CONVOLVES_BADLY", frozenset([torch.float16]))


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests are in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def digits_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared digits."""
    from ict_fast.data.prepare import prepare_digits

    return prepare_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture
def tiny(digits_store: Path) -> Config:
    """The digits preset made small; unconditional, dropout in the blocks at 4x4, all eight stages."""
    preset = presets.get("digits")
    return replace(
        preset,
        data=replace(preset.data, path=str(digits_store), flip=True),
        network=replace(preset.network, channels=8, num_classes=0, dropout=0.2, dropout_max_resolution=4),
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
