"""The closed forms against torch's counter, what autograd keeps, and the memory that is alive at the peak.

Memory is that of the fused operations, which a CPU does not run: the passes are made on fake tensors, which
have shapes, storages and lifetimes, and no memory.
"""

from __future__ import annotations

import importlib
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ict_fast import presets
from ict_fast.config import NetworkConfig
from ict_fast.networks import UNet, build_network
from ict_fast.networks.cost import network_cost
from ict_fast.planning.plan import GRADIENTS_ALIVE

COUNT = 7  # no layer has as many rows: what has is an activation
FAMILIES = ["cifar10", "imagenet64", "imagenet64-ct2023"]


_OTHERS: list[dict[str, Any]] = [
    {"name": name, "adaptive_norm": adaptive, "embedding": embedding, "num_classes": classes, **shape}
    for name, adaptive, embedding, classes in (
        ("ncsnpp", True, "positional", 0),
        ("ncsnpp", False, "fourier", 3),
        ("ddpmpp", False, "positional", 3),
        ("ddpmpp", True, "fourier", 0),
        ("adm", False, "fourier", 0),
        ("adm", True, "positional", 3),
    )
    for shape in (
        {"channel_mult": (1,), "attention_resolutions": (16,), "image_channels": 3, "head_channels": 8},
        {"channel_mult": (2, 1, 3), "attention_resolutions": (8, 4), "num_blocks": 2},
        {"channel_mult": (1, 2), "attention_resolutions": ()},
    )
]


@pytest.mark.parametrize("changes", _OTHERS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_flops_of_any_network_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    """A run's own figure is of whatever network was asked for."""
    small = replace(presets.get("digits").network, resolution=16, channels=16)
    _assert_flops_are_torchs(replace(small, **changes))


@pytest.mark.parametrize("preset", ["digits", *FAMILIES])
def test_flops_are_those_that_torch_counts(preset: str) -> None:
    _assert_flops_are_torchs(presets.get(preset).network)


def _assert_flops_are_torchs(config: NetworkConfig) -> None:
    with torch.device("meta"):
        network = build_network(config)
        x = torch.zeros(1, config.image_channels, config.resolution, config.resolution)
        noise, labels = torch.zeros(1), torch.zeros(1, dtype=torch.int64) if config.num_classes else None
        with FlopCounterMode(display=False) as forward:
            output = network(x, noise, labels)
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
    cost = network_cost(network)
    assert cost.parameters == sum(p.numel() for p in network.parameters())
    assert cost.forward_flops == forward.get_total_flops()
    assert cost.backward_flops == backward.get_total_flops()
    assert cost.step_flops == 2 * forward.get_total_flops() + backward.get_total_flops()


def _narrow(preset: str) -> NetworkConfig:
    network = presets.get(preset).network
    return replace(network, channels=32, num_blocks=2, head_channels=16 if network.head_channels else 0)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch, bf16_convolutions: None) -> None:
    """The fused group norm, as on a GPU."""
    module = importlib.import_module("ict_kernels.group_norm_silu")
    monkeypatch.setattr(module, "use_triton", lambda *tensors: True)


def _output(network: UNet, config: NetworkConfig, itemsize: int) -> Tensor:
    x = torch.randn(COUNT, config.image_channels, config.resolution, config.resolution)
    labels = torch.zeros(COUNT, dtype=torch.int64) if config.num_classes else None
    with torch.autocast("cpu", torch.bfloat16, enabled=itemsize == 2, cache_enabled=False):
        return network(
            x.to(memory_format=torch.channels_last),
            torch.randn(COUNT),
            labels,
            dropout_seed=torch.zeros(2, dtype=torch.int64),
        )


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("preset", FAMILIES)
def test_activations_are_those_that_autograd_keeps(preset: str, itemsize: int) -> None:
    config = _narrow(preset)
    network = build_network(config)
    cost = network_cost(network)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[:1] == (COUNT,):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True), hooks:
        output = _output(network, config, itemsize)
    # The teacher's input and both raw outputs are the loss's, which is not part of the network.
    of_loss = 3 * config.image_channels * config.resolution**2 * 4
    measured = sum(storage.nbytes() for storage in kept.values()) / COUNT
    del output
    assert cost.activation_bytes(itemsize) - of_loss == pytest.approx(measured, rel=0.001)


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still in use; and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(made):
            if not isinstance(tensor, Tensor) or tensor.shape[:1] != (COUNT,):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage not in self._seen:
                self._seen.add(storage)
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return made

    def _freed(self, size: int) -> None:
        self.bytes -= size


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("preset", FAMILIES)
def test_the_peak_of_a_pass_is_within_what_a_plan_allows_for(preset: str, itemsize: int) -> None:
    config = _narrow(preset)
    network = build_network(config)
    cost = network_cost(network)
    with FakeTensorMode(allow_non_fake_inputs=True), Alive() as alive:
        _output(network, config, itemsize).sum().backward()
    planned = cost.activation_bytes(itemsize) + GRADIENTS_ALIVE * cost.widest_values * itemsize
    assert 0.92 * planned < alive.peak / COUNT <= planned
