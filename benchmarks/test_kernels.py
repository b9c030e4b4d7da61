"""The kernels one by one, at every shape of both networks: `pytest benchmarks/ --benchmark-only`.

On a CPU, where no Triton kernel runs: the package's eager definitions beside plain torch, in fp32, a few
images at a time. On a GPU: the cases of `run_gpu.py --part kernels`, whose records, with Inductor's two ways
and apex beside them, go into the JSON; the time in pytest's own table includes the launches from Python
there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import gpu_kernels
import pytest
import torch
from gpu_group_norm import compare_norm, norm_cases
from gpu_optimizer import part_optimizer
from gpu_timing import OURS, Comparison, measure

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CPU_IMAGES = 2
ON_CUDA = gpu_kernels.comparisons(gpu_kernels.SIZES, CUDA)
WITHOUT_BACKWARD = ("noise_images", "sample_noise_levels")


def comparisons_on_cpu() -> dict[str, Callable[[], Comparison]]:
    """By name what prepares a comparison: the digits' ops, and those of both networks for a few images.

    The networks' samples are as many as fit the suite's time, but for the draw of levels, which is of whole
    batches; norms in fp32, which is what a CPU trains in.
    """
    made = {
        name: make
        for name, make in gpu_kernels.comparisons((("digits", 96, 1, 8),), CPU).items()
        if "bf16" not in name
    }
    sizes = tuple((preset, 8 * CPU_IMAGES, *shape) for preset, _, *shape in gpu_kernels.SIZES)
    for preset, samples, channels, size in sizes:
        shape = (samples, channels, size, size)
        made[f"consistency_loss, {preset}"] = partial(gpu_kernels.compare_loss, shape, CPU)
        made[f"noise_images, {preset}"] = partial(gpu_kernels.compare_noising, shape, CPU)
    for preset, samples, *_ in gpu_kernels.SIZES:
        made[f"sample_noise_levels, {preset}"] = partial(gpu_kernels.compare_levels, (samples,), CPU)
    for preset, samples in (("digits", 96), ("cifar10", CPU_IMAGES), ("imagenet64", CPU_IMAGES)):
        for case in norm_cases(preset, samples):
            case = replace(case, dtype=torch.float32, norm=replace(case.norm, fp32=True))
            made.setdefault(case.name, partial(compare_norm, case, CPU))
    return made


ON_CPU = comparisons_on_cpu()
STAGES = [
    (name, stage)
    for name in ON_CPU
    for stage in ("forward", "backward")
    if stage == "forward" or not name.startswith(WITHOUT_BACKWARD)
]


@pytest.fixture(scope="module")
def prepared() -> Callable[[str], Comparison]:
    """The comparison of a name; the last one is kept, as its tests follow each other."""
    kept: dict[str, Comparison] = {}

    def get(name: str) -> Comparison:
        if name not in kept:
            kept.clear()
            kept[name] = ON_CPU[name]()
        return kept[name]

    return get


@pytest.mark.parametrize("variant", [OURS, "eager"])
@pytest.mark.parametrize(("name", "stage"), STAGES)
@pytest.mark.benchmark(group="kernels' definitions, CPU")
def test_kernel(
    benchmark: Any, record: Any, prepared: Callable[[str], Comparison], name: str, stage: str, variant: str
) -> None:
    comparison = prepared(name)
    stages, numbers = comparison.variants[variant], cycle(range(comparison.sets))

    def what_the_stage_needs() -> tuple[tuple[int, Any], dict[str, Any]]:
        number = next(numbers)
        return (number, stages["forward"](number, None) if stage == "backward" else None), {}

    benchmark.pedantic(stages[stage], setup=what_the_stage_needs, rounds=7, warmup_rounds=1)
    record(
        op=f"{name}, {stage}",
        variant="definition" if variant == OURS else variant,
        baseline="eager",
        minimum_bytes=comparison.minimum_bytes[stage],
    )


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
    result = benchmark.pedantic(part_optimizer(gpu)[name], rounds=1)
    benchmark.extra_info.update(result)
