"""Part `precision` of run_gpu.py: what a trunk in less than fp32 does to the gradient, on this GPU.

A short run of the digits is trained in fp32; then follows precision.py's comparison at every stage of the
curriculum. On a CPU, whose TF32 is emulated, benchmarks/results/precision.json has it of a longer run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_train import digits_store
from machine import absent
from precision import PRECISIONS, measure

from ict_fast import presets
from ict_fast.consistency.curriculum import stages
from ict_fast.data.loaders import make_loader
from ict_fast.training.step import TrainStep

# What the gradients are of: stages of a hundred steps each, and some batches.
TRAINED_STEPS = {"cuda": 800, "cpu": 16}
BATCHES = {"cuda": (24, 128), "cpu": (2, 4)}


def part_precision(device: torch.device, session: Any) -> dict[str, Callable[[], Iterator[dict[str, Any]]]]:
    """What to measure, by name."""
    return {"gradients by precision, digits": partial(measure_precision, device, session.left)}


def measure_precision(device: torch.device, left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Yields the record after every stage, the last one first: it is where rounding shows most.

    Args:
        left: seconds that are left; no stage is begun after them.
    """
    if absent("numpy"):
        yield {"not_measured": "needs numpy, for the store of images"}
        return
    preset, (count, batch_size) = presets.get("digits"), BATCHES[device.type]
    config = replace(
        preset,
        training=replace(
            preset.training,
            total_steps=TRAINED_STEPS[device.type],
            batch_size=batch_size,
            compile="off",
            precision="fp32",
        ),
    )
    total = config.training.total_steps
    with tempfile.TemporaryDirectory() as folder:
        store = digits_store(Path(folder) / "store", block=1)
        trained = TrainStep(config, device)
        with make_loader(config, store, device)[0] as loader:
            for k in range(total):
                trained(k, loader.micro_batches(k))
            batches = [loader.micro_batches(k)[0] for k in range(count)]
            record: dict[str, Any] = {
                "trained_steps": total,
                "batches": count,
                "batch_size": batch_size,
                "skipped": int(trained.optimizer.skipped),
                "tf32": "the GPU's" if device.type == "cuda" else "emulated",
                "stages": [],
            }
            steps = {}
            for name in PRECISIONS:
                own = replace(config, training=replace(config.training, precision=name))
                steps[name] = TrainStep(own, device, initial=trained.network.state_dict())
            for stage in reversed(stages(total, config.method)):
                if record["stages"] and left() <= 0:
                    break
                found = measure(config, steps, stage.num_scales, batches)
                record["stages"].insert(0, {"num_scales": stage.num_scales, "precisions": found})
                last = record["stages"][-1]
                noise = ", ".join(f"{name} {each['noise']:.3g}" for name, each in last["precisions"].items())
                record["summary"] = (
                    f"N = {last['num_scales']}: noise added, of the sampling variance: {noise}"
                )
                yield record
