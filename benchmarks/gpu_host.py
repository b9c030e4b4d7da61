"""For part `kernels` of run_gpu.py: what a call costs the host, of tensors for which the device is faster.

That is what bounds a small network that is not compiled. On a CPU it says nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_baselines import by_definition
from gpu_timing import OURS
from torch import Tensor

from ict_kernels import GroupNormSiLU, consistency_loss, sample_noise_levels

NAME = "host, calls of small tensors"
# A round of eager losses, thirty launches each, still fits into the device's queue.
CALLS, ROUNDS = 20, 9
_GROUPS, _CHANNELS = 8, 64

Calls = dict[str, dict[str, Callable[[], object]]]


def measure_host(device: torch.device) -> dict[str, Any]:
    """Microseconds until the host has queued a call, medians of rounds of CALLS that nothing waits between.

    Returns:
        host_us: by what is called, then by variant.
    """
    calls, rounds = (CALLS, ROUNDS) if device.type == "cuda" else (1, 1)
    found = {}
    for what, variants in _calls(device).items():
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(1 + rounds):  # the first compiles
            for name, call in variants.items():
                times[name].append(_round_us(call, calls, device))
        found[what] = {name: statistics.median(each[1:]) for name, each in times.items()}
    summary = "; ".join(f"{what}: {us[OURS]:.0f} us, eager {us['eager']:.0f}" for what, us in found.items())
    return {"host_us": found, "calls": calls, "rounds": rounds, "summary": summary}


def _round_us(call: Callable[[], object], calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(calls):
        call()
    return 1e6 * (time.perf_counter() - begun) / calls


def _calls(device: torch.device) -> Calls:
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
        return values.contiguous(memory_format=torch.channels_last)

    norm = GroupNormSiLU(_GROUPS, _CHANNELS).to(device)
    weight, bias = (each.detach().to(dtype).requires_grad_() for each in (norm.weight, norm.bias))
    x, dy = (image(4, _CHANNELS, 8, 8, dtype=dtype) for _ in range(2))
    x.requires_grad_()
    levels = sample_noise_levels(4, 1281, seed=torch.tensor([1, 2], device=device))
    images = [image(4, 3, 8, 8) for _ in range(4)]
    images[0].requires_grad_()
    gradient = torch.ones(4, device=device)

    def torchs() -> Tensor:
        return F.silu(F.group_norm(x, _GROUPS, weight, bias, norm.eps))

    def without_gradient(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(function)

    def both(
        function: Callable[[], Tensor], leaves: list[Tensor], gradient: Tensor
    ) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(function(), leaves, gradient)

    eager_loss = by_definition(consistency_loss)
    parameters = list(norm.parameters())
    return {
        "group_norm_silu, forward": {
            OURS: without_gradient(lambda: norm(x)),
            "eager": without_gradient(torchs),
        },
        "group_norm_silu, forward and backward": {
            OURS: both(lambda: norm(x), [x, *parameters], dy),
            "eager": both(torchs, [x, weight, bias], dy),
        },
        "consistency_loss, forward and backward": {
            OURS: both(lambda: consistency_loss(*images, levels), images[:1], gradient),
            "eager": both(lambda: eager_loss(*images, levels), images[:1], gradient),
        },
    }
