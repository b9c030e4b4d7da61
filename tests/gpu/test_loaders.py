"""The loaders on a GPU: the CPU's bytes, on the stream in use, while the device lags behind the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from ict_fast.data.dali_loader import dali_problem
from ict_fast.data.loaders import LOADERS, Batch, Loader, choose_loader
from ict_fast.data.store import Store, open_store, write_store
from ict_fast.errors import InputError

NEEDS_DALI = pytest.mark.skipif(dali_problem() is not None, reason=f"dali loader: {dali_problem()}")
KINDS = ["memmap", "resident", pytest.param("dali", marks=NEEDS_DALI)]
STEPS = range(40)
LAG = 2_000_000  # device clock cycles, about a millisecond: far longer than the copies of a batch


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    random = np.random.default_rng(7)
    images = random.integers(0, 256, (999, 16, 16, 3), dtype=np.uint8)
    labels, classes = np.arange(999) % 3, ["a", "b", "c"]
    path = tmp_path_factory.mktemp("gpu") / "store"
    return open_store(write_store(path, images, labels, source="test", recipe="random", classes=classes))


def new_loader(kind: str, store: Store, device: str) -> Loader:
    return LOADERS[kind](store, batch_size=96, seed=3, flip=True, micro_batch=48, device=torch.device(device))


def copied(batches: list[Batch]) -> list[torch.Tensor]:
    """The tensors of a step, copied on the current stream: what a kernel that is queued now will read."""
    return [tensor.clone() for batch in batches for tensor in batch[:3]]


def assert_are_the_cpus(store: Store, received: list[list[torch.Tensor]]) -> None:
    with new_loader("memmap", store, "cpu") as loader:
        for step, tensors in zip(STEPS, received, strict=True):
            for ours, theirs in zip(tensors, copied(loader.micro_batches(step)), strict=True):
                assert ours.is_cuda
                assert torch.equal(ours.cpu(), theirs), step


@contextmanager
def synchronisation_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_lags_reads_what_each_step_delivered(kind: str, store: Store) -> None:
    received = []
    with new_loader(kind, store, "cuda") as loader:
        for step in STEPS:
            batches = loader.micro_batches(step)
            torch.cuda._sleep(LAG)
            received.append(copied(batches))
            del batches  # while the copies that read it are still queued
    assert_are_the_cpus(store, received)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_ready_on_whichever_stream_is_current(kind: str, store: Store) -> None:
    received = []
    with torch.cuda.stream(torch.cuda.Stream()), new_loader(kind, store, "cuda") as loader:
        for step in STEPS:
            torch.cuda._sleep(LAG)
            received.append(copied(loader.micro_batches(step)))
        torch.cuda.current_stream().synchronize()
    assert_are_the_cpus(store, received)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_that_are_kept_never_change(kind: str, store: Store) -> None:
    with new_loader(kind, store, "cuda") as loader:
        held = [loader.micro_batches(step) for step in STEPS]
        torch.cuda.synchronize()
        assert_are_the_cpus(store, [copied(batches) for batches in held])


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_never_waits_for_the_device(kind: str, store: Store) -> None:
    with new_loader(kind, store, "cuda") as loader:
        for step in range(4):
            loader.micro_batches(step)
        with synchronisation_is_an_error():
            for step in range(4, 12):
                loader.micro_batches(step)


def test_a_store_that_does_not_fit_is_refused_before_anything_is_allocated(store: Store) -> None:
    _, total = torch.cuda.mem_get_info()
    endless = np.broadcast_to(store.images[:1], (total // 768 + 1, 16, 16, 3))
    with pytest.raises(InputError, match=r"resident, which needs [\d,]+ bytes .*; [\d,]+ bytes are free"):
        new_loader("resident", replace(store, images=endless), "cuda")


def test_a_small_store_is_resident_where_dali_is_absent(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ict_fast.data.loaders.dali_problem", lambda: "DALI is not installed")
    assert choose_loader("auto", store, torch.device("cuda"))[0] == "resident"
