"""Measures ict-fast on the GPU of this machine, writes raw JSON: `python benchmarks/run_gpu.py --part step`.

Needs torch and Triton alone, no installation: the checkout is put on the path. Without a GPU it runs the
same code on the CPU, at sizes that say nothing about speed (the suite does, so that the script never rots).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

from ict_fast import presets  # noqa: E402
from ict_fast.config import Config  # noqa: E402
from ict_fast.training.launch import configure_torch  # noqa: E402
from ict_fast.training.step import TrainStep  # noqa: E402

WARMUP_STEPS = 3
TIMED_STEPS = 10


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
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks": _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"),
        }
    return described


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
    seconds = [_timed(lambda k=k: train_step(k, batches), device) for k in range(WARMUP_STEPS + TIMED_STEPS)]
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


def part_step(device: torch.device) -> list[dict[str, Any]]:
    """The training steps of both networks on a GPU; of the small default on a CPU."""
    if device.type == "cpu":
        sizes = [("digits", 32)]
    else:
        sizes = [("cifar10", 512), ("imagenet64", 128)]
    results = []
    for name, batch_size in sizes:
        preset = presets.get(name)
        training = replace(preset.training, batch_size=batch_size, total_steps=WARMUP_STEPS + TIMED_STEPS)
        results.append(measure_step(replace(preset, training=training), device))
        print(f"{name}: {results[-1]['images_per_second']:.1f} images/s", file=sys.stderr, flush=True)
    return results


PARTS: dict[str, Callable[[torch.device], list[dict[str, Any]]]] = {"step": part_step}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=[*PARTS, "all"], required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    configure_torch(device, deterministic=False)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for part in PARTS if arguments.part == "all" else [arguments.part]:
        started = time.monotonic()
        now = datetime.datetime.now(datetime.UTC)
        report = {
            "part": part,
            "date": now.isoformat(timespec="seconds"),
            "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
            "hardware": hardware(),
            "versions": versions(),
            "results": PARTS[part](device),
            "wall_seconds": round(time.monotonic() - started, 1),
        }
        name = str(report["hardware"].get("gpu", "cpu")).replace(" ", "-")
        path = arguments.out / f"{part}-{name}-{now:%Y%m%d-%H%M%S}.json"
        path.write_text(json.dumps(report, indent=2) + "\n")
        print(path)
    return 0


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
