"""Batches against the store itself: the right images, whoever loads them, whenever, in whatever pieces."""

import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from ict_fast.config import Config, DataConfig, TrainingConfig
from ict_fast.data import loaders
from ict_fast.data.loaders import Batch, MemmapLoader, make_loader
from ict_fast.data.order import batch_indices
from ict_fast.data.store import Store
from ict_fast.errors import InputError
from ict_kernels.philox import flip_bits

CPU = torch.device("cpu")


def load(store: Store, steps: list[int], **options) -> list[list[Batch]]:
    arguments = {"batch_size": 12, "seed": 3, "flip": True, "device": CPU, **options}
    with MemmapLoader(store, **arguments) as loader:
        return [loader.micro_batches(step) for step in steps]


def joined(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    flips = [batch.flip for batch in batches if batch.flip is not None]
    return (
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        torch.cat(flips),
    )


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    for ours, theirs in zip(joined(first), joined(second), strict=True):
        assert torch.equal(ours, theirs)


def test_a_batch_holds_the_images_labels_and_flips_of_its_step(store: Store) -> None:
    for step, [batch] in enumerate(load(store, list(range(8)))):
        indices, numbers = batch_indices(37, 3, step, 12)
        np.testing.assert_array_equal(batch.images.numpy(), store.images[indices])
        np.testing.assert_array_equal(batch.labels.numpy(), indices % 3)
        assert batch.flip is not None
        assert torch.equal(batch.flip, flip_bits(3, torch.from_numpy(numbers)))
        assert batch.offset == 0
        assert (batch.images.dtype, batch.labels.dtype, batch.flip.dtype) == (
            torch.uint8,
            torch.int64,
            torch.uint8,
        )


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch", [None, 1, 2])
def test_every_image_comes_once_per_epoch_over_all_ranks(
    store: Store, world_size: int, micro_batch: int | None
) -> None:
    # 37 batches of 24 are 24 whole epochs; most batches straddle a border.
    options = {"batch_size": 24, "world_size": world_size, "micro_batch": micro_batch}
    seen: list[tuple[int, int]] = []
    for rank in range(world_size):
        for step, batches in enumerate(load(store, list(range(37)), rank=rank, **options)):
            for batch in batches:
                numbers = step * 24 + batch.offset + np.arange(len(batch.images))
                seen += zip(numbers, batch.images[:, 0, 0, 0].tolist(), strict=True)
    seen.sort()
    assert [number for number, _ in seen] == list(range(37 * 24))
    for epoch in range(24):
        assert sorted(image for _, image in seen[epoch * 37 : (epoch + 1) * 37]) == list(range(37))


@pytest.mark.parametrize("world_size", [2, 3, 4, 6])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(store: Store, world_size: int) -> None:
    alone = load(store, [0, 1, 2, 3])
    for step in range(4):
        together = []
        for rank in range(world_size):
            [batches] = load(store, [step], rank=rank, world_size=world_size)
            assert [batch.offset for batch in batches] == [rank * 12 // world_size]
            together += batches
        assert_equal(alone[step], together)


@pytest.mark.parametrize("micro_batch", [1, 2, 6])
def test_micro_batches_are_cuts_of_the_batch(store: Store, micro_batch: int) -> None:
    [whole], [pieces] = load(store, [5]), load(store, [5], micro_batch=micro_batch)
    assert [batch.offset for batch in pieces] == list(range(0, 12, micro_batch))
    assert {len(batch.images) for batch in pieces} == {micro_batch}
    assert_equal(whole, pieces)


def test_a_batch_may_span_several_epochs(store: Store) -> None:
    [[batch]] = load(store, [1], batch_size=111)
    assert set(Counter(batch.images[:, 0, 0, 0].tolist()).values()) == {3}


def test_a_restart_at_any_step_continues_the_same_sequence(store: Store) -> None:
    unbroken = load(store, list(range(10)))
    for start in (1, 4, 9):
        for step, batches in zip(range(start, 10), load(store, list(range(start, 10))), strict=True):
            assert_equal(unbroken[step], batches)


def test_prefetching_changes_nothing(store: Store) -> None:
    in_order = load(store, list(range(6)))
    jumping = load(store, [5, 0, 3, 3, 4, 1])  # only 4 was prefetched
    for step, batches in zip([5, 0, 3, 3, 4, 1], jumping, strict=True):
        [fresh] = load(store, [step])
        assert_equal(in_order[step], batches)
        assert_equal(in_order[step], fresh)


def test_batches_belong_to_the_caller(store: Store) -> None:
    with MemmapLoader(store, batch_size=12, seed=3, flip=True, device=CPU) as loader:
        held = [loader.micro_batches(step) for step in range(8)]
        held[7][0].images.zero_()
        again = [loader.micro_batches(step) for step in range(7)]
    for step in range(7):
        assert_equal(held[step], again[step])
    assert store.images[:, 0, 0, 0].tolist() == list(range(37))


def test_without_flips_there_are_no_flip_bits(store: Store) -> None:
    [[batch]] = load(store, [0], flip=False)
    assert batch.flip is None


def test_the_next_step_is_prepared_while_this_one_is_used(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = threading.Semaphore(0)
    steps: list[tuple[int, bool]] = []
    original = loaders.batch_indices

    def watch(num_images: int, seed: int, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        steps.append((step, threading.current_thread() is threading.main_thread()))
        prepared.release()
        return original(num_images, seed, step, batch_size)

    monkeypatch.setattr(loaders, "batch_indices", watch)
    with MemmapLoader(store, batch_size=12, seed=0, flip=False, device=CPU) as loader:
        loader.micro_batches(0)
        for _ in range(2):  # step 0 and, with no further call, step 1; never step 2
            assert prepared.acquire(timeout=30)
        assert not prepared.acquire(timeout=0.1)
    assert steps == [(0, False), (1, False)]


def test_what_fails_in_the_thread_surfaces_at_the_call_and_can_be_tried_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, broken = loaders.batch_indices, [1]

    def fail_once(num_images: int, seed: int, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        if step in broken:
            broken.remove(step)
            raise OSError("the disk is gone")
        return original(num_images, seed, step, batch_size)

    monkeypatch.setattr(loaders, "batch_indices", fail_once)
    with MemmapLoader(store, batch_size=12, seed=3, flip=True, device=CPU) as loader:
        loader.micro_batches(0)
        with pytest.raises(OSError, match="the disk is gone"):
            loader.micro_batches(1)
        after = loader.micro_batches(1)
    monkeypatch.undo()
    assert_equal(after, load(store, [1])[0])


def test_close_ends_the_thread_and_may_be_repeated(store: Store) -> None:
    loader = MemmapLoader(store, batch_size=12, seed=0, flip=False, device=CPU)
    loader.micro_batches(0)
    assert any(thread.name.startswith("ict-fast-loader") for thread in threading.enumerate())
    loader.close()
    loader.close()
    assert not any(thread.name.startswith("ict-fast-loader") for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="shutdown"):
        loader.micro_batches(5)


def test_loading_leaves_no_warning_about_the_read_only_map(store: Store, recwarn) -> None:
    load(store, [0])
    assert not list(recwarn)


def test_a_share_that_cannot_be_cut_is_refused_by_name(store: Store) -> None:
    with pytest.raises(InputError, match=r"--training\.micro-batch is 4; it must divide the 6 images"):
        load(store, [0], world_size=2, micro_batch=4)
    with pytest.raises(InputError, match=r"--training\.batch-size is 12"):
        load(store, [0], world_size=5)


def test_a_micro_batch_above_the_share_means_the_share(store: Store) -> None:
    [[batch]] = load(store, [0], world_size=2, rank=1, micro_batch=12)
    assert (len(batch.images), batch.offset) == (6, 6)


def test_the_loader_of_a_configuration_says_why(store: Store) -> None:
    config = Config(data=DataConfig(flip=True), training=TrainingConfig(batch_size=12, micro_batch=3, seed=3))
    loader, reason = make_loader(config, store, CPU)
    with loader:
        assert_equal(loader.micro_batches(2), load(store, [2])[0])
        assert len(loader.micro_batches(2)) == 4
    assert "memmap loader (the only one" in reason
    asked = replace(config, data=replace(config.data, loader="memmap"))
    loader, reason = make_loader(asked, store, CPU)
    loader.close()
    assert "memmap loader (as asked)" in reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_pinned_buffers_are_not_overwritten_while_the_gpu_reads_them(store: Store) -> None:
    cuda = torch.device("cuda")
    with MemmapLoader(store, batch_size=12, seed=3, flip=True, device=cuda) as loader:
        received = []
        for step in range(40):
            torch.cuda._sleep(2_000_000)  # the device lags behind the host, so copies wait in the stream
            received.append(loader.micro_batches(step))
    torch.cuda.synchronize()
    for ours, theirs in zip(received, load(store, list(range(40))), strict=True):
        on_cpu = [Batch(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in batch)) for batch in ours]
        assert_equal(on_cpu, theirs)
