"""Sizes of the published networks, names and initial values of the weights, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ict_fast import presets
from ict_fast.config import NetworkConfig
from ict_fast.errors import InputError
from ict_fast.networks import build_network

NAMES_FILE = Path(__file__).parent / "state_dict_names.txt"


@pytest.mark.parametrize(
    ("preset", "parameters", "flops"),
    [
        ("cifar10", 56.40e6, 42.8e9),
        ("cifar10-deep", 97.6e6, None),
        ("imagenet64-ct2023", 295.9e6, 219.3e9),
    ],
)
def test_published_sizes(preset: str, parameters: float, flops: float | None) -> None:
    config = presets.get(preset).network
    with torch.device("meta"):
        network = build_network(config)
        images = torch.empty(1, config.image_channels, config.resolution, config.resolution)
        labels = torch.zeros(1, dtype=torch.int64) if config.num_classes else None
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            output = network(images, torch.empty(1), labels)
    assert output.shape == images.shape
    assert sum(parameter.numel() for parameter in network.parameters()) == pytest.approx(parameters, rel=1e-3)
    if flops is not None:
        assert counter.get_total_flops() == pytest.approx(flops, rel=1e-3)


@pytest.mark.parametrize("preset", presets.names())
def test_every_preset_builds(preset: str) -> None:
    with torch.device("meta"):
        build_network(presets.get(preset).network)


def test_names_and_shapes_of_the_weights_are_stable(small_configs: dict[str, NetworkConfig]) -> None:
    """Checkpoints depend on them. A deliberate change rewrites the listing beside this file."""
    two_levels = {"channel_mult": (1, 2), "attention_resolutions": (), "num_classes": 5}
    lines = [
        f"{kind} {name} {tuple(tensor.shape)}"
        for kind, config in sorted(small_configs.items())
        for name, tensor in build_network(replace(config, **two_levels)).state_dict().items()
    ]
    assert lines == NAMES_FILE.read_text().splitlines()


def test_build_is_a_function_of_the_global_seed(small_config: NetworkConfig) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_network(small_config).state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_convolution_weights_are_channels_last(small_config: NetworkConfig) -> None:
    for parameter in build_network(small_config).parameters():
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last)


def test_ncsnpp_starts_as_published(small_configs: dict[str, NetworkConfig]) -> None:
    """Glorot's bound sqrt(6 / (fan in + fan out)), times 1e-5 at ends of branches, sqrt(0.2) for q, k, v."""
    torch.manual_seed(0)
    network = build_network(replace(small_configs["ncsnpp"], channels=32))
    for name, parameter in network.named_parameters():
        if "norm" in name:
            continue
        if parameter.ndim == 1:
            assert parameter.abs().max() == 0, name
            continue
        area = parameter[0, 0].numel()
        bound = math.sqrt(6 / (area * (parameter.shape[0] + parameter.shape[1])))
        if "conv1" in name or "projection" in name or name == "output.conv.weight":
            bound *= 1e-5
        if "qkv" in name:
            bound *= math.sqrt(0.2)
        largest = parameter.abs().max().item()
        assert 0.95 * bound < largest <= bound * 1.0001, name


def test_adm_starts_as_published(small_configs: dict[str, NetworkConfig]) -> None:
    """Uniform in +-1/sqrt(fan in), biases too; zeros at the ends of branches; unit normal class vectors."""
    torch.manual_seed(0)
    network = build_network(replace(small_configs["adm"], channels=32, num_classes=100))
    fan_in = {name.removesuffix(".weight"): tensor[0].numel() for name, tensor in network.named_parameters()}
    for name, parameter in network.named_parameters():
        if "norm" in name:
            continue
        if "conv1" in name or "projection" in name or name.startswith("output.conv"):
            assert parameter.abs().max() == 0, name
        elif name == "embedding.label.weight":
            assert abs(parameter.std() - 1) < 0.05
        else:
            bound = 1 / math.sqrt(fan_in[name.rpartition(".")[0]])
            assert 0.8 * bound < parameter.abs().max() <= bound * 1.0001, name


def test_gradient_reaches_every_parameter(
    small_config: NetworkConfig, make_network: Callable, make_inputs: Callable
) -> None:
    network = make_network(small_config)
    network(*make_inputs(small_config)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "ncsnp"}, 'network.name is "ncsnp"; did you mean "ncsnpp"'),
        ({"embedding": "furier"}, 'did you mean "fourier"'),
        ({"resolution": 10}, "network.resolution is 10; it must be a multiple of 4"),
        ({"channels": 7}, "network.channels is 7; it must be even"),
        ({"channels": 2}, "network.channels"),
        ({"channels": 36, "channel_mult": (1, 4)}, "144 channels"),
        # Every level's width is fine; the first decoder block's input, 84 + 84, is not.
        ({"channels": 28, "channel_mult": (4, 3), "attention_resolutions": ()}, "168 channels"),
        ({"head_channels": 3}, "network.head-channels is 3"),
        ({"head_channels": 5, "attention_resolutions": ()}, "network.head-channels is 5; it must divide"),
        ({"attention_resolutions": (16,)}, "attention-resolutions is 16"),
        ({"image_channels": 0}, "network.image-channels is 0"),
        ({"dropout": 1.0}, "network.dropout is 1.0"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(
    small_configs: dict[str, NetworkConfig], changes: dict, reason: str
) -> None:
    with torch.device("meta"), pytest.raises(InputError) as caught:
        build_network(replace(small_configs["ncsnpp"], **changes))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_inputs_are_refused(
    small_config: NetworkConfig, make_network: Callable, make_inputs: Callable
) -> None:
    network = make_network(small_config)
    images, noise, labels = make_inputs(small_config)
    with pytest.raises(
        InputError, match=r"images of shape \(3, 1, 8, 8\); this network takes \(N, 3, 8, 8\)"
    ):
        network(images[:, :1], noise, labels)
    with pytest.raises(InputError, match=r"images of shape \(3, 3, 4, 4\)"):
        network(images[:, :, :4, :4], noise, labels)
    with pytest.raises(InputError, match=r"noise of shape \(1,\)"):
        network(images, noise[:1], labels)
    if labels is None:
        with pytest.raises(InputError, match="built without classes"):
            network(images, noise, torch.zeros(3, dtype=torch.int64))
    else:
        with pytest.raises(InputError, match="conditional on 5 classes"):
            network(images, noise)
        with pytest.raises(InputError, match=r"labels of shape \(2,\)"):
            network(images, noise, labels[:2])
        with pytest.raises(InputError, match="labels of type float32; they are class numbers, int64"):
            network(images, noise, labels.float())
