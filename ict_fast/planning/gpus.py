"""The GPUs that a plan can be made for: figures of NVIDIA's data sheets, SXM versions, dense."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ict_fast.errors import InputError, did_you_mean
from ict_fast.hardware import peak_flops


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        name: as people say it.
        memory: bytes.
        nvlink: bytes/s to the other GPUs of a node, in one direction.
        network: bytes/s to other nodes, of the one adapter that each GPU has, in one direction.
    """

    name: str
    memory: float
    nvlink: float
    network: float

    def peak(self, precision: str) -> float:
        """FLOP/s of a trunk in this arithmetic ("auto" is bf16 or fp16)."""
        rates = peak_flops(self.name)
        assert rates is not None, self.name
        return rates.of(precision)

    def ring(self, gpus: int) -> float:
        """Bytes/s at which each GPU of a ring sends to the next one.

        Where a ring leaves a node, NCCL spreads it over all adapters there: they add up, as far as NVLink
        brings them the bytes.
        """
        nodes = math.ceil(gpus / GPUS_PER_NODE)
        return self.nvlink if nodes == 1 else min(self.nvlink, gpus // nodes * self.network)


GPUS_PER_NODE = 8

# Networks as in NVIDIA's DGX A100 (8 x 200 Gbit/s), DGX H100 and H200 (8 x 400 Gbit/s).
GPUS = {
    "a100": Gpu("A100 80 GB", 80e9, nvlink=300e9, network=25e9),
    "h100": Gpu("H100 80 GB", 80e9, nvlink=450e9, network=50e9),
    "h200": Gpu("H200 141 GB", 141e9, nvlink=450e9, network=50e9),
}


def get(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        InputError: if there is none; names the nearest.
    """
    if name.lower() not in GPUS:
        raise InputError(f'--gpu is "{name}"{did_you_mean(name.lower(), GPUS)}')
    return GPUS[name.lower()]
