"""Everything in this folder needs an NVIDIA GPU, and is skipped by name without one."""

from __future__ import annotations

import fcntl
import gc
import os
from collections.abc import Iterator

import pytest
import torch

from ict_fast.training.launch import configure_torch


@pytest.fixture(autouse=True)
def needs_a_gpu(request: pytest.FixtureRequest) -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"{request.node.name}: needs an NVIDIA GPU")
    configure_torch(torch.device("cuda"), deterministic=False)  # by itself torch lets convolutions be TF32


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
