"""Which part computes in which dtype, and in which memory format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ict_fast.config import NetworkConfig
from ict_fast.networks import UNet
from ict_fast.networks.layers import ResidualBlock
from ict_fast.networks.unet import Pyramid


@contextmanager
def recorded(network: UNet) -> Iterator[dict[str, tuple[list[torch.dtype], Tensor]]]:
    """While active: module name -> (dtypes of its tensor inputs, its output)."""
    seen: dict[str, tuple[list[torch.dtype], Tensor]] = {}

    def hook(name: str) -> Callable:
        def record(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            seen[name] = ([each.dtype for each in inputs if isinstance(each, Tensor)], output)

        return record

    handles = [module.register_forward_hook(hook(name)) for name, module in network.named_modules() if name]
    yield seen
    for handle in handles:
        handle.remove()


def test_ends_stay_fp32_and_the_trunk_is_bf16_under_autocast(
    small_config: NetworkConfig, make_network: Callable, make_inputs: Callable
) -> None:
    network = make_network(small_config)
    images, noise, labels = make_inputs(small_config)
    with recorded(network) as seen, torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(images, noise, labels)
    assert output.dtype == torch.float32

    ends = {"input", "output", "output.norm", "output.conv"}
    ends |= {name for name in seen if name == "embedding" or name.startswith("embedding.")}
    ends |= {name for name in seen if name.endswith(".embedding")}  # the projection in every block
    for name in ends:
        assert seen[name][1].dtype == torch.float32, name
    for name in ends - {"output", "embedding", "embedding.features", "embedding.label"}:
        assert set(seen[name][0]) == {torch.float32}, name

    for name, module in network.named_modules():
        if isinstance(module, ResidualBlock):
            assert seen[name][0] == [torch.bfloat16, torch.float32], name
            for part in ("norm0", "norm1", "conv1"):
                assert seen[f"{name}.{part}"][1].dtype == torch.bfloat16, (name, part)
            if module.attention is not None:
                assert seen[f"{name}.attention.qkv"][1].dtype == torch.bfloat16
        if isinstance(module, ResidualBlock | Pyramid):
            assert seen[name][1].dtype == torch.bfloat16, name
    if small_config.name == "ncsnpp":
        assert seen["encoder.1.pyramid.conv"][1].dtype == torch.float32  # reads the image
        assert seen["encoder.1.pyramid.down"][1].dtype == torch.float32
        assert seen["encoder.2.pyramid.conv"][1].dtype == torch.bfloat16  # reads the trunk


def test_ends_see_what_bf16_would_lose(
    small_config: NetworkConfig, make_network: Callable, make_inputs: Callable
) -> None:
    """Images and noise that differ by less than bf16 resolves still differ after the ends."""
    network = make_network(small_config)
    images, noise, labels = make_inputs(small_config)
    images, noise = images + 4, noise + 4
    near = images * (1 + 2**-12), noise * (1 + 2**-12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(network.input(images), network.input(near[0]))
        difference = network(images, noise, labels) - network(images, near[1], labels)
    assert (difference != 0).any()


def test_autocast_is_close_to_fp32(
    small_config: NetworkConfig, make_network: Callable, make_inputs: Callable
) -> None:
    network = make_network(small_config)
    inputs = make_inputs(small_config)
    expected = network(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(*inputs)
    error = (output - expected).norm() / expected.norm()
    assert 0 < error < 0.03


def test_without_autocast_everything_is_fp32(
    small_config: NetworkConfig, make_network: Callable, make_inputs: Callable
) -> None:
    network = make_network(small_config)
    with recorded(network) as seen:
        network(*make_inputs(small_config))
    outputs = [output for _, output in seen.values() if isinstance(output, Tensor)]
    assert {output.dtype for output in outputs} == {torch.float32}


@pytest.mark.parametrize("image_channels", [1, 3])
def test_channels_last_throughout(
    small_config: NetworkConfig, make_network: Callable, make_inputs: Callable, image_channels: int
) -> None:
    """Also for contiguous NCHW inputs, and for one channel, whose strides fit both formats."""
    config = replace(small_config, image_channels=image_channels)
    network = make_network(config)
    with recorded(network) as seen:
        output = network(*make_inputs(config))
    assert output.is_contiguous(memory_format=torch.channels_last)
    for name, (_, activation) in seen.items():
        if isinstance(activation, Tensor) and activation.ndim == 4 and activation.shape[1] > 1:
            assert activation.is_contiguous(memory_format=torch.channels_last), name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_are_channels_last_throughout(
    small_config: NetworkConfig, make_network: Callable, make_inputs: Callable, dtype: torch.dtype | None
) -> None:
    """Of the output of every module, with the image's own: a backward pass in NCHW would be slow."""
    network = make_network(small_config)
    images, noise, labels = make_inputs(small_config)
    images.requires_grad_()
    seen: dict[str, Tensor] = {}
    with recorded(network) as outputs, torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        output = network(images, noise, labels)
    for name, (_, activation) in outputs.items():
        if isinstance(activation, Tensor) and activation.ndim == 4 and activation.requires_grad:
            activation.register_hook(lambda gradient, name=name: seen.setdefault(name, gradient))
    output.square().sum().backward()
    blocks = {name for name, module in network.named_modules() if isinstance(module, ResidualBlock)}
    assert len(blocks & seen.keys()) == len(blocks)
    for name, gradient in seen.items():  # a slice of what was concatenated is not contiguous
        assert gradient.stride(1) == 1 or gradient.shape[1] == 1, name
