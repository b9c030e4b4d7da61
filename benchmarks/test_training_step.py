"""Whole training steps: `pytest benchmarks/ --benchmark-only`.

Each variant names its cost: matrix FLOPs of a step, counted by torch's counter (2 per multiply-add), beside
the time. The images are random and already on the device, so no loader is measured.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ict_fast import presets
from ict_fast.config import Config
from ict_fast.training.step import TrainStep

_SPEC = importlib.util.spec_from_file_location("run_gpu", Path(__file__).with_name("run_gpu.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
run_gpu = sys.modules.setdefault("run_gpu", importlib.util.module_from_spec(_SPEC))
_SPEC.loader.exec_module(run_gpu)


def _digits(**network: object) -> Config:
    preset = presets.get("digits")
    return replace(preset, network=replace(preset.network, **network))


VARIANTS = {
    "digits": _digits(),
    "digits-dropout": _digits(dropout=0.3),
    "digits-adm": _digits(name="adm", embedding="positional"),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.benchmark(group="training step, CPU")
def test_training_step(benchmark, name: str) -> None:  # type: ignore[no-untyped-def]
    config = VARIANTS[name]
    train_step = TrainStep(config, torch.device("cpu"))
    batches = run_gpu.synthetic_batches(config, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        train_step(0, batches)
    steps = iter(range(1, 10**9))
    benchmark.extra_info["flops_per_step"] = counter.get_total_flops()
    benchmark.extra_info["batch_size"] = config.training.batch_size
    benchmark.extra_info["torch"] = torch.__version__
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(lambda: train_step(next(steps), batches), rounds=20, warmup_rounds=3)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["images_per_second"] = config.training.batch_size / seconds
    benchmark.extra_info["gflop_per_second"] = counter.get_total_flops() / seconds / 1e9


@pytest.mark.parametrize("name", ["cifar10", "imagenet64"])
@pytest.mark.benchmark(group="training step, GPU")
def test_training_step_on_a_gpu(benchmark, name: str) -> None:  # type: ignore[no-untyped-def]
    if not torch.cuda.is_available():
        pytest.skip(f"training step of {name}: needs an NVIDIA GPU")
    preset = presets.get(name)
    config = replace(preset, training=replace(preset.training, batch_size=128))
    device = torch.device("cuda")
    train_step = TrainStep(config, device)
    batches = run_gpu.synthetic_batches(config, device)
    steps = iter(range(10**9))

    def step() -> None:
        train_step(next(steps), batches)
        torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=10, warmup_rounds=3)
