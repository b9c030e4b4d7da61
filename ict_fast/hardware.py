"""What the operating system says of this machine, asked without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_MEMBERSHIP = Path("/proc/self/cgroup")
_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """The cores that this process may use: fewer than the machine has under SLURM, cpusets and taskset.

    A container may be given time on all cores instead, here counted as whole ones.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _control_groups("cpu"):
        given = _words(group / "cpu.max") or [
            *_words(group / "cpu.cfs_quota_us"),
            *_words(group / "cpu.cfs_period_us"),
        ]
        if len(given) == 2 and given[0].isdigit():  # without a limit "max" or "-1"
            cores = min(cores, max(1, int(given[0]) // int(given[1])))
    return cores


def available_memory() -> int | None:
    """What the system can give without swapping, the page cache included, in bytes; None where unknown.

    In a container at most what is left of its limit, and the part of the page cache that is given back first.
    """
    known = _words(Path("/proc/meminfo"))
    amounts = [int(known[known.index("MemAvailable:") + 1]) * 1024] if "MemAvailable:" in known else []
    for group in _control_groups("memory"):
        limit = _words(group / "memory.max") or _words(group / "memory.limit_in_bytes")
        used = _words(group / "memory.current") or _words(group / "memory.usage_in_bytes")
        if limit and used and limit[0].isdigit():
            words = _words(group / "memory.stat")
            counts = dict(zip(words[::2], words[1::2], strict=False))
            # In version 1 "inactive_file" is without the groups in it.
            cached = counts.get("total_inactive_file") or counts.get("inactive_file") or "0"
            amounts.append(max(0, int(limit[0]) - int(used[0]) + int(cached)))
    return min(amounts, default=None)


def _control_groups(controller: str) -> Iterator[Path]:
    """The folders of the control groups of this process, from its own to the outermost; of both versions."""
    for line in _text(_MEMBERSHIP).splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _CONTROL_GROUPS / (controller if controllers else "")
        # From inside of a container "/.." may lead out of it, and what it names may not be there.
        group = Path(os.path.normpath(own))
        yield from (root / each.relative_to("/") for each in (group, *group.parents))


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    """Empty where there is no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""


def nvidia_device() -> str | None:
    """How the operating system shows an NVIDIA GPU, whatever torch thinks of it; None if there is none."""
    devices = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if devices:
        return str(devices[0])
    if Path("/proc/driver/nvidia").exists():
        return "/proc/driver/nvidia"
    if shutil.which("nvidia-smi"):
        try:
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if listed.returncode == 0 and "GPU" in listed.stdout:
            return "nvidia-smi -L"
    return None


class PeakFlops(NamedTuple):
    """Rates of dense matrix products in FLOP/s: in bf16 or fp16 with fp32 sums, in TF32, and in fp32."""

    half: float
    tf32: float
    fp32: float

    def of(self, precision: str) -> float:
        """The rate of a trunk in this arithmetic; "auto" is bf16 or fp16."""
        return {"tf32": self.tf32, "fp32": self.fp32}.get(precision, self.half)


# Half precision and fp32 without tensor cores, in TFLOP/s, from NVIDIA's data sheets; TF32 has half the rate
# of bf16; the first entry that a GPU's name contains counts.
_PEAKS = {
    "GB200": (2500.0, 80.0),
    "B200": (2250.0, 75.0),
    "H200 NVL": (835.0, 60.0),
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
}


def peak_flops(name: str) -> PeakFlops | None:
    """The rates of a GPU in FLOP/s.

    Args:
        name: as torch.cuda.get_device_name gives it.
    Returns:
        None for a device that is not in the table.
    """
    for known, (half, single) in _PEAKS.items():
        if known in name:
            return PeakFlops(half * 1e12, half * 1e12 / 2, single * 1e12)
    return None
