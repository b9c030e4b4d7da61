"""The networks forward and backward: `pytest benchmarks/ --benchmark-only`.

FLOPs are those of matrix products and convolutions, counted by torch (2 per multiply-add). The norms are the
package's; "torch's norms" is the same network with torch's own in their place (plain_network.py). Both large
networks run here for one image: the whole of CIFAR-10's takes a core 3 s, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flops import flops_of
from plain_network import use_torchs_layers
from torch import Tensor, nn

from ict_fast import presets
from ict_fast.networks import build_network

OURS, THEIRS = "ict_kernels", "torch's norms"
# (preset, images on a CPU, images on a GPU, rounds).
SIZES = (("digits", 96, 96, 20), ("cifar10", 1, 512, 3), ("imagenet64", 1, 128, 2))


def network_calls(
    preset: str, images: int, variant: str, device: torch.device
) -> tuple[Callable[[], Tensor], Callable[[Tensor], None], int]:
    """The network without gradients, and with: (forward, backward from an output, parameters)."""
    config = presets.get(preset).network
    with device:
        network: nn.Module = build_network(config)
    if variant == THEIRS:
        use_torchs_layers(network)
    generator = torch.Generator(device).manual_seed(0)
    shape = (images, config.image_channels, config.resolution, config.resolution)
    x = torch.empty(shape, device=device).normal_(generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    noise = torch.empty(images, device=device).normal_(generator=generator)
    labels = torch.zeros(images, dtype=torch.int64, device=device) if config.num_classes else None
    seed = torch.tensor([0, 1], device=device)

    def forward() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output: Tensor = network(x, noise, labels, dropout_seed=seed)
        return output

    def backward(output: Tensor) -> None:
        network.zero_grad()
        output.sum().backward()

    return forward, backward, sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("variant", [OURS, THEIRS])
@pytest.mark.parametrize(("preset", "images", "_", "rounds"), SIZES, ids=[each[0] for each in SIZES])
@pytest.mark.benchmark(group="networks, CPU")
def test_network(
    benchmark: Any, record: Any, preset: str, images: int, _: int, rounds: int, variant: str
) -> None:
    forward, backward, parameters = network_calls(preset, images, variant, torch.device("cpu"))
    flops = flops_of(lambda: backward(forward()))
    benchmark.pedantic(lambda: backward(forward()), rounds=rounds)
    record(
        op=f"network forward and backward, {preset}",
        variant=variant,
        baseline=THEIRS,
        flops=flops,
        images=images,
        parameters=parameters,
    )


@pytest.mark.parametrize("variant", [OURS, THEIRS])
@pytest.mark.parametrize(("preset", "images", "_", "rounds"), SIZES, ids=[each[0] for each in SIZES])
@pytest.mark.benchmark(group="networks, CPU")
def test_network_forward(
    benchmark: Any, record: Any, preset: str, images: int, _: int, rounds: int, variant: str
) -> None:
    forward, _, parameters = network_calls(preset, images, variant, torch.device("cpu"))
    with torch.no_grad():
        flops = flops_of(forward)
        benchmark.pedantic(forward, rounds=rounds)
    record(
        op=f"network forward, {preset}",
        variant=variant,
        baseline=THEIRS,
        flops=flops,
        images=images,
        parameters=parameters,
    )


@pytest.mark.parametrize("variant", [OURS, THEIRS])
@pytest.mark.parametrize(("preset", "_", "images", "rounds"), SIZES[1:], ids=[each[0] for each in SIZES[1:]])
@pytest.mark.benchmark(group="networks, GPU")
def test_network_on_a_gpu(
    benchmark: Any,
    record: Any,
    gpu: torch.device,
    preset: str,
    images: int,
    _: int,
    rounds: int,
    variant: str,
) -> None:
    forward, backward, parameters = network_calls(preset, images, variant, gpu)
    flops = flops_of(lambda: backward(forward()))

    def run() -> None:
        backward(forward())
        torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=10, warmup_rounds=3)
    record(
        op=f"network forward and backward, {preset}",
        variant=variant,
        baseline=THEIRS,
        flops=flops,
        images=images,
        parameters=parameters,
        dtype="bf16",
        device="cuda",
    )
