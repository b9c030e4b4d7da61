"""What the operating system says of this machine's GPUs, asked without torch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


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
