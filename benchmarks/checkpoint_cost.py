"""What checkpoints cost a run: `python benchmarks/checkpoint_cost.py`.

The training waits while the state is copied into host memory; the copy is written in a thread. Measured for
each preset: the seconds that `Saver.save` holds up the loop, the seconds until the checkpoint is on disk, and
the share of the time between two checkpoints at the default interval. The step's time is measured for the
digits; for the networks that a CPU does not train it is that of `ict-fast plan` on 8 H100, so an assumption.
On a GPU the copy crosses PCIe; here it is one from memory to memory. Written: checkpoint-cost.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from ict_fast import presets  # noqa: E402
from ict_fast.config import Config  # noqa: E402
from ict_fast.data.loaders import Batch  # noqa: E402
from ict_fast.data.prepare import prepare_digits  # noqa: E402
from ict_fast.data.store import open_store  # noqa: E402
from ict_fast.planning import make_plan  # noqa: E402
from ict_fast.training.monitor import Monitor  # noqa: E402
from ict_fast.training.run_directory import Run  # noqa: E402
from ict_fast.training.saving import Saver  # noqa: E402
from ict_fast.training.step import TrainStep  # noqa: E402

GOAL = 0.01  # of the run's time


def step_seconds(config: Config, step: TrainStep) -> tuple[float, str]:
    """Of a training step, and where that is from."""
    if config.preset != "digits":
        return make_plan(config, "h100", 8).step_seconds, "ict-fast plan, 8 x H100, assumed"
    size = config.training.batch_size
    images = torch.zeros(size, 8, 8, 1, dtype=torch.uint8)
    batch = Batch(images, torch.zeros(size, dtype=torch.int64), None, 0)
    times = []
    for number in range(8):
        started = time.perf_counter()
        step(number, [batch])
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:]), "measured here"


def measure(config: Config, folder: Path, saves: int) -> dict[str, Any]:
    """The cost of some checkpoints of one preset."""
    store = open_store(
        prepare_digits(folder / "digits")
    )  # its fingerprint is all that a checkpoint takes of it
    step = TrainStep(config, torch.device("cpu"))
    seconds, source = step_seconds(config, step)
    out = folder / f"run-{config.preset}"
    out.mkdir()
    held, written = [], []
    run = Run(out, config, None)
    with Saver(run, store, step, Monitor(run, silent=True)) as saver:
        for number in range(1, saves + 1):
            started = time.perf_counter()
            saver.save(number)
            held.append(time.perf_counter() - started)
            saver.wait()
            written.append(time.perf_counter() - started)
    every = config.logging.checkpoint_every
    interval = every * seconds
    state = sum(t.nbytes for group in step.tensors().values() for t in group.values())
    return {
        "preset": config.preset,
        "parameters": sum(p.numel() for p in step.network.parameters()),
        "state_bytes": state,
        "held_up_seconds": held,
        "written_after_seconds": written,
        "checkpoint_every": every,
        "step_seconds": seconds,
        "step_seconds_from": source,
        "share_of_the_run": statistics.median(held) / (interval + statistics.median(held)),
        "goal": GOAL,
        "interval_seconds_at_the_goal": statistics.median(held) * (1 / GOAL - 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--presets", nargs="+", choices=presets.names(), default=["digits", "cifar10", "imagenet64-ct2023"]
    )
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the checkpoints (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args(argv)
    report: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "results": []}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.presets:
        print(f"{name}, {options.saves} checkpoints", file=sys.stderr, flush=True)
        preset = presets.get(name)
        config = replace(preset, training=replace(preset.training, compile="off", precision="fp32"))
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            result = measure(config, Path(folder), options.saves)
        report["results"].append(result)
        (options.out / "checkpoint-cost.json").write_text(json.dumps(report, indent=1) + "\n")
        held, written = (
            statistics.median(result[key]) for key in ("held_up_seconds", "written_after_seconds")
        )
        print(
            f"{name}: {result['state_bytes'] / 1e9:.2f} GB, held up {1e3 * held:,.0f} ms, on disk after"
            f" {written:.1f} s, {100 * result['share_of_the_run']:.4f} % of the run at every"
            f" {result['checkpoint_every']:,} steps"
        )
    return int(any(result["share_of_the_run"] > GOAL for result in report["results"]))


if __name__ == "__main__":
    sys.exit(main())
