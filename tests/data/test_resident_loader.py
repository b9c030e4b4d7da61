"""The resident loader: the whole store in memory, or a line that says why not."""

import numpy as np
import pytest
import torch

from ict_fast.data import resident_loader
from ict_fast.data.resident_loader import ResidentLoader, free_bytes, resident_bytes
from ict_fast.data.store import Store
from ict_fast.errors import InputError

CPU = torch.device("cpu")
ARGUMENTS = {"batch_size": 12, "seed": 3, "flip": True, "device": CPU}


def test_it_needs_the_bytes_of_images_and_labels(store: Store) -> None:
    assert resident_bytes(store) == 37 * 4 * 4 * 3 + 37 * 8


def test_a_store_that_does_not_fit_is_refused_with_the_bytes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident_loader, "free_bytes", lambda device: 2072)
    ResidentLoader(store, **ARGUMENTS).close()
    monkeypatch.setattr(resident_loader, "free_bytes", lambda device: 2071)
    with pytest.raises(InputError) as refusal:
        ResidentLoader(store, **ARGUMENTS)
    assert str(refusal.value) == (
        f"--data.loader is resident, which needs 2,072 bytes of memory on cpu for {store.path};"
        " 2,071 bytes are free; choose --data.loader memmap"
    )


def test_the_free_memory_of_a_cpu_is_less_than_all_of_it() -> None:
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert 0 < free_bytes(CPU) < total


def test_the_store_is_read_once_in_blocks(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_loader, "_BLOCK_BYTES", 5 * 48)  # 37 images are no multiple of five
    with ResidentLoader(store, **ARGUMENTS) as loader:
        for file in store.path.glob("*.npy"):
            file.unlink()  # the map stays readable, but nothing reads it any more
        seen = torch.cat([batch.images for step in range(37) for batch in loader.micro_batches(step)])
    counts = np.bincount(seen[:, 0, 0, 0].numpy(), minlength=37)
    assert counts.tolist() == [12] * 37


def test_the_gather_reads_its_indices_from_one_tensor(store: Store) -> None:
    with ResidentLoader(store, **ARGUMENTS) as loader:
        loader.micro_batches(0)
        place, before = loader._chosen.data_ptr(), loader._chosen.clone()
        loader.micro_batches(1)
        assert loader._chosen.data_ptr() == place
        assert not torch.equal(loader._chosen, before)


def test_close_frees_the_images(store: Store) -> None:
    loader = ResidentLoader(store, **ARGUMENTS)
    loader.close()
    assert loader._images.numel() == 0
    assert loader._labels.numel() == 0


def test_a_store_that_is_truncated_while_it_is_copied_is_an_error_and_no_signal(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident_loader, "_BLOCK_BYTES", 5 * 48)
    left = iter(range(3))

    def require_whole(self: Store) -> None:
        if next(left, None) is None:
            raise OSError("truncated while it was in use")

    monkeypatch.setattr(Store, "require_whole", require_whole)
    with pytest.raises(OSError, match="truncated while it was in use"):
        ResidentLoader(store, **ARGUMENTS)
