"""What the compiled step relies on: no graph break, and nothing that changes from step to step recompiles."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import get_code
from torch.overrides import TorchFunctionMode

from ict_fast.config import NetworkConfig
from ict_fast.networks import layers
from ict_fast.networks.convolution import interleaved
from ict_fast.networks.layers import NearestUpsample, ResidualBlock


@pytest.fixture
def fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing compiled before, and nothing kept."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_network_is_one_graph_with_and_across_seeds(
    small_config: NetworkConfig, make_network: Callable, make_inputs: Callable
) -> None:
    """Traced, not compiled to machine code: that is the trainer's test."""
    config = replace(small_config, dropout=0.3, channel_mult=(1, 2), attention_resolutions=(4,))
    network, inputs = make_network(config), make_inputs(config)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(network, backend=counter, fullgraph=True, dynamic=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for step in range(3):
            seed = torch.tensor([5, step])
            torch.testing.assert_close(
                compiled(*inputs, dropout_seed=seed), network(*inputs, dropout_seed=seed), atol=1e-6, rtol=0
            )
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_the_gradient_of_compiled_nearest_upsampling_is_not_scattered() -> None:
    """With atomic additions, whose sums depend on their order, on a GPU and on a CPU's several threads.

    Of the backward graph that Inductor is given; its machine code would take half a minute.
    """

    def operations_of(upsample: Callable[[Tensor], Tensor]) -> str:
        found: list[str] = []

        def note(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
            found.extend(str(node.target) for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        backend = aot_autograd(
            fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
            bw_compiler=note,
            decompositions=select_decomp_table(),
        )
        x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
        compiled = torch.compile(
            lambda x: upsample(x).sin().sum(), backend=backend, fullgraph=True, dynamic=False
        )
        (gradient,) = torch.autograd.grad(compiled(x), x)
        torch.testing.assert_close(gradient, 4 * x.detach().cos(), atol=1e-6, rtol=1e-6)
        return " ".join(found)

    assert "index_put" in operations_of(lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert "index_put" not in operations_of(NearestUpsample())


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_convolving_before_upsampling_gathers_in_one_pass_each_way() -> None:
    """The code alone is made: to compile it takes long."""

    def gradient(phases: Tensor, grad: Tensor) -> Tensor:
        _, pulled = torch.func.vjp(interleaved, phases)
        by_phases: Tensor = pulled(grad)[0]
        return by_phases

    phases, grad = torch.randn(2, 24, 4, 6), torch.randn(2, 6, 6, 10)
    phases, grad = (each.to(memory_format=torch.channels_last) for each in (phases, grad))
    for compute, inputs in ((interleaved, [phases]), (gradient, [phases, grad])):
        with torch._inductor.config.patch(fx_graph_cache=False):
            code = "".join(get_code(torch.compile(compute, fullgraph=True, dynamic=False), *inputs))
        assert re.findall(r"(?<!const )float\* (?:in_)?out_ptr\d", code) == ["float* out_ptr0"]
        assert not re.search("index_put|scatter|atomic_add", code)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_block_gives_each_of_what_it_concatenates_a_gradient_of_its_own() -> None:
    """Not slices of one, which the blocks that they belong to would copy."""
    torch.manual_seed(0)
    block = ResidualBlock(20, 8, embedding_channels=4, eps=1e-5, adaptive_norm=False, dropout=0.0)
    x, skip = (torch.randn(2, width, 4, 4).to(memory_format=torch.channels_last) for width in (12, 8))
    inputs = [each.requires_grad_() for each in (x, skip, torch.randn(2, 4), *block.parameters())]
    embedding = inputs[2]
    weights = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    outside = block(torch.cat([x, skip], dim=1), embedding)
    expected = torch.autograd.grad(outside, inputs, weights)
    # The layouts are those of the graphs, whose machine code would take a minute.
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
    found = torch.autograd.grad(compiled(x, embedding, skip_nchw=skip), inputs, weights)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    for ours, slices in zip(found[:2], expected[:2], strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert not slices.is_contiguous(memory_format=torch.channels_last)


def test_attention_that_leaves_tiles_unfilled_is_not_cudnns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU is told, eager and compiled; afterwards cuDNN may be chosen again."""
    for pixels, found in ((64, True), (192, True), (256, False), (1, True)):
        query = SimpleNamespace(is_cuda=True, shape=(2, 3, pixels, 64))
        assert layers._leaves_tiles_unfilled(query) == found
    assert not layers._leaves_tiles_unfilled(torch.empty(2, 3, 64, 64))
    monkeypatch.setattr(layers, "_leaves_tiles_unfilled", lambda query: True)
    original, allowed = F.scaled_dot_product_attention, []

    def noting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        def run(*arguments: Tensor) -> object:
            with Noting():
                return graph.forward(*arguments)

        return run

    class Noting(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
        ) -> Any:
            if function is original:
                allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
            return function(*arguments, **(options or {}))

    inputs = torch.randn(3, 2, 3, 5, 8).unbind()
    torch._dynamo.reset()
    compiled = torch.compile(layers.attend, backend=noting, fullgraph=True, dynamic=False)
    with Noting():
        expected = layers.attend(*inputs)
    assert compiled(*inputs).equal(expected)
    assert allowed == [False, False]
    assert torch.backends.cuda.cudnn_sdp_enabled()
    torch._dynamo.reset()
