"""The kernels one by one: `pytest benchmarks/ --benchmark-only`.

On a CPU, where no Triton kernel runs: the package's eager definitions beside plain torch, for the digits'
network. On a GPU: the cases of `run_gpu.py --part kernels`, whose records go into the JSON; the time in
pytest's own table includes the launches from Python there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))

import gpu_kernels
from gpu_optimizer import OPTIMIZERS, network_parameters, optimizer_steps, part_optimizer
from gpu_timing import OURS, measure

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ON_CPU = gpu_kernels.comparisons((("digits", 64, 1, 8),), CPU)
ON_CUDA = gpu_kernels.comparisons(gpu_kernels.SIZES, CUDA)


@pytest.mark.parametrize("variant", [OURS, "eager"])
@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.benchmark(group="kernels' definitions, CPU")
def test_kernel(benchmark: Any, name: str, variant: str) -> None:
    comparison = ON_CPU[name]()
    stages, numbers = comparison.variants[variant], cycle(range(comparison.sets))

    def every_stage() -> None:
        number, kept = next(numbers), None
        for stage in stages.values():
            kept = stage(number, kept)

    benchmark.extra_info["minimum_bytes"] = sum(comparison.minimum_bytes.values())
    benchmark.extra_info["stages"] = list(stages)
    benchmark.extra_info["torch"] = torch.__version__
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(every_stage, rounds=20, warmup_rounds=3)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["gb_per_s_of_minimum"] = sum(comparison.minimum_bytes.values()) / seconds / 1e9


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The GPU; its memory is given back after each test."""
    if not torch.cuda.is_available():
        pytest.skip(f"{request.node.name}: needs an NVIDIA GPU")
    yield CUDA
    torch.cuda.empty_cache()


@pytest.mark.parametrize("name", ON_CUDA)
@pytest.mark.benchmark(group="kernels, GPU")
def test_kernel_on_a_gpu(benchmark: Any, gpu: torch.device, name: str) -> None:
    comparison = ON_CUDA[name]()
    benchmark.extra_info.update(measure(comparison, gpu))
    stages, numbers = comparison.variants[OURS], cycle(range(comparison.sets))

    def every_stage() -> None:
        number, kept = next(numbers), None
        for stage in stages.values():
            kept = stage(number, kept)
        torch.cuda.synchronize()

    benchmark.pedantic(every_stage, rounds=20, warmup_rounds=3)


@pytest.mark.parametrize("name", part_optimizer(CUDA))
@pytest.mark.benchmark(group="optimizer, GPU")
def test_optimizer_on_a_gpu(benchmark: Any, gpu: torch.device, name: str) -> None:
    record = benchmark.pedantic(part_optimizer(gpu)[name], rounds=1)
    benchmark.extra_info.update(record)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.benchmark(group="optimizer, CPU")
def test_optimizer(benchmark: Any, name: str) -> None:
    parameters = network_parameters("digits", CPU)
    benchmark.extra_info["parameters"] = sum(p.numel() for p in parameters)
    benchmark.pedantic(optimizer_steps(parameters, capturable=False)[name], rounds=20)
