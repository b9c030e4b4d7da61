"""Measures ict-fast on the GPU of this machine, writes raw JSON: `python benchmarks/run_gpu.py --part all`.

Needs torch and Triton alone, no installation: the checkout is put on the path. Without a GPU it runs the
same code on the CPU, at sizes that say nothing about speed (the suite does, so that the script never rots).
Parts: tests, those that need a GPU (gpu_tests.py); kernels (gpu_kernels.py); optimizer (gpu_optimizer.py);
step, whole training steps. How kernels are timed: gpu_timing.py.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import json
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from gpu_kernels import part_kernels  # noqa: E402
from gpu_optimizer import part_optimizer  # noqa: E402
from gpu_tests import measure_tests  # noqa: E402
from gpu_timing import OURS  # noqa: E402

from ict_fast import presets  # noqa: E402
from ict_fast.config import Config  # noqa: E402
from ict_fast.training.launch import configure_torch  # noqa: E402
from ict_fast.training.step import TrainStep  # noqa: E402

WARMUP_STEPS = 3
TIMED_STEPS = 10

# What to measure, by name; each gives what its entry in the JSON holds.
Measurements = dict[str, Callable[[], dict[str, Any]]]


class SyntheticBatch(NamedTuple):
    """The fields of a loader's batch, random pixels that stay on the device."""

    images: torch.Tensor
    labels: torch.Tensor
    flip: torch.Tensor | None
    offset: int


def hardware() -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    described: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        described |= {
            "gpu": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks": clocks(),
        }
    return described


def clocks() -> str | None:
    """The GPU's clocks, temperature and power, as nvidia-smi gives them now."""
    fields = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw"
    return _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv")


def versions() -> dict[str, str | None]:
    """Versions of what was measured; None where it is absent."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "triton"):
        found[name] = metadata.version(name) if importlib.util.find_spec(name) else None
    return found


def synthetic_batches(config: Config, device: torch.device) -> list[SyntheticBatch]:
    """The micro-batches of one step, random images that are on the device already."""
    network, training = config.network, config.training
    size = training.micro_batch or training.batch_size
    generator = torch.Generator(device).manual_seed(0)
    shape = (size, network.resolution, network.resolution, network.image_channels)
    return [
        SyntheticBatch(
            torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator),
            torch.randint(0, max(1, network.num_classes), (size,), device=device, generator=generator),
            torch.zeros(size, dtype=torch.uint8, device=device) if config.data.flip else None,
            offset,
        )
        for offset in range(0, training.batch_size, size)
    ]


def measure_step(config: Config, device: torch.device) -> dict[str, Any]:
    """Time, rate and peak memory of whole training steps; random images, no loader, no logging.

    Returns:
        ms per step (median of TIMED_STEPS, and all of them), images/s, peak bytes, parameters.
    """
    train_step = TrainStep(config, device)
    batches = synthetic_batches(config, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # These batches have the fields of the loaders', whose module needs numpy.
    steps = [partial(train_step, k, batches) for k in range(WARMUP_STEPS + TIMED_STEPS)]  # type: ignore[arg-type]
    seconds = [_timed(step, device) for step in steps]
    timed = seconds[WARMUP_STEPS:]
    median = statistics.median(timed)
    return {
        "preset": config.preset,
        "batch_size": config.training.batch_size,
        "micro_batch": config.training.micro_batch or config.training.batch_size,
        "precision": config.training.precision,
        "parameters": sum(p.numel() for p in train_step.network.parameters()),
        "ms_per_step": 1e3 * median,
        "ms_all": [1e3 * value for value in timed],
        "first_step_s": seconds[0],
        "images_per_second": config.training.batch_size / median,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def part_step(device: torch.device) -> Measurements:
    """The training steps of both networks on a GPU; of the small default on a CPU."""
    sizes = {"digits": 32} if device.type == "cpu" else {"cifar10": 512, "imagenet64": 128}
    measurements: Measurements = {}
    for name, batch_size in sizes.items():
        preset = presets.get(name)
        training = replace(preset.training, batch_size=batch_size, total_steps=WARMUP_STEPS + TIMED_STEPS)
        measurements[f"step, {name}"] = partial(measure_step, replace(preset, training=training), device)
    return measurements


# In the order of `--part all`. Each: (device, budget in seconds) -> what to measure.
PARTS: dict[str, Callable[[torch.device, float], Measurements]] = {
    "tests": lambda device, budget: {"tests/gpu": partial(measure_tests, budget)},
    "kernels": lambda device, budget: part_kernels(device),
    "optimizer": lambda device, budget: part_optimizer(device),
    "step": lambda device, budget: part_step(device),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=[*PARTS, "all"], required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for the JSON")
    parser.add_argument(
        "--budget-seconds",
        type=float,
        default=420.0,
        help="start nothing new in a part after this time, and name what was not measured (default: 420)",
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only what has this text in its name")
    arguments = parser.parse_args(argv)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {arguments.out}: {error.strerror}; name a folder that can be written")
    if arguments.part == "all" and arguments.only:
        parser.error(f"--only {arguments.only}: choose one --part with it")
    if arguments.part == "all":
        return max(_run_alone(part, arguments) for part in PARTS)
    return run_part(arguments.part, arguments.out, arguments.budget_seconds, arguments.only)


def run_part(part: str, out: Path, budget_seconds: float, only: str = "") -> int:
    """Measures one part and writes its JSON anew after every result, so that a killed run loses none.

    Args:
        part: a key of PARTS.
        out: folder for the JSON, which exists.
        budget_seconds: nothing new is started after this time.
        only: a text that the names of what is measured have; "" for all.
    Returns:
        0; 1 if something could not be measured or a test failed; 2 if `only` fits nothing.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    configure_torch(device, deterministic=False)
    started, now = time.monotonic(), datetime.datetime.now(datetime.UTC)
    report: dict[str, Any] = {
        "part": part,
        "date": now.isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "budget_seconds": budget_seconds,
        "only": only,
        "hardware": hardware(),
        "versions": versions(),
        "complete": False,
        "results": [],
    }
    name = re.sub(r"[^\w.-]", "-", str(report["hardware"].get("gpu", "cpu")))
    path = out / f"{part}-{name}-{now:%Y%m%d-%H%M%S}.json"
    offered = PARTS[part](device, budget_seconds)
    measurements = {each: measure for each, measure in offered.items() if only in each}
    if not measurements:
        _say(f"--only {only}: no name of part {part} has it; there are: {'; '.join(offered)}")
        return 2
    for number, (each, measure) in enumerate(measurements.items(), start=1):
        elapsed = time.monotonic() - started
        if elapsed > budget_seconds:
            result = {"not_measured": f"the budget of {budget_seconds:g} s was used up"}
        else:
            left = min(
                budget_seconds - elapsed, elapsed / max(1, number - 1) * (len(measurements) - number + 1)
            )
            _say(f"{part} {number}/{len(measurements)}, {elapsed:.0f} s, about {left:.0f} s left: {each}")
            result = _measured(measure)
        report["results"].append({"name": each, **result})
        report["wall_seconds"] = round(time.monotonic() - started, 1)
        _write(report, path)
    report |= {"complete": True, "clocks_at_end": clocks()}
    _write(report, path)
    results = report["results"]
    _say(
        f"{part}: {sum('not_measured' not in each for each in results)} of {len(results)} measured in "
        f"{report['wall_seconds']:.0f} s"
    )
    print(path)
    return int(any("error" in each for each in results))


def _measured(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result and the seconds that it took; of what fails the error, as the rest can still be measured."""
    started = time.monotonic()
    try:
        # Inside: after an illegal access to the device's memory this fails too.
        _give_memory_back()
        result = measure()
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    if summary := summary_of(result):
        _say(f"    {summary}")
    return {"seconds": round(time.monotonic() - started, 1), **result}


def _give_memory_back() -> None:
    """Frees what the measurement before held: captured graphs stand in cycles with their tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def summary_of(result: dict[str, Any]) -> str:
    """A result in a line for the terminal."""
    parts = [str(result[key]) for key in ("error", "summary") if key in result][:1]
    if "images_per_second" in result:
        parts.append(f"{result['images_per_second']:.1f} images/s")
    for stage, figures in result.get("stages", {}).items():
        faster = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in figures["times_faster_than"].items())
        parts.append(
            f"{stage} {figures['ms'][OURS]:.4f} ms, {figures['gb_per_s']:.0f} GB/s, "
            f"{figures['percent_of_copy']:.0f} % of a copy; {faster}"
        )
    parts += [f"{name} failed: {reason}" for name, reason in result.get("failed", {}).items()]
    return "; ".join(parts)


def _run_alone(part: str, arguments: argparse.Namespace) -> int:
    """A part in a process of its own: an illegal access in one does not take the others with it."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", part, "--out", str(arguments.out)]
    command += ["--budget-seconds", f"{arguments.budget_seconds:g}"]
    # A signal's number is negative.
    return abs(subprocess.run(command, check=False).returncode)


def _write(report: dict[str, Any], path: Path) -> None:
    """Replaces the file whole: never half a JSON."""
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(report, indent=1) + "\n")
    partial_path.replace(path)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
