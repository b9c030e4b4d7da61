"""Part `data` of run_gpu.py: the loaders beside torch's DataLoader, from the page cache to the device.

Every contestant gathers the same images in the same order into batches of its own on the device, labels
included; the three loaders bring flip bits as well. Rounds are interleaved. Floor on a GPU: the images' bytes
over the rate of a pinned copy to the device, which the resident loader, that sends indices only, is not bound
by.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import median_seconds, seconds_of
from torch.utils.data import DataLoader, Dataset

from ict_fast.data.dali_loader import dali_problem
from ict_fast.data.loaders import LOADERS
from ict_fast.data.order import batch_indices
from ict_fast.data.store import Store, open_store, write_store

# (resolution, batch): what one GPU takes of ImageNet, of CIFAR-10, and a batch that keeps the host busy.
GPU_SIZES = ((64, 128), (64, 1024), (32, 512))
CPU_SIZES = ((8, 32),)
NUM_IMAGES = {"cuda": 20_480, "cpu": 512}
STEPS_PER_ROUND = {"cuda": 80, "cpu": 4}
ROUNDS = 7


def random_store(folder: Path, num_images: int, resolution: int, channels: int = 3) -> Store:
    """A store of random images of ten classes, a multiple of 512 of them."""
    random, shape = np.random.default_rng(0), (512, resolution, resolution, channels)
    blocks = (random.integers(0, 256, shape, np.uint8) for _ in range(num_images // 512))
    labels = np.arange(num_images // 512 * 512) % 10
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


def index_lists(num_images: int, batch: int) -> Iterator[list[int]]:
    """The batches of the run of seed 0, for ever."""
    step = 0
    while True:
        yield batch_indices(num_images, 0, step, batch)[0].tolist()
        step += 1


def torch_dataloader(
    kind: type[Samples], store: Store, batch: int, workers: int, device: torch.device
) -> Callable[[], Any]:
    """What takes the next batch of a DataLoader to the device; pinned on the way to a GPU."""
    loader = DataLoader(
        kind(store),
        batch_sampler=index_lists(store.num_images, batch),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        collate_fn=_as_it_is if kind is Batches else None,
    )
    batches = iter(loader)

    def take() -> list[torch.Tensor]:
        return [each.to(device, non_blocking=True) for each in next(batches)]

    return take


def _as_it_is(batch: Any) -> Any:
    return batch


def part_data(device: torch.device) -> dict[str, Callable[[], dict[str, Any]]]:
    """What to measure, by name; on a CPU a store of a few small images."""
    sizes = CPU_SIZES if device.type == "cpu" else GPU_SIZES
    return {
        f"loaders, {resolution}x{resolution}, batch {batch}": partial(
            measure_loaders, resolution, batch, device
        )
        for resolution, batch in sizes
    }


def measure_loaders(resolution: int, batch: int, device: torch.device) -> dict[str, Any]:
    """Images per second of every contestant, and what is absent with the reason."""
    steps = STEPS_PER_ROUND[device.type]
    left_out: dict[str, str] = {}
    with ExitStack() as open_things:
        folder = open_things.enter_context(tempfile.TemporaryDirectory())
        store = random_store(Path(folder) / "store", NUM_IMAGES[device.type], resolution)
        contestants: dict[str, Callable[[], Any]] = {}
        for name, kind in LOADERS.items():
            problem = dali_problem() if name == "dali" else None
            if problem is not None:
                left_out[name] = problem
                continue
            loader = open_things.enter_context(
                kind(store, batch_size=batch, seed=0, flip=True, device=device)
            )
            numbers = iter(range(10**9))
            contestants[name] = lambda loader=loader, numbers=numbers: loader.micro_batches(next(numbers))  # type: ignore[misc]
        for workers in (0, 4) if device.type == "cuda" else (0,):
            name = f"DataLoader, {workers} workers"
            contestants[name] = torch_dataloader(Batches, store, batch, workers, device)
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for number in range(ROUNDS + 1):
            for name, take in contestants.items():

                def run(take: Callable[[], Any] = take) -> None:
                    for _ in range(steps):
                        take()

                taken = seconds_of(run, device)
                if number:  # the first round warms up
                    seconds[name].append(taken)
    images, bytes_per_image = steps * batch, 3 * resolution**2
    rates = {name: images / statistics.median(each) for name, each in seconds.items()}
    record = {
        "resolution": resolution,
        "batch_size": batch,
        "bytes_per_image": bytes_per_image,
        "images_per_second_of": rates,
        "seconds_all": {name: [round(value, 6) for value in each] for name, each in seconds.items()},
        "left_out": left_out,
        "summary": ", ".join(f"{name} {rate:,.0f} images/s" for name, rate in rates.items()),
    }
    if device.type == "cuda":
        link = _link_gb_per_s(device)
        record |= {
            "host_to_device_gb_per_s": link,
            "percent_of_link": {
                name: 100 * rate * bytes_per_image / 1e9 / link
                for name, rate in rates.items()
                if name != "resident"  # its images are on the device already
            },
        }
    return record


def _link_gb_per_s(device: torch.device) -> float:
    """The rate of a large copy from pinned memory to the device."""
    source = torch.empty(2**28, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device=device)
    return source.nbytes / median_seconds(lambda: target.copy_(source, non_blocking=True), device) / 1e9
