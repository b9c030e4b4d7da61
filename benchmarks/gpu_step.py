"""Part `step` of run_gpu.py: whole training steps of both networks, beside the same steps in plain torch.

Variants follow one another, each in its own network, since compiled blocks of several would share one cache
of torch's; then once more in reverse order while the budget lasts (A B C C B A), so that a drift of the clock
shows and cancels. Beside them, timed alone: the step's convolutions and attention, which nothing here can
make faster. The record is given anew after every variant.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from gpu_baselines import RAISED_THRESHOLDS
from gpu_step_floor import measure_floor
from machine import ceilings, median_seconds, seconds_of
from plain_network import make_plain
from step_counts import count_step

from ict_fast import presets
from ict_fast.config import Config
from ict_fast.training.compilation import compile_blocks
from ict_fast.training.step import TrainStep, trunk_dtype

# (preset, images): the step with the goals goes first.
GPU_SIZES = (("imagenet64", 128), ("cifar10", 512))
CPU_SIZES = (("digits", 32),)
# A captured step runs three times before it is captured.
WARM_UP_STEPS, TIMED_STEPS = 5, 10


class SyntheticBatch(NamedTuple):
    """The fields of a loader's batch, random pixels that stay on the device."""

    images: torch.Tensor
    labels: torch.Tensor
    flip: torch.Tensor | None
    offset: int


def synthetic_batches(config: Config, device: torch.device) -> list[Any]:
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


# ----------------------------------------------------------------------------------------------- the variants

Advance = Callable[[int, Sequence[Any]], None]
# -> what advances a run by a step, and the state that it advances.
Variant = Callable[[Config, torch.device], tuple[Advance, TrainStep]]


def _ours(compiled: str, config: Config, device: torch.device) -> tuple[Advance, TrainStep]:
    step = TrainStep(replace(config, training=replace(config.training, compile=compiled)), device)
    return step, step


def _captured(config: Config, device: torch.device) -> tuple[Advance, TrainStep]:
    """`--training.cuda-graph`: the whole compiled step as one graph."""
    from ict_fast.training.graph import CapturedStep

    _, step = _ours("on", config, device)
    return CapturedStep(step), step


def _plain(config: Config, device: torch.device) -> tuple[Advance, TrainStep]:
    _, step = _ours("off", config, device)
    make_plain(step)
    return step, step


def _inductor(
    options: dict[str, Any] | None, config: Config, device: torch.device
) -> tuple[Advance, TrainStep]:
    """Plain torch in compiled blocks, as ours are."""
    _, step = _plain(config, device)
    compile_blocks(step.network)
    if options is not None:
        for block in step.network.blocks():  # type: ignore[operator]
            block.compile(fullgraph=True, dynamic=False, options=options)
    return step, step


OURS, INDUCTOR, TUNED, PLAIN = "ict-fast", "inductor", "inductor, raised thresholds", "torch, uncompiled"
# In the order of measuring; one more variant is one more line.
VARIANTS: dict[str, Variant] = {
    OURS: partial(_ours, "on"),
    INDUCTOR: partial(_inductor, None),
    TUNED: partial(_inductor, RAISED_THRESHOLDS),
    PLAIN: _plain,
    "ict-fast, CUDA graph": _captured,
    "ict-fast, uncompiled": partial(_ours, "off"),
    "ict-fast, max-autotune": partial(_ours, "max-autotune"),
}
CPU_VARIANTS = ("ict-fast, uncompiled", PLAIN)


# ---------------------------------------------------------------------------------------------- the measuring


def part_step(device: torch.device, session: Any) -> dict[str, Callable[[], Iterator[dict]]]:
    """What to measure, by name; on a CPU the digits' small network.

    Args:
        session: whose `share()` is the seconds that the measurement which asks may take.
    """
    sizes = CPU_SIZES if device.type == "cpu" else GPU_SIZES
    return {
        f"step, {preset}": lambda preset=preset, images=images: measure_steps(  # type: ignore[misc]
            preset, images, device, session.share()
        )
        for preset, images in sizes
    }


def step_config(preset: str, images: int) -> Config:
    """A preset with another batch, all of its curriculum kept."""
    config = presets.get(preset)
    return replace(config, training=replace(config.training, batch_size=images))


def measure_steps(
    preset: str, images: int, device: torch.device, budget_seconds: float, names: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Time, rate, MFU and peak memory of every variant; random images, no loader, no logging.

    Args:
        preset: whose network and method.
        images: in a step; halved until it fits into the device's memory.
        budget_seconds: no variant is begun after this time; what is left out is named.
        names: the variants to measure; by default all that make sense on the device.
    Yields:
        The record so far, after every variant.
    """
    started, config = time.monotonic(), step_config(preset, images)
    names = list(names) or list(VARIANTS if device.type == "cuda" else CPU_VARIANTS)
    peak = ceilings(device.type)["matrix_tflop_per_s"]["bf16" if device.type == "cuda" else "fp32"]
    record: dict[str, Any] = {
        "preset": preset,
        "batch_size": images,
        "precision": "fp32" if trunk_dtype(config.training.precision, device) is None else "bf16",
        "matrix_tflop_per_s": peak,
        "variants": {},
        "left_out": {},
        "failed": {},
    }
    longest = 0.0

    def time_is_up() -> bool:
        return time.monotonic() - started + longest > budget_seconds

    for name in names:
        if record["variants"] and time_is_up():
            record["left_out"][name] = f"the {budget_seconds:.0f} s of this network were used up"
            continue
        begun = time.monotonic()
        config = _measure_variant(name, config, device, record)
        longest = max(longest, (time.monotonic() - begun) / 2)  # later ones find most of the code compiled
        record["batch_size"] = config.training.batch_size
        _summarise(record, config)
        yield record
    if device.type == "cuda" and not time_is_up():
        record["floor"] = measure_floor(preset, record["batch_size"], device)
        _summarise(record, config)
        yield record
    for name in reversed(list(record["variants"])):
        if time_is_up():
            break
        config = _measure_variant(name, config, device, record)
        _summarise(record, config)
        yield record


def _measure_variant(name: str, config: Config, device: torch.device, record: dict[str, Any]) -> Config:
    """Adds a pass of a variant to the record; returns the configuration that fitted into memory."""
    while True:
        try:
            figures = _time_variant(name, config, device)
            break
        except torch.OutOfMemoryError:
            batch = config.training.batch_size
            if record["variants"] or batch < 16:  # all variants take the same batch
                record["failed"][name] = f"out of memory at {batch} images"
                return config
            config = replace(config, training=replace(config.training, batch_size=batch // 2))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            record["failed"][name] = f"{type(error).__name__}: {lines[0]}"
            return config
        finally:
            torch.compiler.reset()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    entry = record["variants"].setdefault(
        name, {"passes": [], "first_step_s": figures["first_step_s"], "parameters": figures["parameters"]}
    )
    entry["passes"].append({key: figures[key] for key in ("ms_all", "host_ms", "matrix_tflop_per_s")})
    entry["peak_memory_bytes"] = figures["peak_memory_bytes"]
    return config


def _time_variant(name: str, config: Config, device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step, state = VARIANTS[name](config, device)
    batches = synthetic_batches(config, device)
    first = seconds_of(lambda: step(0, batches), device)
    for k in range(1, WARM_UP_STEPS):
        step(k, batches)
    rate = _matrix_rate(device)
    times, host = [], []
    for k in range(WARM_UP_STEPS, WARM_UP_STEPS + TIMED_STEPS):

        def run(k: int = k) -> None:
            begun = time.perf_counter()
            step(k, batches)
            host.append(1e3 * (time.perf_counter() - begun))

        times.append(1e3 * seconds_of(run, device))
    return {
        "first_step_s": round(first, 2),
        "parameters": sum(p.numel() for p in state.network.parameters()),
        "ms_all": times,
        "host_ms": statistics.median(host),
        "matrix_tflop_per_s": rate,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


def _matrix_rate(device: torch.device) -> float | None:
    """The rate of a matrix product now: whether the clock is what it was for the variant before."""
    if device.type != "cuda":
        return None
    size = 4096
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, device) / 1e12


def _summarise(record: dict[str, Any], config: Config) -> None:
    """Medians over all passes, and what follows from them."""
    images, seconds = config.training.batch_size, {}
    if record.get("flops_of_batch") != images:
        record |= {"flops_of_batch": images, "flops": count_step(record["preset"], images)["flops"]}
    for name, entry in record["variants"].items():
        times = [ms for each in entry["passes"] for ms in each["ms_all"]]
        seconds[name] = statistics.median(times) / 1e3
        rate = record["flops"] / seconds[name] / 1e12
        entry |= {
            "ms_per_step": 1e3 * seconds[name],
            "images_per_second": images / seconds[name],
            "tflop_per_s": rate,
            "percent_of_matrix_rate": 100 * rate / record["matrix_tflop_per_s"],
        }
    ours = next((name for name in (OURS, CPU_VARIANTS[0]) if name in seconds), None)
    if ours is not None:
        # What `ict-fast plan` reads: the rate of a run with its defaults.
        record["images_per_second"] = images / seconds[ours]
        record["times_faster_than"] = {
            name: value / seconds[ours] for name, value in seconds.items() if name != ours
        }
        if "floor" in record:
            record["times_the_floor"] = 1e3 * seconds[ours] / record["floor"]["ms"]
        record["summary"] = f"{ours}: {1e3 * seconds[ours]:.1f} ms, " + ", ".join(
            f"{ratio:.2f}x {name}" for name, ratio in record["times_faster_than"].items()
        )
