"""What checkpoints cost a run: `python benchmarks/checkpoint_cost.py`.

The training waits while the state is copied into host memory; the copy is written in a thread, beside which
the training's own thread is slower. Measured for each preset: the seconds that `Saver.save` holds up the
loop, the seconds until the checkpoint is on disk, those that steps take longer meanwhile, and the share that
the first and the third together have of the time between two checkpoints at the default interval, which is
one of steps or one of minutes, whichever is shorter. The step's time is measured for the digits; for the
networks that a CPU does not train it is that of `ict-fast plan` on 8 H100, so an assumption. Beside the
writing of every preset's checkpoint run steps of the digits in one thread: small operations, one after the
other, as those that a host launches on a GPU, which has work in its queue and feels less of it. There the
copy crosses PCIe; here it is one from memory to memory. Written: checkpoint-cost.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import threading
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


class Digits:
    """Training steps of the digits, which take their time."""

    def __init__(self) -> None:
        config = _on_cpu(presets.get("digits"))
        size = config.training.batch_size
        images = torch.zeros(size, 8, 8, 1, dtype=torch.uint8)
        self._batch = Batch(images, torch.zeros(size, dtype=torch.int64), None, 0)
        self._step = TrainStep(config, torch.device("cpu"))
        for _ in range(2):
            self.seconds()

    def seconds(self) -> float:
        """Of one step."""
        started = time.perf_counter()
        self._step(0, [self._batch])
        return time.perf_counter() - started


def step_seconds(config: Config, alone: float) -> tuple[float, str]:
    """Of a training step, and where that is from."""
    if config.preset != "digits":
        plan = make_plan(presets.get(config.preset), "h100", 8)  # in the GPU's precision, not in the CPU's
        return plan.step_seconds, "ict-fast plan, 8 x H100, assumed"
    return alone, "measured here"


def measure(config: Config, folder: Path, saves: int) -> dict[str, Any]:
    """The cost of some checkpoints of one preset."""
    store = open_store(
        prepare_digits(folder / "digits")
    )  # its fingerprint is all that a checkpoint takes of it
    step, digits = TrainStep(config, torch.device("cpu")), Digits()
    alone = statistics.median(digits.seconds() for _ in range(20))
    seconds, source = step_seconds(config, alone)
    out = folder / f"run-{config.preset}"
    out.mkdir()
    held, written, longer = [], [], []
    beside: list[float] = []
    run = Run(out, config, None)
    with Saver(run, store, step, Monitor(run, silent=True)) as saver:
        for number in range(1, saves + 1):
            started = time.perf_counter()
            saver.save(number)
            held.append(time.perf_counter() - started)
            writing = threading.Thread(target=saver.wait)
            writing.start()
            met = [digits.seconds()]
            while writing.is_alive():
                met.append(digits.seconds())
            written.append(time.perf_counter() - started)
            longer.append(sum(met) - len(met) * alone)
            beside += met
    every, minutes = config.logging.checkpoint_every, config.logging.checkpoint_minutes
    interval = min(every * seconds, 60 * minutes or math.inf)
    cost = statistics.median(held) + max(0.0, statistics.median(longer))
    state = sum(t.nbytes for group in step.tensors().values() for t in group.values())
    return {
        "preset": config.preset,
        "parameters": sum(p.numel() for p in step.network.parameters()),
        "state_bytes": state,
        "held_up_seconds": held,
        "written_after_seconds": written,
        "digits_step_seconds": {"alone": alone, "beside_a_save": statistics.median(beside)},
        "steps_longer_by_seconds": longer,
        "checkpoint_every": every,
        "checkpoint_minutes": minutes,
        "step_seconds": seconds,
        "step_seconds_from": source,
        "interval_seconds": interval,
        "share_of_the_run": cost / (interval + cost),
        "goal": GOAL,
        "interval_seconds_at_the_goal": cost * (1 / GOAL - 1),
    }


def _on_cpu(preset: Config) -> Config:
    return replace(preset, training=replace(preset.training, compile="off", precision="fp32"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--presets", nargs="+", choices=presets.names(), default=["digits", "cifar10", "imagenet64-ct2023"]
    )
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the checkpoints (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # a second one would wait for the core that writes, as none of a GPU's host does
    report: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "results": []}
    for folder in (options.out, options.work):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    for name in options.presets:
        print(f"{name}, {options.saves} checkpoints", file=sys.stderr, flush=True)
        config = _on_cpu(presets.get(name))
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            result = measure(config, Path(work), options.saves)
        report["results"].append(result)
        (options.out / "checkpoint-cost.json").write_text(json.dumps(report, indent=1) + "\n")
        held, written, longer = (
            statistics.median(result[key])
            for key in ("held_up_seconds", "written_after_seconds", "steps_longer_by_seconds")
        )
        print(
            f"{name}: {result['state_bytes'] / 1e9:.2f} GB, held up {1e3 * held:,.0f} ms, on disk after"
            f" {written:.1f} s, steps meanwhile longer by {1e3 * longer:,.0f} ms in all,"
            f" {100 * result['share_of_the_run']:.4f} % of the run at every"
            f" {result['interval_seconds']:,.0f} s"
        )
    return int(any(result["share_of_the_run"] > GOAL for result in report["results"]))


if __name__ == "__main__":
    sys.exit(main())
