"""What the trunk's arithmetic does to the samples: `python benchmarks/last_stages.py`.

The digits are trained in fp32 up to the last stage but one (N = 641). From that one checkpoint the last two
stages are finished in each precision, with several seeds (of order, noise and dropout), and the samples are
measured after each of the two. Written: last-stages.json, after every run, and last-stages.md.

An interrupted command goes on where it was when it is given again; what is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from ict_fast import presets  # noqa: E402
from ict_fast.checkpoint import Checkpoint, open_checkpoint, write_checkpoint  # noqa: E402
from ict_fast.config import Config, to_dict  # noqa: E402
from ict_fast.consistency.curriculum import stages  # noqa: E402
from ict_fast.consistency.model import load_model  # noqa: E402
from ict_fast.evaluation import evaluate  # noqa: E402
from ict_fast.training.trainer import train  # noqa: E402

PRECISIONS = ("fp32", "bf16", "fp16", "tf32")
FIGURES = ("one_step", "two_step")


def base_config(total_steps: int, data: Path) -> Config:
    """The run whose last two stages are done again; it keeps the checkpoint at which they begin."""
    preset = presets.get("digits")
    length = total_steps // len(stages(total_steps, preset.method))
    return replace(
        preset,
        data=replace(preset.data, path=str(data)),
        training=replace(preset.training, total_steps=total_steps, precision="fp32", compile="off"),
        logging=replace(preset.logging, grid_every=0, checkpoint_every=length, snapshot_every=length),
    )


def branch(begin: Checkpoint, config: Config, out: Path) -> None:
    """A run of `config` that has come as far as the checkpoint; one that is there already stays."""
    if (out / "config.json").exists():
        return
    shutil.rmtree(out, ignore_errors=True)  # half-made
    tensors = {name: begin.tensors(name) for name in begin.names}
    state = {key: value for key, value in begin.state.items() if key != "trunk_dtype"}
    write_checkpoint(out, begin.step, tensors, {**state, "config": to_dict(config)}, keep=3)
    (out / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")


def finish(begin: Checkpoint, config: Config, out: Path, count: int) -> dict[str, Any]:
    """Trains the last two stages, and measures the samples after each.

    Returns:
        By N of the stage that has just ended: distances, and the skipped steps and seconds of the run.
    """
    branch(begin, config, out)
    started = time.monotonic()
    result = train(config, out=out)
    assert result.exit_code == 0, result.message
    seconds = time.monotonic() - started
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"seconds": round(seconds, 1), "skipped": records[-1]["skipped"], "after": {}}
    for stage in stages(config.training.total_steps, config.method)[-2:]:
        checkpoint = open_checkpoint(out / f"checkpoints/step-{stage.end_step:08d}")
        measured = evaluate(load_model(checkpoint.path), Path(config.data.path), count=count)
        noise = measured["reference"]["noise"]
        found["after"][str(stage.num_scales)] = {
            name: 100 * measured[name]["frechet_distance"] / noise for name in FIGURES
        }
    return found


def table(report: dict[str, Any]) -> str:
    """Mean and standard deviation over the seeds, and the mean difference from fp32 with the same seeds."""
    runs, scales = report["runs"], report["scales"]
    columns = [(n, figure) for n in scales for figure in FIGURES]
    rows = [["trunk", *(f"N = {n}, {figure.replace('_', ' ')}" for n, figure in columns), "skipped steps"]]
    rows.append(["---"] * len(rows[0]))
    exact = {run["seed"]: run for run in runs if run["precision"] == "fp32"}
    for precision in dict.fromkeys(run["precision"] for run in runs):
        mine = [run for run in runs if run["precision"] == precision]
        cells = []
        for n, figure in columns:
            values = [run["after"][n][figure] for run in mine]
            cell = f"{statistics.mean(values):.3f}"
            if len(values) > 1:
                cell += f" ± {statistics.stdev(values):.3f}"
            pairs = [
                run["after"][n][figure] - exact[run["seed"]]["after"][n][figure]
                for run in mine
                if run["seed"] in exact
            ]
            if precision != "fp32" and pairs:
                cell += f" ({statistics.mean(pairs):+.3f})"
            cells.append(cell)
        rows.append([precision, *cells, ", ".join(str(run["skipped"]) for run in mine)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def write(report: dict[str, Any], out: Path) -> None:
    """The JSON and the table."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "last-stages.json").write_text(json.dumps(report, indent=1) + "\n")
    if report["runs"]:
        (out / "last-stages.md").write_text(
            "The last two stages of the digits in each arithmetic of the trunk, from one checkpoint of an"
            f" fp32 run, by `benchmarks/last_stages.py`: {report['seeds']} seeds, {report['count']:,}"
            f" samples, torch {report['torch']}, on {report['device']}. Fréchet distances to the real digits"
            " in percent of that of noise, after the stage of each N: mean ± standard deviation over the"
            " seeds, in brackets the mean difference from fp32 with the same seeds.\n\n" + table(report)
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=10_000, help="samples for each distance")
    parser.add_argument("--total-steps", type=int, default=presets.get("digits").training.total_steps)
    parser.add_argument("--data", type=Path, default=Path("data/digits"))
    parser.add_argument("--work", type=Path, default=Path("runs/last-stages"), help="folder for the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    options = parser.parse_args(argv)
    config = base_config(options.total_steps, options.data)
    before_last = stages(options.total_steps, config.method)[-2]
    if before_last.num_scales != 641:
        parser.error(f"--total-steps is {options.total_steps}; the curriculum needs a multiple of 8 steps")
    assert train(config, out=options.work / "fp32-until-641").exit_code == 0
    begin = open_checkpoint(options.work / f"fp32-until-641/checkpoints/step-{before_last.first_step:08d}")

    wanted = [(precision, seed) for seed in range(options.seeds) for precision in options.precisions]
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU (TF32 is emulated)",
        "total_steps": options.total_steps,
        "first_step": before_last.first_step,
        "count": options.count,
        "seeds": options.seeds,
        "scales": [str(stage.num_scales) for stage in stages(options.total_steps, config.method)[-2:]],
        "runs": [],
    }
    started, done_here = time.monotonic(), 0
    for number, (precision, seed) in enumerate(wanted):
        out = options.work / f"{precision}-{seed}"
        kept = out / f"quality-{options.count}.json"
        if not kept.exists():
            eta = (time.monotonic() - started) / max(done_here, 1) * (len(wanted) - number)
            left = f", about {eta / 60:.0f} min left" if done_here else ""
            print(f"{number + 1}/{len(wanted)}{left}: {precision}, seed {seed}", file=sys.stderr, flush=True)
            training = replace(config.training, precision=precision, seed=seed)
            kept.parent.mkdir(parents=True, exist_ok=True)
            found = finish(begin, replace(config, training=training), out, options.count)
            partial = kept.with_suffix(".partial")
            partial.write_text(json.dumps({"precision": precision, "seed": seed, **found}))
            partial.replace(kept)
            done_here += 1
        report["runs"].append(json.loads(kept.read_text()))
        write(report, options.out)
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
