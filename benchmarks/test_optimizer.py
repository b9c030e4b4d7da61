"""A step of the optimizer with its average of the weights: `pytest benchmarks/ --benchmark-only`.

Bytes that any of them must move: parameter, gradient, both moments and the average read, all but the gradient
written, 36 per parameter. The GPU's are in test_kernels.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_optimizer import MINIMUM_BYTES, OPTIMIZERS, RADAM, network_parameters, optimizer_steps

NETWORKS = ("digits", "cifar10")


@pytest.fixture(scope="module", params=NETWORKS)
def contest(request: pytest.FixtureRequest) -> tuple[str, int, dict[str, Callable[[], object]]]:
    """A network's name, its number of parameters, and a step of each optimizer on them."""
    parameters = network_parameters(request.param, torch.device("cpu"))
    count = sum(p.numel() for p in parameters)
    return request.param, count, optimizer_steps(parameters, capturable=False)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.benchmark(group="optimizer, CPU")
def test_optimizer(benchmark: Any, record: Any, contest: Any, optimizer: str) -> None:
    network, count, steps = contest
    benchmark.pedantic(steps[optimizer], rounds=20 if network == "digits" else 5, warmup_rounds=1)
    record(
        op=f"optimizer step, {network}",
        variant=optimizer,
        baseline=RADAM,
        minimum_bytes=MINIMUM_BYTES * count,
        parameters=count,
    )
