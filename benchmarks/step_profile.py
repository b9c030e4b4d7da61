"""Profiles training steps: ms and launches of one by category, and its most expensive operations.

Categories go by name, see step_categories.py: on a GPU by the kernel's, on a CPU by torch's operation (its
own time, without what it calls). Idle: no kernel ran, or torch did not.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from step_categories import CATEGORIES, DATA, IDLE, category
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

LOADER = "ict-fast: loader"  # what a profiled step's loader is to be named
_SHOWN = 25


def profile_steps(
    run: Callable[[int], Any], steps: Sequence[int], device: torch.device
) -> tuple[dict[str, Any], Any]:
    """Profiles steps that are warm.

    Args:
        run: runs the step of a number.
        steps: their numbers.
    Returns:
        Per step: wall_ms; ms by category; launches by category; the operations that take most, with ms, calls
        and category. And torch's profiler, which can write a trace.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        for step in steps:
            run(step)
        if device.type == "cuda":
            torch.cuda.synchronize()
        wall = 1e3 * (time.perf_counter() - started)
    if device.type == "cuda":
        spans = [
            (each.name, each.time_range.start, each.time_range.end)
            for each in profiler.events()
            if each.device_type == DeviceType.CUDA and not getattr(each, "is_user_annotation", False)
        ]
        table = by_category([(kernel, (end - start) / 1e3) for kernel, start, end in spans])
        idle = wall - covered([(start / 1e3, end / 1e3) for _, start, end in spans])
    else:
        events = profiler.key_averages()
        table = by_category(
            [(each.key, each.self_cpu_time_total / 1e3, each.count) for each in events]  # type: ignore[misc]
        )
        idle = wall - sum(table["ms"].values())
    table["ms"][IDLE] = max(0.0, idle)
    record: dict[str, Any] = {"wall_ms": wall / len(steps)}
    for key in ("ms", "launches"):
        record[key] = {each: value / len(steps) for each, value in table[key].items()}
    record["top"] = [
        {"name": each, "category": category_of(each), "ms": ms / len(steps), "calls": calls / len(steps)}
        for each, ms, calls in table["top"]
    ]
    return record, profiler


def category_of(name: str) -> str:
    """`category`, knowing what this file itself names."""
    return DATA if name == LOADER else category(name)


def categorised(profile: dict[str, Any]) -> dict[str, Any]:
    """A profile by the categories of now, as far as it keeps the kernels: its `top`."""
    milliseconds = dict(profile["ms"])
    for each in profile.get("top", ()):
        found = category_of(each["name"])
        milliseconds[each["category"]] = milliseconds.get(each["category"], 0.0) - each["ms"]
        milliseconds[found] = milliseconds.get(found, 0.0) + each["ms"]
    return profile | {"ms": milliseconds}


def by_category(timed: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """Sums (name, ms) or (name, ms, calls): ms and launches by category; the names that took most."""
    milliseconds: dict[str, float] = defaultdict(float)
    launches: Counter[str] = Counter()
    names: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, ms, *calls in timed:
        count = calls[0] if calls else 1
        found = category_of(name)
        milliseconds[found] += ms
        launches[found] += count
        names[name][0] += ms
        names[name][1] += count
    most = sorted(names.items(), key=lambda item: -item[1][0])[:_SHOWN]
    return {
        "ms": {each: milliseconds[each] for each in CATEGORIES if each in milliseconds},
        "launches": dict(launches),
        "top": [(name[:160], ms, calls) for name, (ms, calls) in most],
    }


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of intervals: kernels of two streams may run at once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
