"""TF32 is for the trunk's products alone, forward and backward, compiled or not; the ends never see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ict_fast.config import NetworkConfig
from ict_fast.networks import convolution, tf32
from ict_fast.networks.layers import ResidualBlock
from ict_fast.networks.switches import configure_torch
from ict_fast.networks.unet import Pyramid

_PRODUCTS = ("convolution", "convolution_backward", "addmm", "mm", "bmm", "linear")


def _switches() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.fixture(autouse=True)
def ieee() -> Iterator[None]:
    """As `configure_torch` leaves a process."""
    before = _switches()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    assert _switches() == (False, False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_a_configured_process_rounds_no_operand_and_no_partial_sum() -> None:
    """As torch does by itself: convolutions in TF32, and the sums of split products in 16 bits."""
    matmul, names = torch.backends.cuda.matmul, ("allow_bf16", "allow_fp16")
    switches = [(matmul, f"{name}_reduced_precision_reduction") for name in names]
    switches += [(matmul, "allow_tf32"), (torch.backends.cudnn, "allow_tf32")]
    before = [getattr(*switch) for switch in switches]
    for switch in switches:
        setattr(*switch, True)
    configure_torch(torch.device("cpu"), deterministic=False)
    after = [getattr(*switch) for switch in switches]
    for switch, value in zip(switches, before, strict=True):
        setattr(*switch, value)
    assert after == [False] * 4


@pytest.mark.parametrize("switch", ["", "cudnn", "cudnn.conv", "cuda.matmul", "mkldnn", "mkldnn.conv"])
def test_a_configured_process_is_ieee_whichever_switch_was_on(switch: str) -> None:
    """Of torch's newer ones, some hand their value on: turned off, the older ones alone would be on."""
    backends = torch.backends
    owner = attrgetter(switch)(backends) if switch else backends
    owner.fp32_precision = "tf32"
    configure_torch(torch.device("cpu"), deterministic=False)
    products = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    assert [product.fp32_precision for product in products] == ["ieee"] * 4
    assert _switches() == (False, False)
    with tf32.tf32_allowed():
        assert _switches() == (True, True)
        assert backends.cudnn.conv.fp32_precision == backends.cuda.matmul.fp32_precision == "tf32"
    assert [product.fp32_precision for product in products] == ["ieee"] * 4
    assert torch.get_float32_matmul_precision() == "highest"


# ---- the arithmetic ----


def test_rounding_is_to_the_nearest_number_of_ten_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, generator=generator) * 10 ** torch.randint(-30, 30, (4096,), generator=generator)
    step = 2.0 ** (torch.frexp(x.double()).exponent - 11)  # of numbers with one bit before and ten after
    exact = torch.sign(x.double()) * torch.floor((x.double() / step).abs() + 0.5) * step
    assert torch.equal(tf32.round_to_tf32(x).double(), exact)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1 + 2**-11, -1 - 2**-11, 1 + 2**-12])
    expected = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1 + 2**-10, -1 - 2**-10, 1.0])
    assert torch.equal(tf32.round_to_tf32(special), expected)
    assert tf32.round_to_tf32(torch.tensor(torch.nan)).isnan()


@pytest.mark.parametrize(("kernel", "padding", "bias"), [(3, 1, True), (1, 0, True), (3, 2, False)])
def test_a_convolution_is_that_of_the_rounded_operands(kernel: int, padding: int, bias: bool) -> None:
    layer = tf32.TrunkConv2d(4, 6, kernel, padding=padding, bias=bias)
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    tf32.set_tf32(layer, True)
    output = layer(x)
    assert output.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(output)
    output.backward(grad)

    rounded = [tf32.round_to_tf32(t.detach()).double().requires_grad_() for t in (x, layer.weight)]
    exact = F.conv2d(*rounded, padding=padding)
    exact.backward(tf32.round_to_tf32(grad).double())
    shift = layer.bias.detach().double()[:, None, None] if layer.bias is not None else 0
    torch.testing.assert_close(output.double(), exact + shift, atol=2e-6, rtol=1e-6)
    assert x.grad is not None
    assert layer.weight.grad is not None
    for ours, theirs in zip((x.grad, layer.weight.grad), rounded, strict=True):
        torch.testing.assert_close(ours.double(), theirs.grad, atol=1e-5, rtol=1e-5)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, grad.sum((0, 2, 3)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("as_product", [False, True])
def test_the_operations_are_registered_as_torch_wants_them(
    as_product: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convolution, "_is_product", lambda *_: as_product)
    size = 1 if as_product else 3
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(6, 4, size, size).to(memory_format=torch.channels_last).requires_grad_()
    for bias in (None, torch.randn(6, requires_grad=True)):
        for stride in (1,) if as_product else (1, 2):
            torch.library.opcheck(torch.ops.ict_fast.conv2d_tf32, (x, weight, bias, size // 2, stride))


# ---- who sees the switch ----


class OutsideProducts(TorchDispatchMode):
    """Every product of matrices or convolution that is not inside an operation of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[bool, bool], tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _PRODUCTS or "scaled_dot_product" in name:
            place = {"convolution": 1, "convolution_backward": 2, "addmm": 2}.get(name, 0)
            self.seen.append((name, _switches(), tuple(args[place].shape)))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[bool, bool], tuple[int, ...]]]:
    """What our operations compute, when they do: name, the switches, the weight's shape."""
    seen = []
    for module, name, place in ((tf32, "convolution", 1), (tf32, "convolution_gradients", 2)):
        original = getattr(module, name)

        def spy(
            *given: Any, name: str = name, place: int = place, made: Callable = original, **more: Any
        ) -> Any:
            if _switches()[0] and not isinstance(given[0], FakeTensor):
                seen.append((name, _switches(), tuple(given[place].shape)))
            return made(*given, **more)

        monkeypatch.setattr(module, name, spy)
    return seen


def test_the_trunk_alone_sees_the_switch_forward_and_backward(
    small_config: NetworkConfig, make_network: Callable, make_inputs: Callable, inside: list
) -> None:
    network = make_network(small_config)
    tf32.set_tf32(network, True)
    trunk = [m for m in network.modules() if isinstance(m, tf32.TrunkConv2d)]
    with OutsideProducts() as watch:
        network(*make_inputs(small_config)).square().sum().backward()
    assert {switches for _, switches, _ in inside} == {(True, True)}
    assert {switches for _, switches, _ in watch.seen} == {(False, False)}
    shapes = sorted(tuple(m.weight.shape) for m in trunk)
    for name in ("convolution", "convolution_gradients"):
        assert sorted(shape for n, _, shape in inside if n == name) == shapes, name

    # Outside: every linear layer, and the convolutions that read the image or make it, in both directions.
    ends = [network.input, network.output.conv]
    ends += [m.conv for m in network.modules() if isinstance(m, Pyramid) and m.reads_image]
    for name in ("convolution", "convolution_backward"):
        outside = [shape for n, _, shape in watch.seen if n == name]
        assert all(tuple(m.weight.shape) in outside for m in ends), name
        filters = [shape for shape in outside if shape[1:] == (1, 4, 4)]
        assert len(outside) == len(ends) + len(filters), name
    linear = sum(isinstance(m, nn.Linear) for m in network.modules())
    assert sum(n == "addmm" for n, _, _ in watch.seen) == linear
    assert sum(n == "mm" for n, _, _ in watch.seen) >= linear


def test_the_compiled_block_has_the_switch_turned_inside_its_operations_alone(
    inside: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph calls the block's other products between the operations: there all is IEEE."""
    torch.manual_seed(0)
    block = ResidualBlock(
        *(8, 16), embedding_channels=4, eps=1e-5, adaptive_norm=False, dropout=0.0, attention=True
    )
    x, embedding = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    tf32.set_tf32(block, True)
    expected = torch.autograd.grad(block(x, embedding).square().sum(), [x, embedding, *block.parameters()])
    inside.clear()
    around, original = [], tf32.tf32_allowed

    def watched() -> Any:
        around.append(_switches())
        return original()

    monkeypatch.setattr(tf32, "tf32_allowed", watched)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
    found = torch.autograd.grad(compiled(x, embedding).square().sum(), [x, embedding, *block.parameters()])
    torch._dynamo.reset()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert sorted(name for name, _, _ in inside) == ["convolution"] * 5 + ["convolution_gradients"] * 5
    assert around == [(False, False)] * 10


def test_an_operation_that_fails_leaves_the_switch_as_it_was() -> None:
    layer = tf32.TrunkConv2d(4, 6, 3)
    tf32.set_tf32(layer, True)
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 5, 5, 5))
    assert _switches() == (False, False)


def test_tf32_is_close_to_fp32_and_not_equal(
    small_config: NetworkConfig, make_network: Callable, make_inputs: Callable
) -> None:
    network, inputs = make_network(small_config), make_inputs(small_config)
    exact = network(*inputs).detach()
    tf32.set_tf32(network, True)
    error = float((network(*inputs).detach() - exact).norm() / exact.norm())
    assert 1e-5 < error < 3e-3
    tf32.set_tf32(network, False)
    assert torch.equal(network(*inputs), exact)
