"""Sampling: `pytest benchmarks/ --benchmark-only`. A step is one pass of the network, whose FLOPs are
counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flops import flops_of

from ict_fast import presets
from ict_fast.consistency import ConsistencyModel, sample

# (preset, images, steps, rounds).
ON_CPU = (("digits", 256, 1, 7), ("digits", 256, 2, 7), ("cifar10", 2, 1, 2))
ON_GPU = (
    ("cifar10", 256, 1, 5),
    ("cifar10", 256, 2, 5),
    ("imagenet64", 256, 1, 3),
    ("imagenet64", 256, 2, 3),
)


def _sample(
    benchmark: Any, record: Any, device: torch.device, preset: str, images: int, steps: int, rounds: int
):
    config = presets.get(preset)
    model = ConsistencyModel(config).to(device).eval()
    classes = config.network.num_classes
    labels = torch.arange(images) % classes if classes else None

    def run() -> None:
        sample(model, images, steps=steps, labels=labels)
        if device.type == "cuda":
            torch.cuda.synchronize()

    flops = flops_of(run)
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)
    record(
        op=f"sampling, {preset}, steps: {steps}",
        variant="ict-fast",
        baseline="the network's FLOPs alone",
        flops=flops,
        images=images,
        device=device.type,
    )


@pytest.mark.parametrize(("preset", "images", "steps", "rounds"), ON_CPU)
@pytest.mark.benchmark(group="sampling, CPU")
def test_sampling(benchmark: Any, record: Any, preset: str, images: int, steps: int, rounds: int) -> None:
    _sample(benchmark, record, torch.device("cpu"), preset, images, steps, rounds)


@pytest.mark.parametrize(("preset", "images", "steps", "rounds"), ON_GPU)
@pytest.mark.benchmark(group="sampling, GPU")
def test_sampling_on_a_gpu(
    benchmark: Any, record: Any, gpu: torch.device, preset: str, images: int, steps: int, rounds: int
) -> None:
    _sample(benchmark, record, gpu, preset, images, steps, rounds)
