"""What the trainer itself costs: `pytest benchmarks/ --benchmark-only`.

The step is a sleep of 100 ms, so that all the rest is the loop's: batches, stages, progress, the log. The
goal, 2 % of the step, is RESULTS.md's. Checkpoints and grids, which come every some hundred steps, are not in
it.
"""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ict_fast import presets
from ict_fast.data.prepare import prepare_digits
from ict_fast.training import trainer
from ict_fast.training.step import TrainStep

STEP_SECONDS = 0.1
STEPS = 60


@pytest.mark.benchmark(group="trainer's overhead")
def test_overhead_of_the_loop(  # type: ignore[no-untyped-def]
    benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stand_in(self: TrainStep, step: int, batches: list) -> None:
        time.sleep(STEP_SECONDS)

    monkeypatch.setattr(TrainStep, "__call__", stand_in)
    preset = presets.get("digits")
    config = replace(
        preset,
        data=replace(preset.data, path=str(prepare_digits(tmp_path / "digits")), flip=True),
        training=replace(preset.training, total_steps=STEPS),
        logging=replace(preset.logging, log_every=10, grid_every=0, checkpoint_every=STEPS),
    )
    benchmark.pedantic(lambda: trainer.train(config, out=tmp_path / "run", device="cpu"), rounds=1)
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    windows = [
        (after["time"] - before["time"]) / (after["step"] - before["step"])
        for before, after in itertools.pairwise(records)
    ]
    benchmark.extra_info["overhead_of_each_window"] = [window / STEP_SECONDS - 1 for window in windows]
    # Other processes can only slow a window.
    benchmark.extra_info["overhead"] = min(windows) / STEP_SECONDS - 1
