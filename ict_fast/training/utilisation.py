"""How much of the hardware a run uses: FLOPs per image, model FLOP utilisation, memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ict_fast.hardware import PeakFlops, peak_flops
from ict_fast.networks import UNet
from ict_fast.networks.cost import network_cost
from ict_fast.training.loss_by_sigma import sigma_edges
from ict_fast.training.run_directory import Run, update

# Student: forward, and twice that backward. Teacher: forward.
_FORWARD_PASSES = 4


class Utilisation:
    """What a rate of images means for this run's devices.

    Attributes:
        flops_per_image: of a training step.
        device: the name of the GPU, or "cpu".
        peak: of all devices; None where it is not known.
    """

    def __init__(self, network: UNet, device: torch.device, processes: int) -> None:
        self.flops_per_image = _FORWARD_PASSES * network_cost(network).forward_flops
        self._device = device
        self.device = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        rates = peak_flops(self.device)
        self.peak = None if rates is None else PeakFlops(*(processes * rate for rate in rates))

    def mfu(self, images_per_second: float, precision: str) -> float | None:
        """Share of the devices' peak that the model's FLOPs are, at the peak of the trunk's arithmetic."""
        if self.peak is None:
            return None
        return images_per_second * self.flops_per_image / self.peak.of(precision)

    def memory_gb(self) -> float | None:
        """Most memory used so far, in 10^9 bytes: allocated by torch on this GPU, or resident on the host."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 1e9
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
        return None


def describe_run(run: Run, utilisation: Utilisation, processes: int) -> None:
    """Writes run.json: what the figures of log.jsonl refer to, as of the run's last start.

    Raises:
        InputError, TrainingError: see `update`.
    """
    peak = utilisation.peak
    values = {
        "sigma_edges": sigma_edges(run.config.method),
        "device": utilisation.device,
        "processes": processes,
        "flops_per_image": utilisation.flops_per_image,
        "peak_flops": None if peak is None else peak._asdict(),
    }
    update(run, "run.json", (json.dumps(values, indent=1) + "\n").encode())
