"""What the operating system says of this machine, asked without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple


def usable_cores() -> int:
    """The cores that this process may use: fewer than the machine has under SLURM, cpusets and taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory() -> int | None:
    """What the system can give without swapping, the page cache included, in bytes; None where unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    amounts = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(amounts[0]) * 1024 if amounts else None


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
