"""The loaders beside torch's DataLoader, 64x64 in batches of 256: `pytest benchmarks/ --benchmark-only`.

Every contestant gathers the same images in the same order into batches of its own, labels included; the three
loaders draw flip bits as well. A round is a sixteenth of the store; bytes moved per image: 12,288 read and as
many written. The store lies in the page cache: what is measured is the path, not the disk.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ict_fast.data.dali_loader import dali_problem
from ict_fast.data.loaders import LOADERS
from ict_fast.data.order import batch_indices
from ict_fast.data.store import Store, open_store, write_store

NUM_IMAGES, RESOLUTION, BATCH = 20_480, 64, 256
STEPS_PER_ROUND = 80
ROUNDS = 15
# Images per second on two cores.
FLOORS = {"memmap": 500_000, "dali": 150_000}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    random = np.random.default_rng(0)
    blocks = (random.integers(0, 256, (1024, RESOLUTION, RESOLUTION, 3), np.uint8) for _ in range(20))
    labels = np.arange(NUM_IMAGES) % 10
    folder = tmp_path_factory.mktemp("loaders") / "store"
    classes = [str(number) for number in range(10)]
    return open_store(write_store(folder, blocks, labels, source="random", recipe="random", classes=classes))


class Samples(Dataset):
    """The store as torch's DataLoader wants it, one sample at a time."""

    def __init__(self, store: Store) -> None:
        self.images, self.labels = np.asarray(store.images), store.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.images[index].copy()), int(self.labels[index])


class Batches(Samples):
    """The same, a batch at a time: the fastest that DataLoader offers."""

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self.images[indices]), torch.from_numpy(self.labels[indices])


def index_lists(num_images: int) -> Iterator[list[int]]:
    """The batches of the run of seed 0, for ever."""
    step = 0
    while True:
        yield batch_indices(num_images, 0, step, BATCH)[0].tolist()
        step += 1


def measure(benchmark: Any, take: Callable[[], object], name: str) -> float:
    """Runs rounds of steps; images per second of the fastest: what else runs can only slow a round."""

    def run() -> None:
        for _ in range(STEPS_PER_ROUND):
            take()

    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    images, stats = STEPS_PER_ROUND * BATCH, benchmark.stats.stats
    rates = {"median": images / stats.median, "slowest": images / stats.max, "fastest": images / stats.min}
    benchmark.extra_info.update(
        contestant=name,
        images_per_second={round_: round(rate) for round_, rate in rates.items()},
        batch_size=BATCH,
        bytes_per_image=2 * 3 * RESOLUTION**2,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        numpy=np.__version__,
        cpu=platform.processor() or platform.machine(),
    )
    return rates["fastest"]


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.benchmark(group="loaders, 64x64, CPU")
def test_loader(benchmark: Any, store: Store, name: str) -> None:
    if name == "dali" and dali_problem() is not None:
        pytest.skip(f"dali loader: {dali_problem()}")
    with LOADERS[name](store, batch_size=BATCH, seed=0, flip=True, device=torch.device("cpu")) as loader:
        steps = iter(range(10**9))
        rate = measure(benchmark, lambda: loader.micro_batches(next(steps)), name)
    assert rate >= FLOORS.get(name, 0)


@pytest.mark.parametrize("kind", [Samples, Batches], ids=["per sample", "__getitems__"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.benchmark(group="loaders, 64x64, CPU")
def test_torch_dataloader(benchmark: Any, store: Store, kind: type[Samples], workers: int) -> None:
    batched = kind is Batches
    loader = DataLoader(
        kind(store),
        batch_sampler=index_lists(store.num_images),
        num_workers=workers,
        collate_fn=(lambda batch: batch) if batched else None,
    )
    batches = iter(loader)
    measure(benchmark, lambda: next(batches), f"DataLoader {kind.__name__}, {workers} workers")
