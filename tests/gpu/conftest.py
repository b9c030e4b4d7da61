"""Everything in this folder needs an NVIDIA GPU, and is skipped by name without one."""

from __future__ import annotations

import pytest
import torch

from ict_fast.training.launch import configure_torch


@pytest.fixture(autouse=True)
def needs_a_gpu(request: pytest.FixtureRequest) -> None:
    if not torch.cuda.is_available():
        pytest.skip(f"{request.node.name}: needs an NVIDIA GPU")
    configure_torch(torch.device("cuda"), deterministic=False)  # by itself torch lets convolutions be TF32
