"""Batches against the store itself: the right images, whoever loads them, whenever, in whatever pieces.

Every claim is made of every loader; what is one loader's own is in its own file.
"""

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from ict_fast.config import Config, DataConfig, TrainingConfig
from ict_fast.data import loaders
from ict_fast.data.dali_loader import dali_problem
from ict_fast.data.loaders import LOADERS, Batch, Loader, choose_loader, make_loader
from ict_fast.data.order import batch_indices
from ict_fast.data.store import Store
from ict_fast.errors import InputError
from ict_kernels.philox import flip_bits

CPU = torch.device("cpu")
NEEDS_DALI = pytest.mark.skipif(dali_problem() is not None, reason=f"dali loader: {dali_problem()}")
KINDS = ["memmap", "resident", pytest.param("dali", marks=NEEDS_DALI)]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def new_loader(kind: str, store: Store, **options) -> Loader:
    return LOADERS[kind](store, **{"batch_size": 12, "seed": 3, "flip": True, "device": CPU, **options})


def load(kind: str, store: Store, steps: list[int], **options) -> list[list[Batch]]:
    with new_loader(kind, store, **options) as loader:
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


def assert_is_step(store: Store, step: int, batches: list[Batch], batch_size: int = 12) -> None:
    """The whole global batch of seed 3, read from the store by hand."""
    indices, numbers = batch_indices(store.num_images, 3, step, batch_size)
    images, labels, flip = joined(batches)
    np.testing.assert_array_equal(images.numpy(), store.images[indices])
    np.testing.assert_array_equal(labels.numpy(), indices % 3)
    assert torch.equal(flip, flip_bits(3, torch.from_numpy(numbers)))


def test_a_batch_holds_the_images_labels_and_flips_of_its_step(kind: str, store: Store) -> None:
    for step, [batch] in enumerate(load(kind, store, list(range(8)))):
        assert_is_step(store, step, [batch])
        assert batch.offset == 0
        assert batch.flip is not None
        dtypes = (batch.images.dtype, batch.labels.dtype, batch.flip.dtype)
        assert dtypes == (torch.uint8, torch.int64, torch.uint8)
        assert batch.images.permute(0, 3, 1, 2).is_contiguous(memory_format=torch.channels_last)


def test_the_flips_are_those_of_the_sample_numbers_however_many_are_drawn_at_once(store: Store) -> None:
    steps = [0, 340, 341, 342, 682, 683, 10**6, 2**32 - 1]  # 4096 // 12 = 341 steps are drawn together
    for step, batches in zip(steps, load("memmap", store, steps), strict=True):
        assert_is_step(store, step, batches)
    steps = [0, 1, 2]
    for step, batches in zip(steps, load("memmap", store, steps, batch_size=5000), strict=True):
        assert_is_step(store, step, batches, batch_size=5000)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch", [None, 1, 2])
def test_every_image_comes_once_per_epoch_over_all_ranks(
    kind: str, store: Store, world_size: int, micro_batch: int | None
) -> None:
    # 37 batches of 24 are 24 whole epochs; most batches straddle a border.
    options = {"batch_size": 24, "world_size": world_size, "micro_batch": micro_batch}
    seen: list[tuple[int, int]] = []
    for rank in range(world_size):
        for step, batches in enumerate(load(kind, store, list(range(37)), rank=rank, **options)):
            for batch in batches:
                numbers = step * 24 + batch.offset + np.arange(len(batch.images))
                seen += zip(numbers, batch.images[:, 0, 0, 0].tolist(), strict=True)
    seen.sort()
    assert [number for number, _ in seen] == list(range(37 * 24))
    for epoch in range(24):
        assert sorted(image for _, image in seen[epoch * 37 : (epoch + 1) * 37]) == list(range(37))


@pytest.mark.parametrize("world_size", [2, 3, 4, 6])
def test_the_global_batch_does_not_depend_on_the_number_of_processes(
    kind: str, store: Store, world_size: int
) -> None:
    for step in range(3):
        together = []
        for rank in range(world_size):
            [batches] = load(kind, store, [step], rank=rank, world_size=world_size)
            assert [batch.offset for batch in batches] == [rank * 12 // world_size]
            together += batches
        assert_is_step(store, step, together)


def test_a_run_goes_on_with_another_number_of_processes_and_another_loader(store: Store) -> None:
    kinds = ["memmap", "resident", *(["dali"] if dali_problem() is None else [])]
    for step in range(9):  # two processes up to step 3, then four, then three, each with another loader
        world_size = (2, 4, 3)[step // 3]
        batches = []
        for rank in range(world_size):
            [share] = load(kinds[(step + rank) % len(kinds)], store, [step], rank=rank, world_size=world_size)
            batches += share
        assert_is_step(store, step, batches)


@pytest.mark.parametrize("micro_batch", [1, 2, 6])
def test_micro_batches_are_cuts_of_the_batch(kind: str, store: Store, micro_batch: int) -> None:
    [pieces] = load(kind, store, [5], micro_batch=micro_batch)
    assert [batch.offset for batch in pieces] == list(range(0, 12, micro_batch))
    assert {len(batch.images) for batch in pieces} == {micro_batch}
    assert_is_step(store, 5, pieces)


def test_a_batch_may_span_several_epochs(kind: str, store: Store) -> None:
    [[batch]] = load(kind, store, [1], batch_size=111)
    assert set(Counter(batch.images[:, 0, 0, 0].tolist()).values()) == {3}


def test_a_new_loader_continues_at_any_step(kind: str, store: Store) -> None:
    for start in (1, 4, 9):
        steps = list(range(start, 12))
        for step, batches in zip(steps, load(kind, store, steps), strict=True):
            assert_is_step(store, step, batches)


def test_what_was_prepared_for_another_step_is_not_delivered(kind: str, store: Store) -> None:
    steps = [5, 0, 1, 3, 3, 4, 2, 10, 11, 12, 0]  # forwards, back, again
    for step, batches in zip(steps, load(kind, store, steps), strict=True):
        assert_is_step(store, step, batches)


def test_a_batch_that_is_kept_never_changes(kind: str, store: Store) -> None:
    with new_loader(kind, store) as loader:
        held = [loader.micro_batches(step) for step in range(40)]
        for step in range(40):
            assert_is_step(store, step, held[step])
        loader.micro_batches(7)  # a jump
    del loader
    for step in range(40):
        assert_is_step(store, step, held[step])


def test_batches_belong_to_the_caller(kind: str, store: Store) -> None:
    with new_loader(kind, store) as loader:
        held = [loader.micro_batches(step) for step in range(8)]
        for tensor in held[7][0][:3]:
            tensor.zero_()
        again = [loader.micro_batches(step) for step in range(8)]
    for step in range(7):
        assert_equal(held[step], again[step])
    assert_is_step(store, 7, again[7])
    assert store.images[:, 0, 0, 0].tolist() == list(range(37))


def test_without_flips_there_are_no_flip_bits(kind: str, store: Store) -> None:
    [[batch]] = load(kind, store, [0], flip=False)
    assert batch.flip is None


def test_what_fails_ahead_surfaces_at_its_step_and_can_be_tried_again(
    kind: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = True

    def fail(num_images: int, seed: int, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        if step == 2 and fails:
            raise OSError("the disk is gone")
        return batch_indices(num_images, seed, step, batch_size)

    monkeypatch.setattr("ict_fast.data.batches.batch_indices", fail)
    with new_loader(kind, store) as loader:
        for step in (0, 1):
            assert_is_step(store, step, loader.micro_batches(step))
        for _ in range(2):
            with pytest.raises(OSError, match=r"^the disk is gone$"):
                loader.micro_batches(2)
        fails = False
        for step in (2, 3, 4):
            assert_is_step(store, step, loader.micro_batches(step))


def test_close_ends_every_thread_and_may_be_repeated(kind: str, store: Store) -> None:
    before = threading.active_count()
    loader = new_loader(kind, store)
    loader.micro_batches(0)
    loader.close()
    loader.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="the loader is closed"):
        loader.micro_batches(5)


def test_loading_warns_of_nothing(kind: str, store: Store, recwarn: pytest.WarningsRecorder) -> None:
    load(kind, store, [0, 1, 2])
    assert not list(recwarn)


def test_a_share_that_cannot_be_cut_is_refused_by_name(kind: str, store: Store) -> None:
    with pytest.raises(InputError, match=r"--training\.micro-batch is 4; it must divide the 6 images"):
        new_loader(kind, store, world_size=2, micro_batch=4)
    with pytest.raises(InputError, match=r"--training\.batch-size is 12"):
        new_loader(kind, store, world_size=5)


def test_a_micro_batch_above_the_share_means_the_share(kind: str, store: Store) -> None:
    [[batch]] = load(kind, store, [0], world_size=2, rank=1, micro_batch=12)
    assert (len(batch.images), batch.offset) == (6, 6)


# --- which one ---------------------------------------------------------------------------------------------


def test_the_loader_of_a_configuration_says_why(kind: str, store: Store) -> None:
    config = Config(
        data=DataConfig(flip=True, loader=kind),
        training=TrainingConfig(batch_size=12, micro_batch=3, seed=3),
    )
    loader, reason = make_loader(config, store, CPU)
    with loader:
        assert isinstance(loader, LOADERS[kind])
        assert len(loader.micro_batches(2)) == 4
        assert_is_step(store, 2, loader.micro_batches(2))
    assert reason == f"{kind} loader (as asked), 37 images from {store.path}"
    automatic = replace(config, data=replace(config.data, loader="auto"))
    loader, reason = make_loader(automatic, store, CPU)
    loader.close()
    assert reason.startswith("memmap loader (auto: the device is a CPU), 37 images")


@pytest.mark.parametrize(("kind", "reads"), [("memmap", 1), ("resident", 0)])
def test_a_store_is_read_ahead_unless_the_loader_reads_all_of_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, kind: str, reads: int
) -> None:
    read: list[Store] = []
    monkeypatch.setattr(loaders, "read_ahead", read.append)
    config = Config(data=DataConfig(loader=kind), training=TrainingConfig(batch_size=12))
    loader, _ = make_loader(config, store, CPU)
    loader.close()
    assert read == [store] * reads


@pytest.fixture
def gpu_machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, int], torch.device]:
    """A machine with a GPU, as the choice sees it: DALI's problem or failure there, and the free bytes."""

    def make(problem: str | None, free: int) -> torch.device:
        fails = problem is not None and problem.startswith("DALI fails")
        monkeypatch.setattr(loaders, "dali_problem", lambda: None if fails else problem)
        monkeypatch.setattr(loaders, "dali_failure", lambda device: problem if fails else None)
        monkeypatch.setattr(loaders, "free_bytes", lambda device: free)
        return torch.device("cuda", 0)

    return make


NUM_BYTES = 37 * (4 * 4 * 3 + 8)  # images and labels of the store


@pytest.mark.parametrize(
    ("problem", "free", "chosen", "reason"),
    [
        (None, 0, "dali", "DALI is installed"),
        ("DALI is not installed", 4 * NUM_BYTES, "resident", "not installed; the images take 2.07e-06 GB"),
        ("DALI is not installed", 4 * NUM_BYTES - 1, "memmap", "more than a quarter"),
        ("DALI fails on cuda:0 (driver)", 4 * NUM_BYTES, "resident", "auto: DALI fails on cuda:0 (driver);"),
        ("DALI fails on cuda:0 (driver)", 4 * NUM_BYTES - 1, "memmap", "auto: DALI fails on cuda:0 (driver)"),
    ],
)
def test_on_a_gpu_dali_comes_before_resident_and_that_before_memmap(
    gpu_machine, store: Store, problem: str | None, free: int, chosen: str, reason: str
) -> None:
    name, why = choose_loader("auto", store, gpu_machine(problem, free))
    assert name == chosen
    assert reason in why


def test_what_is_asked_for_is_not_second_guessed(gpu_machine, store: Store) -> None:
    assert choose_loader("memmap", store, gpu_machine(None, 10**12)) == ("memmap", "as asked")


def test_a_store_that_is_truncated_while_in_use_is_an_error_and_no_signal(kind: str, store: Store) -> None:
    with new_loader(kind, store) as loader:
        loader.micro_batches(0)
        with (store.path / "images.npy").open("r+b") as file:
            file.truncate(0)
        if kind == "resident":
            loader.micro_batches(5)  # which has its images
            return
        with pytest.raises((OSError, RuntimeError), match=r"truncated while it was in use.*images\.npy"):
            loader.micro_batches(5)


def test_a_store_that_is_deleted_while_in_use_goes_on(kind: str, store: Store) -> None:
    with new_loader(kind, store) as loader:
        loader.micro_batches(0)
        (store.path / "images.npy").unlink()
        loader.micro_batches(5)
