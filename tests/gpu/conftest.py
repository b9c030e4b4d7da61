"""Everything in this folder needs an NVIDIA GPU, and is skipped by name without one."""

from __future__ import annotations

import fcntl
import gc
import os
import sys
from collections.abc import Iterator

import pytest
import torch

from ict_fast.training.launch import configure_torch
from ict_kernels import philox


@pytest.fixture(autouse=True)
def needs_a_gpu(request: pytest.FixtureRequest) -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"{request.node.name}: needs an NVIDIA GPU")
    configure_torch(torch.device("cuda"), deterministic=False)  # by itself torch lets convolutions be TF32


@pytest.fixture(autouse=True)
def nothing_is_compiled_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels are compared with: to compile it takes each process a minute, to draw eagerly 0.1 s."""
    monkeypatch.setattr(philox, "_no_compiler", "of a test")


@pytest.fixture(autouse=True)
def compiled_code_is_a_tests_own() -> Iterator[None]:
    """Blocks of all networks share one limit of compilations, which is for those of one network."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(autouse=True)
def large_tensors_come_one_at_a_time(
    needs_a_gpu: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Under `pytest -n`: tests of more than 2^31 elements, which look at free memory, wait for each other."""
    if not request.node.name.startswith("test_more_than_") or "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    # The folder above a worker's own is that of the run.
    with open(tmp_path_factory.getbasetemp().parent / "large-tensors.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        gc.collect()
        torch.cuda.empty_cache()
