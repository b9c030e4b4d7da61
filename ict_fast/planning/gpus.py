"""The GPUs that a plan is for: figures of NVIDIA's data sheets, SXM versions, dense; or two of another."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ict_fast.errors import InputError, did_you_mean
from ict_fast.hardware import PeakFlops, peak_flops


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: as people say it.
        memory: bytes.
        peaks: FLOP/s by arithmetic.
        link: bytes/s to the other GPUs of a node, in one direction.
        network: bytes/s to other nodes, of the one adapter that each GPU has, in one direction; 0: unknown,
            there is one node.
        link_name: what the link is.
        assumed: what nobody said of it, in words; empty for a GPU of the table.
    """

    name: str
    memory: float
    peaks: PeakFlops
    link: float
    network: float
    link_name: str = "NVLink"
    assumed: str = ""

    def peak(self, precision: str) -> float:
        """FLOP/s of a trunk in this arithmetic ("auto" is bf16 or fp16)."""
        return self.peaks.of(precision)

    def ring(self, gpus: int) -> float:
        """Bytes/s at which each GPU of a ring sends to the next one.

        Where a ring leaves a node, NCCL spreads it over all adapters there: they add up, as far as the link
        brings them the bytes.
        """
        nodes = math.ceil(gpus / GPUS_PER_NODE)
        return self.link if nodes == 1 else min(self.link, gpus // nodes * self.network)


GPUS_PER_NODE = 8

_PCIE = 32e9  # 4.0, 16 lanes
# A described GPU's fp32 rate, as a share of the rate that is said: A100's, lower than that of most.
_FP32_SHARE = 1 / 16
# More is a mistake of units.
_MOST_GIGABYTES, _MOST_TFLOPS = 1000, 10_000


def _of_data_sheet(name: str, memory: float, nvlink: float, network: float) -> Gpu:
    peaks = peak_flops(name)
    assert peaks is not None, name
    return Gpu(name, memory, peaks, nvlink, network)


# Networks as in NVIDIA's DGX A100 (8 x 200 Gbit/s), DGX H100 and H200 (8 x 400 Gbit/s).
GPUS = {
    "a100": _of_data_sheet("A100 80 GB", 80e9, nvlink=300e9, network=25e9),
    "h100": _of_data_sheet("H100 80 GB", 80e9, nvlink=450e9, network=50e9),
    "h200": _of_data_sheet("H200 141 GB", 141e9, nvlink=450e9, network=50e9),
}


def get(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        InputError: if there is none; names the nearest.
    """
    if name.lower() not in GPUS:
        raise InputError(f'--gpu is "{name}"{did_you_mean(name.lower(), GPUS)}')
    return GPUS[name.lower()]


def described(gigabytes: float, tflops: float, precision: str) -> Gpu:
    """A GPU of which two figures are known; the others are assumed.

    Args:
        gigabytes: of memory.
        tflops: TFLOP/s of dense products in this precision.
        precision: that of the plan. With "auto", a part of which is fp32, that has a sixteenth of the rate.
    Raises:
        InputError: for a figure that no GPU has.
    """
    for option, value, unit, most in (
        ("--gpu-memory", gigabytes, "GB", _MOST_GIGABYTES),
        ("--peak", tflops, "TFLOP/s", _MOST_TFLOPS),
    ):
        if not 0 < value <= most:
            raise InputError(f"{option} is {value:g}; it must be above 0 and at most {most:,} {unit}")
    peak = tflops * 1e12
    single = peak * _FP32_SHARE if precision == "auto" else peak
    assumed = f"no NVLink between the GPUs of its node, but PCIe 4.0 x16 at {_PCIE / 1e9:.0f} GB/s one way"
    if precision == "auto":
        assumed += f", and {tflops * _FP32_SHARE:.3g} TFLOP/s in fp32, a sixteenth of its peak"
    return Gpu(
        name=f"GPU of {gigabytes:g} GB and {tflops:g} TFLOP/s",
        memory=gigabytes * 1e9,
        peaks=PeakFlops(peak, peak, single),
        link=_PCIE,
        network=0.0,
        link_name="PCIe",
        assumed=assumed,
    )
