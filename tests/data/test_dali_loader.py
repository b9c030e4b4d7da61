"""What is DALI's own in the dali loader: its queue, its memory, its absence."""

import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from ict_fast.data.dali_loader import DaliLoader, dali_failure, dali_problem
from ict_fast.data.order import batch_indices
from ict_fast.data.store import Store, open_store, write_store
from ict_fast.errors import InputError

CPU = torch.device("cpu")
ARGUMENTS = {"batch_size": 12, "seed": 3, "flip": True, "device": CPU}

needs_dali = pytest.mark.skipif(dali_problem() is not None, reason=f"dali loader: {dali_problem()}")


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that were gathered, in order."""
    steps: list[int] = []

    def watch(num_images: int, seed: int, step: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        steps.append(step)
        return batch_indices(num_images, seed, step, batch_size)

    monkeypatch.setattr("ict_fast.data.batches.batch_indices", watch)
    return steps


@needs_dali
def test_steps_are_gathered_once_and_ahead(store: Store, gathered: list[int]) -> None:
    with DaliLoader(store, **ARGUMENTS) as loader:
        for step in range(5):
            loader.micro_batches(step)
            assert gathered == list(range(step + 2))


@needs_dali
def test_a_jump_starts_a_new_queue(store: Store, gathered: list[int]) -> None:
    with DaliLoader(store, **ARGUMENTS) as loader:
        for step in (0, 1, 9, 10, 4):
            loader.micro_batches(step)
    assert gathered == [0, 1, 2, 9, 10, 11, 4, 5]


@needs_dali
def test_the_tensors_are_dalis_memory_without_a_copy(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = []
    original = torch.from_dlpack

    def watch(dali_tensor) -> torch.Tensor:
        addresses.append(dali_tensor.data_ptr())
        return original(dali_tensor)

    monkeypatch.setattr(torch, "from_dlpack", watch)
    with DaliLoader(store, **ARGUMENTS) as loader:
        [batch] = loader.micro_batches(0)
    assert [batch.images.data_ptr(), batch.labels.data_ptr(), batch.flip.data_ptr()] == addresses


@needs_dali
def test_memory_is_reused_once_a_batch_is_dropped_and_not_before(tmp_path: Path) -> None:
    """Batches of 2.4 MB: of a few hundred bytes, any hole in the heap would do, and addresses say little."""
    images = np.zeros((24, 256, 256, 3), np.uint8)
    labels = np.zeros(24, np.int64)
    path = write_store(tmp_path / "store", images, labels, source="test", recipe="large", classes=[])
    store = open_store(path)
    with DaliLoader(store, **ARGUMENTS) as loader:
        held = [loader.micro_batches(step)[0].images for step in range(30)]
        assert len({images.data_ptr() for images in held}) == 30
        del held
        dropped = {loader.micro_batches(step)[0].images.data_ptr() for step in range(30, 230)}
    assert len(dropped) < 100  # of 200


@needs_dali
def test_close_ends_dalis_own_threads_and_frees_the_pipeline(store: Store) -> None:
    before = len(os.listdir("/proc/self/task"))
    loader = DaliLoader(store, **ARGUMENTS)
    loader.micro_batches(0)
    assert len(os.listdir("/proc/self/task")) > before
    pipeline = weakref.ref(loader._pipeline)
    loader.close()
    assert pipeline() is None
    assert len(os.listdir("/proc/self/task")) <= before


def test_a_missing_dali_is_refused_with_the_line_that_installs_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(InputError) as refusal:
        DaliLoader(store, **ARGUMENTS)
    assert str(refusal.value).startswith(
        '--data.loader is dali, but DALI is not installed: pip install -c constraints.txt -e ".[dali]"'
    )


OLD_DRIVER = (
    "CUDA runtime API error cudaErrorInsufficientDriver (35):\nCUDA driver version is insufficient for CUDA"
    " runtime version\nStacktrace (12 entries):\n[frame 0]: libdali.so"
)


@needs_dali
@pytest.mark.parametrize("fails", ["build", "run"])
def test_a_dali_that_fails_on_the_device_is_tried_and_refused_in_one_line(
    store: Store, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    from nvidia.dali.pipeline import Pipeline

    assert dali_failure(CPU) is None

    def fail(self: Pipeline, *arguments: object, **options: object) -> None:
        raise RuntimeError(OLD_DRIVER)

    monkeypatch.setattr(Pipeline, fails, fail)
    said = (
        "DALI fails on cpu (CUDA runtime API error cudaErrorInsufficientDriver (35): CUDA driver version is"
        " insufficient for CUDA runtime version)"
    )
    assert dali_failure(CPU) == said
    with pytest.raises(InputError) as refusal:
        DaliLoader(store, **ARGUMENTS)
    line = f"--data.loader is dali, but {said}; choose --data.loader resident or memmap"
    assert str(refusal.value) == line


@needs_dali
@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_dali_without_a_gpu_fails_on_one() -> None:
    failure = dali_failure(torch.device("cuda", 0))
    assert failure is not None
    assert failure.startswith("DALI fails on cuda:0 (")
    assert "\n" not in failure


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (ModuleNotFoundError("No module named 'nvidia'", name="nvidia"), "DALI is not installed"),
        (ModuleNotFoundError("No module named 'optree'", name="optree"), "DALI lacks the package optree"),
        (OSError("libcuda.so:\n not found"), "DALI cannot be imported (libcuda.so: not found)"),
        (
            TypeError("Descriptors cannot be created"),
            "DALI cannot be imported (Descriptors cannot be created)",
        ),
        (AssertionError(), "DALI cannot be imported (AssertionError)"),
    ],
)
def test_a_broken_dali_is_told_from_a_missing_one(
    monkeypatch: pytest.MonkeyPatch, error: Exception, problem: str
) -> None:
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("nvidia"):
                raise error

    for name in [name for name in sys.modules if name.split(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert dali_problem() == problem


def test_dali_is_imported_by_who_asks_for_it_only() -> None:
    code = "import sys, ict_fast.data.loaders; sys.exit('nvidia.dali' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
