"""The memmap loader's thread, and its pinned buffers."""

import threading

import numpy as np
import pytest
import torch

from ict_fast.data.memmap_loader import MemmapLoader
from ict_fast.data.order import batch_indices
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
