"""What the trainer itself costs: `pytest benchmarks/ --benchmark-only`.

A run whose network is a sleep, 100 ms in each step, and whose loss and optimizer do nothing: all the rest is
the trainer's. Batches, what is written to the device before a step, gradients set to zero and added, sums of
the losses, stages, agreement on when to stop, progress, the log. In two processes gloo reduces the gradients
too; what it takes to reduce as many numbers by itself, at the same pace, is no part of the trainer's share.
The goal, 2 % of the step, is RESULTS.md's, and what counts is the median window of ten steps. Checkpoints and
grids, which come every some hundred steps, are not in it.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from ict_fast import presets  # noqa: E402
from ict_fast.consistency.objective import ConsistencyObjective  # noqa: E402
from ict_fast.data.prepare import prepare_digits  # noqa: E402
from ict_fast.training import step as training_step  # noqa: E402
from ict_fast.training import trainer  # noqa: E402
from ict_kernels import NoiseLevels, RAdamEMA  # noqa: E402

STEP_SECONDS = 0.1
STEPS = 60
WINDOW = 10
_LATE = 0.001
PARAMETERS = 428_000  # as the digits' network has: their gradients are reduced


class SleepingNetwork(nn.Module):
    """Takes its half of the step's time, once as the teacher and once as the student."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(PARAMETERS))

    def forward(self, images: Tensor) -> Tensor:
        ends = time.perf_counter() + STEP_SECONDS / 2
        output = self.weight.sum().expand(len(images))
        sleep_until(ends)
        return output


def sleep_until(moment: float) -> None:
    """To the point: a sleep alone ends some tenths of a millisecond late."""
    time.sleep(max(0.0, moment - time.perf_counter() - _LATE))
    while time.perf_counter() < moment:
        pass


class NoObjective(ConsistencyObjective):
    """Calls teacher and student, as the real one does, and computes nothing; its levels never change."""

    def levels(self, count: int, **options: Any) -> NoiseLevels:
        if not hasattr(self, "_levels"):
            self._levels = super().levels(count, **options)
        return self._levels

    def __call__(self, images: Tensor, *others: Any, **options: Any) -> Tensor:
        with torch.no_grad():
            self.teacher(images)
        return self.student(images)


def train(data: Path, out: Path) -> None:
    """The run, in this process or in one of those that torchrun has started."""
    training_step.build_seeded_network = lambda config: SleepingNetwork()  # type: ignore[assignment,return-value]
    training_step.ConsistencyObjective = NoObjective  # type: ignore[misc]
    RAdamEMA.step = lambda self, closure=None: None  # type: ignore[method-assign,assignment,misc]
    preset = presets.get("digits")
    config = replace(
        preset,
        data=replace(preset.data, path=str(data), flip=True),
        training=replace(preset.training, total_steps=STEPS),
        logging=replace(preset.logging, log_every=WINDOW, grid_every=0, checkpoint_every=STEPS),
    )
    trainer.train(config, out=out, device="cpu")


def reduce_alone(out: Path) -> None:
    """Writes the median of what reducing so many gradients takes where nothing else is done."""
    torch.distributed.init_process_group("gloo")
    gradients, took = torch.zeros(PARAMETERS), []
    for _ in range(STEPS):
        sleep_until(time.perf_counter() + STEP_SECONDS)
        started = time.perf_counter()
        torch.distributed.all_reduce(gradients)
        took.append(time.perf_counter() - started)
    if torch.distributed.get_rank() == 0:
        out.write_text(json.dumps(statistics.median(took)))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.benchmark(group="trainer's overhead")
def test_overhead_of_the_loop(benchmark: Any, tmp_path: Path, processes: int) -> None:
    out, alone = tmp_path / "run", tmp_path / "alone.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> None:
        started = [sys.executable, *(launcher if processes > 1 else []), __file__, *words]
        subprocess.run(started, env=environment, check=True)

    data = prepare_digits(tmp_path / "digits")
    benchmark.pedantic(lambda: run("train", str(data), str(out)), rounds=1)
    reduction = 0.0
    if processes > 1:
        run("reduce", str(alone))
        reduction = json.loads(alone.read_text())
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    windows = [
        (after["time"] - before["time"]) / (after["step"] - before["step"])
        for before, after in itertools.pairwise(records)
    ]
    assert len(windows) == STEPS // WINDOW - 1
    benchmark.extra_info["processes"] = processes
    benchmark.extra_info["overhead_of_each_window"] = [window / STEP_SECONDS - 1 for window in windows]
    benchmark.extra_info["reduction_alone_seconds"] = reduction
    benchmark.extra_info["overhead"] = (statistics.median(windows) - reduction) / STEP_SECONDS - 1


if __name__ == "__main__":
    work, *paths = sys.argv[1:]
    {"train": train, "reduce": reduce_alone}[work](*map(Path, paths))
