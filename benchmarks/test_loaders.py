"""The loaders beside torch's DataLoader, 64x64 in batches of 256: `pytest benchmarks/ --benchmark-only`.

The contestants are those of gpu_data.py. A round is a sixteenth of the store; bytes moved per image: 12,288
read and as many written. The store lies in the page cache: what is measured is the path, not the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_data import Batches, Samples, part_data, random_store, torch_dataloader

from ict_fast.data.dali_loader import dali_problem
from ict_fast.data.loaders import LOADERS
from ict_fast.data.store import Store

NUM_IMAGES, RESOLUTION, BATCH = 20_480, 64, 256
STEPS_PER_ROUND = 80
ROUNDS = 7
CPU = torch.device("cpu")
BASELINE = "DataLoader Batches, 2 workers"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return random_store(tmp_path_factory.mktemp("loaders") / "store", NUM_IMAGES, RESOLUTION)


def measure(benchmark: Any, record: Any, take: Callable[[], object], name: str) -> None:
    """Runs rounds of steps, and keeps the rates of the slowest and the fastest too."""

    def run() -> None:
        for _ in range(STEPS_PER_ROUND):
            take()

    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    images, stats = STEPS_PER_ROUND * BATCH, benchmark.stats.stats
    record(
        op="loading 64x64 images, CPU",
        variant=name,
        baseline=BASELINE,
        minimum_bytes=2 * 3 * RESOLUTION**2 * images,
        images=images,
        batch_size=BATCH,
        slowest_and_fastest_images_per_second=[round(images / stats.max), round(images / stats.min)],
    )


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.benchmark(group="loaders, 64x64, CPU")
def test_loader(benchmark: Any, record: Any, store: Store, name: str) -> None:
    if name == "dali" and dali_problem() is not None:
        pytest.skip(f"dali loader: {dali_problem()}")
    with LOADERS[name](store, batch_size=BATCH, seed=0, flip=True, device=CPU) as loader:
        steps = iter(range(10**9))
        measure(benchmark, record, lambda: loader.micro_batches(next(steps)), name)


@pytest.mark.parametrize("kind", [Samples, Batches], ids=["per sample", "__getitems__"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.benchmark(group="loaders, 64x64, CPU")
def test_torch_dataloader(
    benchmark: Any, record: Any, store: Store, kind: type[Samples], workers: int
) -> None:
    take = torch_dataloader(kind, store, BATCH, workers, CPU)
    measure(benchmark, record, take, f"DataLoader {kind.__name__}, {workers} workers")


@pytest.mark.parametrize("name", part_data(torch.device("cuda")))
@pytest.mark.benchmark(group="loaders, GPU")
def test_loaders_on_a_gpu(benchmark: Any, gpu: torch.device, name: str) -> None:
    benchmark.extra_info.update(benchmark.pedantic(part_data(gpu)[name], rounds=1))
