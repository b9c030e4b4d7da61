"""The memmap loader's thread, and its pinned buffers."""

import threading

import numpy as np
import pytest
import torch

from ict_fast.data import memmap_loader
from ict_fast.data.memmap_loader import MemmapLoader
from ict_fast.data.order import batch_indices
from ict_fast.data.staging import Staging
from ict_fast.data.store import Store

CPU = torch.device("cpu")


def test_the_next_step_is_prepared_while_this_one_is_used(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = threading.Semaphore(0)
    steps: list[tuple[int, bool]] = []

    def watch(num_images: int, seed: int, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        steps.append((step, threading.current_thread() is threading.main_thread()))
        prepared.release()
        return batch_indices(num_images, seed, step, batch_size)

    monkeypatch.setattr("ict_fast.data.batches.batch_indices", watch)
    with MemmapLoader(store, batch_size=12, seed=0, flip=False, device=CPU) as loader:
        loader.micro_batches(0)
        for _ in range(2):  # step 0 and, with no further call, step 1; never step 2
            assert prepared.acquire(timeout=30)
        assert not prepared.acquire(timeout=0.1)
    assert steps == [(0, False), (1, False)]


def test_its_thread_has_a_name_and_ends_with_the_loader(store: Store) -> None:
    loader = MemmapLoader(store, batch_size=12, seed=0, flip=False, device=CPU)
    loader.micro_batches(0)
    assert any(thread.name.startswith("ict-fast-loader") for thread in threading.enumerate())
    loader.close()
    assert not any(thread.name.startswith("ict-fast-loader") for thread in threading.enumerate())


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", [1]), ("cuda", [3]), ("cpu", [])])
def test_its_thread_works_on_the_loaders_gpu(
    store: Store, monkeypatch: pytest.MonkeyPatch, device: str, expected: list[int]
) -> None:
    chosen: list[tuple[int, str]] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda index: chosen.append((index, threading.current_thread().name))
    )
    monkeypatch.setattr(memmap_loader, "Staging", lambda device, layout: Staging(CPU, layout))
    with MemmapLoader(store, batch_size=12, seed=0, flip=False, device=torch.device(device)) as loader:
        loader._thread.submit(lambda: None).result()
    assert [index for index, _ in chosen] == expected
    assert all(thread.startswith("ict-fast-loader") for _, thread in chosen)
