"""Weights cast once a step give what autocast gives, which casts each wherever it is used."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from ict_fast.config import Config
from ict_fast.networks import build_network
from ict_fast.networks.casts import TrunkCasts
from ict_fast.networks.layers import ResidualBlock
from ict_fast.networks.tf32 import TrunkConv2d
from ict_fast.training.step import TrainStep

CPU = torch.device("cpu")


@pytest.fixture
def all_kinds(tiny: Config) -> Config:
    """Every kind of convolution that a trunk has: NCSN++'s pyramid, skips, resampling, attention; bf16."""
    network = replace(tiny.network, name="ncsnpp", num_classes=10, attention_resolutions=(4,))
    return replace(tiny, network=network, training=replace(tiny.training, precision="bf16"))


def _trunk(step: TrainStep) -> list[TrunkConv2d]:
    return [module for module in step.network.modules() if isinstance(module, TrunkConv2d)]


def _state(step: TrainStep) -> dict[str, Tensor]:
    return {f"{file}/{name}": each for file, of in step.tensors().items() for name, each in of.items()}


@pytest.mark.parametrize(
    ("precision", "teacher"), [("bf16", "stopgrad"), ("bf16", "ema"), ("fp16", "stopgrad")]
)
def test_steps_are_those_of_autocast_bit_for_bit(
    all_kinds: Config, batches: Callable, precision: str, teacher: str
) -> None:
    config = replace(
        all_kinds,
        method=replace(all_kinds.method, teacher=teacher),
        training=replace(all_kinds.training, precision=precision),
    )
    ours, autocast = TrainStep(config, CPU), TrainStep(config, CPU)
    autocast.casts = TrunkCasts([autocast.network, *([autocast.teacher] if autocast.teacher else [])], None)
    assert all(layer.cast_weight is None for layer in _trunk(autocast))
    for k in range(3):
        for step in (ours, autocast):
            step(k, batches(config, k, 8))
    theirs = _state(autocast)
    for name, found in _state(ours).items():
        assert found.equal(theirs[name]), name
    assert not ours.optimizer.skipped


class _Casts(TorchDispatchMode):
    """Counts casts of tensors with these shapes, by the dtype that they are cast to."""

    def __init__(self, shapes: set[torch.Size]) -> None:
        super().__init__()
        self.shapes = shapes
        self.to: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].shape in self.shapes:
            self.to[kwargs["dtype"]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("bf16_convolutions")
def test_no_weight_is_cast_where_it_is_used(all_kinds: Config, batches: Callable) -> None:
    step = TrainStep(all_kinds, CPU)
    layers = _trunk(step)
    step.gradient(batches(all_kinds, 0))
    with _Casts({layer.weight.shape for layer in layers}) as watch:
        step.backward(batches(all_kinds, 0)[0])
    assert watch.to == {torch.float32: len(layers)}, "only each weight's gradient, once"


def _weights_cast_in_graphs(casts: bool) -> int:
    """Casts of weights in what a block is compiled from, forward and backward."""
    block = ResidualBlock(8, 12, embedding_channels=4, eps=1e-5, adaptive_norm=True, dropout=0.0)
    TrunkCasts([block], torch.bfloat16 if casts else None).refresh()
    shapes = {layer.weight.shape for layer in block.modules() if isinstance(layer, TrunkConv2d)}
    found = 0

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal found
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            if "_to_copy" in str(node.target) and value.dtype == torch.bfloat16 and value.shape in shapes:
                found += 1
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(block, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    x = torch.randn(2, 8, 4, 4).bfloat16().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        y = compiled(x, torch.randn(2, 4))
    y.sum().backward()
    torch._dynamo.reset()
    return found


@pytest.mark.usefixtures("bf16_convolutions")
def test_compiled_code_casts_no_weight() -> None:
    assert _weights_cast_in_graphs(casts=False) >= 3, "by itself autocast does"
    assert _weights_cast_in_graphs(casts=True) == 0


def test_weights_that_were_loaded_are_cast_before_they_are_used(all_kinds: Config, batches: Callable) -> None:
    step, other = TrainStep(all_kinds, CPU), TrainStep(all_kinds, CPU)
    for k in range(2):
        step(k, batches(all_kinds, k))
    assert not step.network.output.conv.weight.equal(other.network.output.conv.weight)
    other.network.load_state_dict(step.network.state_dict())
    given = batches(all_kinds, 2)
    for each in (step, other):
        each.begin(2)
    assert step.gradient(given).equal(other.gradient(given))


def test_a_copy_of_the_network_computes_with_its_own_weights(all_kinds: Config, batches: Callable) -> None:
    step = TrainStep(all_kinds, CPU)
    step(0, batches(all_kinds, 0))
    copied = copy.deepcopy(step.network)
    assert _trunk(step)[0].cast_weight is not None
    assert all(getattr(layer, "cast_weight", None) is None for layer in copied.modules())
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    fresh = build_network(all_kinds.network)
    fresh.load_state_dict(copied.state_dict())
    x, noise, labels = torch.randn(2, 1, 8, 8), torch.randn(2), torch.arange(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert copied(x, noise, labels).equal(fresh.to(memory_format=torch.channels_last)(x, noise, labels))


def test_casts_are_of_the_trunks_dtype_and_unusable_before_they_are_made(all_kinds: Config) -> None:
    step = TrainStep(all_kinds, CPU)
    layer = _trunk(step)[0]
    x = torch.ones(1, layer.in_channels, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16()).isnan().all()
        assert not layer(x).isnan().any(), "other activations take the weights themselves"
    step.casts.refresh()
    assert layer.cast_weight is not None
    assert layer.cast_weight.equal(layer.weight.bfloat16())
    assert layer.cast_weight.stride() == layer.weight.stride()
    assert not [name for name in step.network.state_dict() if "cast" in name]
    step.set_trunk(torch.float16)
    assert layer.cast_weight.dtype == torch.float16
    step.set_trunk(None)
    assert all(each.cast_weight is each.cast_bias is None for each in _trunk(step))
