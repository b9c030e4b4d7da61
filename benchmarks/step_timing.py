"""Times steps that follow one another, as in a run, and says what held them up if not their kernels.

Beside each time stands how far the device was behind the host; beside all of them what the allocator asked
of the driver, and the clock, power and limits that nvidia-smi saw meanwhile.
"""

from __future__ import annotations

import itertools
import select
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

_WATCHED_EVERY_MS = 100
# By itself power.draw is the mean of a second.
_FIELDS = ("clocks.sm", "power.draw.instant", "clocks_event_reasons.active")
_MOST_SECONDS = 5.0  # that nvidia-smi is waited for, at its start and at its end
# Of NVML's bits (nvml.h, nvmlClocksEventReasons) those that slow a device down.
LIMITS = {
    0x2: "applications' clocks",
    0x10: "sync boost",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "temperature",
    0x40: "temperature, by hardware",
    0x80: "power brake",
}


@dataclass
class StepTimes:
    """Of consecutive steps.

    Attributes:
        ms: of each, by the device's clock.
        host_ms: until the host had queued it.
        behind_ms: how long after that the device had done it. Near 0 the host is what bounds the steps, and
            the device waits for it; none on a CPU.
        device_allocations: times that torch's allocator asked the driver for memory, which waits for the
            device; 0 of steps that are warm.
        gpu: see `watched`.
    """

    ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    behind_ms: list[float] = field(default_factory=list)
    device_allocations: int = 0
    gpu: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As the JSON has it: all times, of the rest medians."""
        return {
            "ms_all": self.ms,
            "host_ms": statistics.median(self.host_ms),
            "behind_ms": statistics.median(self.behind_ms) if self.behind_ms else None,
            "device_allocations": self.device_allocations,
            "gpu": self.gpu,
        }


def time_steps(step: Callable[[int], object], numbers: Sequence[int], device: torch.device) -> StepTimes:
    """Times steps one behind the other.

    As in a run, where nothing waits for the device: it finds the next step queued when it ends one, unless
    the host is the slower of the two. A host that is ahead waits for room in the queue, so that its part says
    nothing of what it could do. The first of the steps begins on an idle device, and is not timed.

    Args:
        step: of its number.
        numbers: of the steps, one more than are timed.
        device: on a CPU the host's part is all.
    """
    if device.type != "cuda":
        host = []
        for number in numbers:
            begun = time.perf_counter()
            step(number)
            host.append(1e3 * (time.perf_counter() - begun))
        return StepTimes(host[1:], host[1:])
    times, host_ends = StepTimes(), []
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(numbers) + 1)]
    allocated = _allocations()
    with watched(device) as times.gpu:
        begun = time.perf_counter()
        marks[0].record()
        for number, mark in zip(numbers, marks[1:], strict=True):
            step(number)
            mark.record()
            host_ends.append(1e3 * (time.perf_counter() - begun))
        torch.cuda.synchronize()
    times.device_allocations = _allocations() - allocated
    times.ms = [start.elapsed_time(end) for start, end in itertools.pairwise(marks[1:])]
    times.host_ms = [end - start for start, end in itertools.pairwise(host_ends)]
    ends = [marks[0].elapsed_time(mark) for mark in marks[2:]]
    times.behind_ms = [end - host for end, host in zip(ends, host_ends[1:], strict=True)]
    return times


def _allocations() -> int:
    statistics_of = torch.cuda.memory_stats()
    return sum(int(statistics_of.get(each, 0)) for each in ("num_device_alloc", "num_device_free"))


@contextmanager
def watched(device: torch.device) -> Iterator[dict[str, Any]]:
    """Asks nvidia-smi for the device's clock, power and limits while the body runs.

    The body begins after the first answer, which is of the device before it and does not count.

    Yields:
        A dict, filled at the end of the body: answers, how many there were; if there were any, sm_mhz and
        watts, medians, and limited_by, the share of the answers that name each limit of LIMITS.
    """
    found: dict[str, Any] = {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    command += ["-i", f"GPU-{torch.cuda.get_device_properties(device).uuid}", "-lms", str(_WATCHED_EVERY_MS)]
    try:
        asking = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        found |= summary([])
        yield found
        return
    try:
        select.select([asking.stdout], [], [], _MOST_SECONDS)
        yield found
    finally:
        asking.terminate()
        try:
            output, _ = asking.communicate(timeout=_MOST_SECONDS)
        except subprocess.TimeoutExpired:
            asking.kill()
            output, _ = asking.communicate()
        found |= summary(output.splitlines()[1:])


def summary(answers: Sequence[str]) -> dict[str, Any]:
    """What lines of nvidia-smi say together; one that is not whole counts for nothing."""
    clocks, powers, limits = [], [], Counter[str]()
    for line in answers:
        try:
            clock, power, reasons = line.split(",")
            clock_mhz, watts, bits = float(clock), float(power), int(reasons, 16)
        except ValueError:
            continue
        clocks.append(clock_mhz)
        powers.append(watts)
        limits.update(name for bit, name in LIMITS.items() if bits & bit)
    if not clocks:
        return {"answers": 0}
    return {
        "sm_mhz": statistics.median(clocks),
        "watts": statistics.median(powers),
        "limited_by": {name: count / len(clocks) for name, count in limits.items()},
        "answers": len(clocks),
    }
