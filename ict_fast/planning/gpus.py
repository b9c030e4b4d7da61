"""The GPUs that a plan can be made for: figures of NVIDIA's data sheets, SXM versions, dense."""

from __future__ import annotations

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
    """

    name: str
    memory: float
    nvlink: float

    def peak(self, precision: str) -> float:
        """FLOP/s of a trunk in this arithmetic ("auto" is bf16 or fp16)."""
        rates = peak_flops(self.name)
        assert rates is not None, self.name
        return rates.of(precision)


GPUS = {
    "a100": Gpu("A100 80 GB", 80e9, nvlink=300e9),
    "h100": Gpu("H100 80 GB", 80e9, nvlink=450e9),
    "h200": Gpu("H200 141 GB", 141e9, nvlink=450e9),
}

GPUS_PER_NODE = 8

NETWORK = 50e9
"""Bytes/s of each GPU to other nodes, in one direction: 400 Gbit/s, as in NVIDIA's DGX H100."""


def get(name: str) -> Gpu:
    """The GPU of that name.

    Raises:
        InputError: if there is none; names the nearest.
    """
    if name.lower() not in GPUS:
        raise InputError(f'--gpu is "{name}"{did_you_mean(name.lower(), GPUS)}')
    return GPUS[name.lower()]
