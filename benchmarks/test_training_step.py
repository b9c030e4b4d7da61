"""Whole training steps: `pytest benchmarks/ --benchmark-only`.

Matrix FLOPs of a step, counted by torch's counter (2 per multiply-add), beside the time. The images are
random and already on the device, so no loader is measured. The baseline is the same step in plain torch, see
plain_network.py; on a GPU the variants are those of `run_gpu.py --part step`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from flops import flops_of
from gpu_step import GPU_SIZES, measure_steps, synthetic_batches
from gpu_step_variants import CPU_VARIANTS, VARIANTS

from ict_fast import presets
from ict_fast.config import Config


def _digits(**network: object) -> Config:
    preset = presets.get("digits")
    return replace(preset, network=replace(preset.network, **network))


CONFIGS = {
    "digits": _digits(),
    "digits with dropout": _digits(dropout=0.3),
    "digits with ADM": _digits(name="adm", embedding="positional"),
}
PLAIN = "torch, uncompiled"


@pytest.mark.parametrize("variant", CPU_VARIANTS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.benchmark(group="training step, CPU")
def test_training_step(benchmark: Any, record: Any, name: str, variant: str) -> None:
    config = CONFIGS[name]
    batches = synthetic_batches(config, torch.device("cpu"))
    train_step, _ = VARIANTS[variant](config, torch.device("cpu"))
    flops = flops_of(lambda: train_step(0, batches))
    steps = iter(range(1, 10**9))
    benchmark.pedantic(lambda: train_step(next(steps), batches), rounds=20, warmup_rounds=3)
    record(
        op=f"training step, {name}",
        variant=variant,
        baseline=PLAIN,
        flops=flops,
        images=config.training.batch_size,
    )


@pytest.mark.parametrize("name", [name for name, _ in GPU_SIZES])
@pytest.mark.benchmark(group="training step, GPU")
def test_training_step_on_a_gpu(benchmark: Any, gpu: torch.device, name: str) -> None:
    def measured() -> dict[str, Any]:
        *_, last = measure_steps(name, dict(GPU_SIZES)[name], gpu, budget_seconds=420)
        return last

    benchmark.extra_info.update(benchmark.pedantic(measured, rounds=1))
