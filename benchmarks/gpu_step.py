"""Part `step` of run_gpu.py: whole training steps of both networks, beside the same steps in plain torch.

Variants follow one another, each in its own network, since compiled blocks of several would share one cache
of torch's; then once more in reverse order while the budget lasts (A B C C B A), so that a drift of the clock
shows and cancels. Ours comes first, then the floor: the step's convolutions and attention timed alone,
without the passes over memory that come with them where nothing is compiled. The record is given anew after
every variant. After it has been timed, two steps of each are profiled. What a variant compiles, other
processes compile just before it: one that the time does not reach takes none of it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from cache_keys import explained_misses
from gpu_step_blocks import COMPILED, OURS, compile_beforehand
from gpu_step_floor import measure_floor
from gpu_step_variants import AUTOTUNED, CAPTURED, CPU_VARIANTS, FLOOR, ON_REQUEST, QUICK, VARIANTS, WORDS
from machine import ceilings, matrix_tflop_per_s, seconds_of
from step_counts import count_step
from step_profile import profile_steps
from step_timing import time_steps
from torch._dynamo.utils import counters

from ict_fast import presets
from ict_fast.config import Config
from ict_fast.training.step import trunk_dtype

# (preset, images): the step with the goals goes first.
GPU_SIZES = (("imagenet64", 128), ("cifar10", 512))
CPU_SIZES = (("digits", 32),)
# A captured step runs three times before it is captured. Of the timed ones the first counts for nothing.
WARM_UP_STEPS, TIMED_STEPS, PROFILED_STEPS = 5, 11, 2


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


# ---------------------------------------------------------------------------------------------- the measuring


def part_step(device: torch.device, session: Any) -> dict[str, Callable[[], Iterator[dict]]]:
    """What to measure, by name; on a CPU the digits' small network.

    Args:
        session: whose `share()` is the seconds that the measurement which asks may take, and whose `variants`
            are words of WORDS; none for all but those on request. With max-autotune the measurement has
            another name.
    """
    names = [name for word, name in WORDS.items() if word in session.variants]
    suffix = ", max-autotune" if AUTOTUNED in names else ""
    return {
        f"step, {preset}{suffix}": lambda preset=preset, images=images: measure_steps(  # type: ignore[misc]
            preset, images, device, session.share(), names
        )
        for preset, images in (CPU_SIZES if device.type == "cpu" else GPU_SIZES)
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
        images: in a step; halved until every variant fits into the device's memory. What was measured of a
            larger batch stays in the record, under `larger_batches`.
        budget_seconds: no variant is begun after this time; what is left out is named.
        names: what to measure, values of WORDS; by default all that make sense on the device.
    Yields:
        The record so far, after every variant, and while the floor is measured.
    """
    started, config = time.monotonic(), step_config(preset, images)
    names = list(names) or [name for name in WORDS.values() if name not in ON_REQUEST]
    if device.type == "cpu":
        names = [name for name in CPU_VARIANTS if name in names] or names
    peak = ceilings(device.type)["matrix_tflop_per_s"]["bf16" if device.type == "cuda" else "fp32"]
    record: dict[str, Any] = {
        "preset": preset,
        "batch_size": images,
        "precision": "fp32" if trunk_dtype(config.training.precision, device) is None else "bf16",
        "matrix_tflop_per_s": peak,
        "timed": "steps that follow one another without a wait",
        "variants": {},
        "left_out": {},
        "failed": {},
        "compiled_beforehand": {},
    }
    took: dict[str, float] = {}

    def left() -> float:
        return budget_seconds - (time.monotonic() - started)

    def time_is_up(name: str) -> bool:
        """A variant's first pass is expected to take half of what the longest of its kind has taken: with the
        first, cuDNN tried its algorithms for all. To compile its blocks, as long as those before it took."""
        alike = [took[each] for each in took if (each in QUICK) == (name in QUICK)]
        compiled = record["compiled_beforehand"]
        is_to_come = name in COMPILED and name not in compiled
        compiling = [each["seconds"] for each in compiled.values() if is_to_come]
        return left() < max(alike, default=0.0) / 2 + max(compiling, default=0.0)

    to_come = list(names)
    while to_come:
        name = to_come.pop(0)
        if record["variants"] and time_is_up(name):
            record["left_out"][name] = f"the {budget_seconds:.0f} s of this network were used up"
            continue
        if name == FLOOR:
            yield from _add_floor(record, config, device, left)
            continue
        if device.type == "cuda" and name in COMPILED:
            record["compiled_beforehand"][name] = compile_beforehand(name, config, left() / 2)
        begun = time.monotonic()
        fits = _measure_variant(name, config, device, record, halve=not time_is_up(name))
        took[name] = time.monotonic() - begun
        if fits is not config:  # all variants take the same batch, so they begin anew
            if record["variants"]:
                record.setdefault("larger_batches", {})[str(config.training.batch_size)] = record["variants"]
            config, to_come = fits, list(names)
            record |= {"batch_size": config.training.batch_size, "compiled_beforehand": {}}
            record |= {"variants": {}, "failed": {}, "left_out": {}}
            record.pop("floor", None)
            continue
        _summarise(record, config)
        yield record
    if not (record["variants"] or "floor" in record) or names[0] in record["failed"]:
        record["error"] = "; ".join(f"{name}: {reason}" for name, reason in record["failed"].items())
        yield record
        return
    for name in reversed(list(record["variants"])):
        if left() < took[name] / 2:  # its code is in the caches
            break
        _measure_variant(name, config, device, record, halve=False)
        _summarise(record, config)
        yield record


def _add_floor(
    record: dict[str, Any], config: Config, device: torch.device, left: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    if device.type != "cuda":
        return
    try:
        for floor in measure_floor(record["preset"], record["batch_size"], device, left):
            record["floor"] = floor
            _summarise(record, config)
            yield record
    except Exception as error:
        if record.get("floor", {}).get("share_of_flops") == 1:  # only the sequence is lacking
            record["floor"]["sequence_failed"] = _in_a_line(error)
        else:
            record["failed"][FLOOR] = _in_a_line(error)
    clean_up(device)


def _measure_variant(
    name: str, config: Config, device: torch.device, record: dict[str, Any], *, halve: bool
) -> Config:
    """Adds a pass of a variant to the record, or why there is none.

    Args:
        halve: if it does not fit into memory, leave the record as it is and return the configuration with
            half the batch. Otherwise the one given is returned.
    """
    batch, problem, figures = config.training.batch_size, "", {}
    try:
        figures = _time_variant(name, config, device)
    except torch.OutOfMemoryError:
        if halve and batch >= 16:
            config = replace(config, training=replace(config.training, batch_size=batch // 2))
        problem = f"out of memory at {batch} images"
    except Exception as error:
        problem = _in_a_line(error)
    clean_up(device)  # now that no error's traceback holds tensors
    if problem:
        if config.training.batch_size == batch:
            record["failed"][name] = problem
        return config
    of_pass = figures.pop("pass")
    record["variants"].setdefault(name, {"passes": [], **figures})["passes"].append(of_pass)
    return config


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def clean_up(device: torch.device) -> None:
    """Frees compiled code and memory; captured graphs stand in cycles with their tensors."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _time_variant(name: str, config: Config, device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step, state = VARIANTS[name](config, device)
    batches = synthetic_batches(config, device)
    counters.clear()
    with explained_misses() if device.type == "cuda" else nullcontext(dict[str, int]()) as unlike:
        first = seconds_of(lambda: step(0, batches), device)
    graphs = {each: counters["inductor"][f"fxgraph_cache_{each}"] for each in ("hit", "miss")}
    for k in range(1, WARM_UP_STEPS):
        step(k, batches)
    rate = _matrix_rate(device)
    # What cuDNN and Inductor take to choose their kernels is no step's. A captured step has all it takes.
    if device.type == "cuda" and name != CAPTURED:
        torch.cuda.reset_peak_memory_stats()
    times = time_steps(lambda k: step(k, batches), range(WARM_UP_STEPS, WARM_UP_STEPS + TIMED_STEPS), device)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    skipped, finite = int(state.optimizer.skipped), int(state.losses.count)
    if skipped or finite < WARM_UP_STEPS + TIMED_STEPS:
        raise FloatingPointError(
            f"{skipped} steps skipped, {finite} of the losses finite: the times are no step's"
        )
    after = WARM_UP_STEPS + TIMED_STEPS
    profiled, _ = profile_steps(lambda k: step(k, batches), range(after, after + PROFILED_STEPS), device)
    return {
        "first_step_s": round(first, 2),
        "graphs_in_cache": graphs,  # whether what was compiled beforehand is what the step needs
        "unlike_beforehand": dict(unlike),  # and if not, in which parts of its key
        "parameters": sum(p.numel() for p in state.network.parameters()),
        "peak_memory_bytes": peak,
        "profile": profiled,
        "pass": times.record() | {"matrix_tflop_per_s": rate},
    }


def _matrix_rate(device: torch.device) -> float | None:
    """The rate of a matrix product now: whether the clock is what it was for the variant before."""
    if device.type != "cuda":
        return None
    return matrix_tflop_per_s(*(torch.randn(4096, 4096, device=device).bfloat16() for _ in range(2)))


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
