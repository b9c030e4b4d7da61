"""Convolutions as products of matrices against torch's, and who computes which."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ict_fast.networks import convolution as convolutions
from ict_fast.networks.casts import TrunkCasts
from ict_fast.networks.convolution import (
    ImageConv2d,
    convolution,
    convolution_gradients,
    doubling_weight,
    folded_products,
    halving_weight,
    interleaved,
    pixel_product_gradients,
    pixel_products,
    window_products,
)
from ict_fast.networks.layers import FullPrecisionConv2d, NearestUpsample, ResidualBlock
from ict_fast.networks.tf32 import set_tf32
from ict_fast.networks.unet import Pyramid
from ict_kernels import fir_downsample

_SIZES = [(3, 5, 6, 7, 5), (1, 16, 3, 1, 1), (2, 4, 12, 1, 6)]  # samples, channels before and after, H, W


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("count", "before", "after", "height", "width"), _SIZES)
def test_products_of_pixels_are_the_1x1_convolution_and_its_gradients(
    layout: torch.memory_format, count: int, before: int, after: int, height: int, width: int
) -> None:
    x = _random(count, before, height, width).contiguous(memory_format=layout).requires_grad_()
    weight = _random(after, before, 1, 1, seed=1).to(memory_format=torch.channels_last).requires_grad_()
    grad = _random(count, after, height, width, seed=2).contiguous(memory_format=layout)
    for bias in (None, _random(after, seed=3).requires_grad_()):
        leaves = [x, weight] if bias is None else [x, weight, bias]
        expected, found = F.conv2d(x, weight, bias), pixel_products(x, weight, bias)
        _close(found, expected)
        assert found.is_contiguous(memory_format=torch.channels_last)
        of_expected, of_found = (torch.autograd.grad(y, leaves, grad) for y in (expected, found))
        for ours, theirs in zip(of_found, of_expected, strict=True):
            _close(ours, theirs)
        by_hand = pixel_product_gradients(grad, x.detach(), weight.detach())
        for ours, theirs in zip(by_hand, of_expected[:2], strict=True):
            _close(ours, theirs)
        for of_x, of_weight in (of_found[:2], by_hand):
            assert of_x.is_contiguous(memory_format=torch.channels_last)
            assert of_weight.stride() == weight.stride()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_in_16_bits_a_cpu_rounds_the_result_and_the_gradients_alone(
    size: int, stride: int, is_autocast: bool, dtype: torch.dtype
) -> None:
    leaves = [_random(2, 12, 6, 6), _random(8, 12, size, size, seed=1), _random(8, seed=2)]
    halves = [
        leaf.to(dtype).to(memory_format=torch.channels_last if leaf.ndim == 4 else torch.preserve_format)
        for leaf in leaves
    ]
    exact = [leaf.double().requires_grad_() for leaf in halves]
    halves = [leaf.requires_grad_() for leaf in halves]
    padding = size // 2
    expected = F.conv2d(*exact, stride=stride, padding=padding)
    grad = _random(*expected.shape, seed=3).to(dtype).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype, enabled=is_autocast):
        found = convolution(*halves, padding, stride)
    gradients = torch.autograd.grad(found, halves, grad)
    of_exact = torch.autograd.grad(expected, exact, grad.double())
    for ours, theirs in zip((found, *gradients), (expected, *of_exact), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=torch.finfo(dtype).eps / 2, atol=1e-5)
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in (found, *gradients[:2]))


@pytest.mark.parametrize(("count", "channels", "images", "height", "width"), _SIZES)
def test_the_folded_products_are_the_3x3_convolution_and_its_gradients(
    count: int, channels: int, images: int, height: int, width: int
) -> None:
    layer = ImageConv2d(channels, images).double()
    x = _random(count, channels, height, width).to(memory_format=torch.channels_last).requires_grad_()
    grad = _random(count, images, height, width, seed=1)
    expected, found = (
        F.conv2d(x, layer.weight, layer.bias, padding=1),
        folded_products(x, layer.weight, layer.bias),
    )
    _close(found, expected)
    leaves = [x, *layer.parameters()]
    of_expected, of_found = (torch.autograd.grad(y, leaves, grad) for y in (expected, found))
    for ours, theirs in zip(of_found, of_expected, strict=True):
        _close(ours, theirs)
    assert of_found[0].is_contiguous(memory_format=torch.channels_last)


def test_the_fold_has_a_forward_derivative_and_a_batching_rule() -> None:
    layer = ImageConv2d(4, 2).double()
    x, tangent = _random(3, 4, 5, 6), _random(3, 4, 5, 6, seed=1)
    linear = partial(folded_products, weight=layer.weight, bias=layer.bias)
    _, found = torch.func.jvp(linear, (x,), (tangent,))
    _close(found, F.conv2d(tangent, layer.weight, padding=1))
    each = torch.func.vmap(lambda image: linear(image[None])[0])(x)
    _close(each, F.conv2d(x, layer.weight, layer.bias, padding=1))


@pytest.mark.parametrize(
    ("size", "padding", "stride"), [(3, 1, 1), (3, 2, 1), (6, 2, 2), (3, 1, 2), (1, 0, 1)]
)
@pytest.mark.parametrize(("height", "width"), [(8, 6), (5, 7)])
def test_products_of_windows_are_the_convolution_and_its_gradients(
    size: int, padding: int, stride: int, height: int, width: int
) -> None:
    x = _random(2, 3, height, width).to(memory_format=torch.channels_last).requires_grad_()
    weight = _random(5, 3, size, size, seed=1).to(memory_format=torch.channels_last).requires_grad_()
    bias = _random(5, seed=2).requires_grad_()
    expected = F.conv2d(x, weight, bias, stride, padding)
    found = window_products(x, weight, bias, padding, stride)
    _close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    grad = _random(*expected.shape, seed=3)
    of_expected, of_found = (torch.autograd.grad(y, [x, weight, bias], grad) for y in (expected, found))
    for ours, theirs in zip(of_found, of_expected, strict=True):
        _close(ours, theirs)
    assert of_found[1].stride() == weight.stride()


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 8, 8), (16, 6, 10), (4, 2, 4)])
def test_a_convolution_and_the_halving_filter_are_one_convolution(
    channels: int, height: int, width: int
) -> None:
    x = _random(2, channels, height, width).requires_grad_()
    weight = _random(5, channels, 3, 3, seed=1).to(memory_format=torch.channels_last).requires_grad_()
    bias = _random(5, seed=2).requires_grad_()
    expected = fir_downsample(F.conv2d(x, weight, bias, padding=2), padding=0)
    both = halving_weight(weight)
    assert both.is_contiguous(memory_format=torch.channels_last)
    found = F.conv2d(x, both, bias, stride=2, padding=2)
    _close(found, expected)
    assert found.shape[2:] == (height // 2, width // 2)
    grad = _random(*expected.shape, seed=3)
    of_expected, of_found = (torch.autograd.grad(y, [x, weight, bias], grad) for y in (expected, found))
    for ours, theirs in zip(of_found, of_expected, strict=True):
        _close(ours, theirs)


def _before_upsampling(x_nchw: Tensor, weight: Tensor) -> Tensor:
    """The convolution of the upsampled image, computed on the image itself."""
    return interleaved(F.conv2d(x_nchw, doubling_weight(weight), padding=1))


def _of_the_upsampled(x_nchw: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(F.interpolate(x_nchw, scale_factor=2.0, mode="nearest"), weight, padding=1)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("count", "before", "after", "height", "width"), [*_SIZES, (2, 8, 8, 4, 2)])
def test_a_convolution_of_the_upsampled_is_four_of_the_image_and_so_are_its_gradients(
    layout: torch.memory_format, count: int, before: int, after: int, height: int, width: int
) -> None:
    x = _random(count, before, height, width).contiguous(memory_format=layout).requires_grad_()
    weight = _random(after, before, 3, 3, seed=1).to(memory_format=torch.channels_last).requires_grad_()
    grad = _random(count, after, 2 * height, 2 * width, seed=2).contiguous(memory_format=layout)
    expected, found = _of_the_upsampled(x, weight), _before_upsampling(x, weight)
    _close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert doubling_weight(weight).is_contiguous(memory_format=torch.channels_last)
    of_expected, of_found = (torch.autograd.grad(y, [x, weight], grad) for y in (expected, found))
    for ours, theirs in zip(of_found, of_expected, strict=True):
        _close(ours, theirs)
    assert of_found[0].is_contiguous(memory_format=torch.channels_last)
    assert of_found[1].stride() == weight.stride()


def test_convolving_before_upsampling_has_a_forward_derivative_and_a_batching_rule() -> None:
    x, tangent, weight = _random(3, 4, 5, 6), _random(3, 4, 5, 6, seed=1), _random(2, 4, 3, 3, seed=2)
    tangents = tangent, _random(2, 4, 3, 3, seed=3)
    ours, theirs = (
        torch.func.jvp(each, (x, weight), tangents)[1] for each in (_before_upsampling, _of_the_upsampled)
    )
    _close(ours, theirs)
    each = torch.func.vmap(lambda image: _before_upsampling(image[None], weight)[0])(x)
    _close(each, _of_the_upsampled(x, weight))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks convolve before upsampling."""
    monkeypatch.setattr(
        ResidualBlock,
        "_convolves_before_upsampling",
        lambda self, x_nchw: isinstance(self.resample, NearestUpsample),
    )


def _doubling_block() -> ResidualBlock:
    settings: dict[str, Any] = {"embedding_channels": 4, "eps": 1e-5, "adaptive_norm": False, "dropout": 0.0}
    return ResidualBlock(12, 16, **settings, resample=NearestUpsample())


@pytest.mark.parametrize(
    ("arithmetic", "is_compiled"), [("float64", False), ("fp32", False), ("tf32", False), ("tf32", True)]
)
def test_a_block_that_convolves_before_upsampling_is_the_block(
    arithmetic: str, is_compiled: bool, request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    block = _doubling_block().to(memory_format=torch.channels_last)
    set_tf32(block, arithmetic == "tf32")
    dtype = torch.float64 if arithmetic == "float64" else torch.float32
    x = _random(2, 12, 5, 3).to(block.to(dtype).conv0.weight).to(memory_format=torch.channels_last)
    leaves = [x.requires_grad_(), embedding := _random(2, 4, seed=1).to(x).requires_grad_()]
    leaves += block.parameters()
    grad = _random(2, 16, 10, 6, seed=2).to(x)
    expected = block(x, embedding)
    request.getfixturevalue("as_on_a_gpu")
    run: Any = block
    if is_compiled:
        torch._dynamo.reset()
        run = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
    found = run(x, embedding)
    with torch.no_grad():
        assert torch.equal(run(x, embedding), found)
    of_found, of_expected = (torch.autograd.grad(y, leaves, grad) for y in (found, expected))
    torch._dynamo.reset()
    # In TF32 other weights are rounded.
    most = {"float64": 1e-12, "fp32": 2e-6, "tf32": 1e-3}[arithmetic]
    for ours, theirs in ((found, expected), *zip(of_found, of_expected, strict=True)):
        assert torch.linalg.vector_norm(ours - theirs) <= most * torch.linalg.vector_norm(theirs)
    strides = dict(zip(block.state_dict(), (each.stride() for each in of_found[2:]), strict=True))
    assert strides["conv0.weight"] == block.conv0.weight.stride()


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_composed_weight_is_rounded_once(dtype: torch.dtype) -> None:
    """Whether casts of the parameters are kept or not."""
    block, used = _doubling_block(), list[Tensor]()

    class _Weights(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.convolution.default and args[1].shape[2:] == (2, 2):
                used.append(args[1])
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 12, 2, 2).to(memory_format=torch.channels_last)
    for kept in (None, dtype):
        TrunkCasts([block], kept).refresh()
        with torch.autocast("cpu", dtype), _Weights():
            block(x.to(dtype), torch.randn(2, 4))
    once = doubling_weight(block.conv0.weight).to(dtype)
    assert len(used) == 2
    assert all(torch.equal(each.to(dtype), once) for each in used)
    assert not torch.equal(once, doubling_weight(block.conv0.weight.to(dtype)))


@pytest.mark.parametrize("tf32", [False, True])
def test_a_compiled_block_of_products_has_the_gradients_of_convolutions(
    tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    block = ResidualBlock(
        *(12, 16), embedding_channels=4, eps=1e-5, adaptive_norm=False, dropout=0.0, attention=True
    ).to(memory_format=torch.channels_last)
    set_tf32(block, tf32)
    x = torch.randn(2, 12, 4, 6).to(memory_format=torch.channels_last)
    leaves = [x.requires_grad_(), embedding := torch.randn(2, 4, requires_grad=True), *block.parameters()]
    weights = torch.randn(2, 16, 4, 6).to(memory_format=torch.channels_last)
    expected = torch.autograd.grad(block(x, embedding), leaves, weights)
    monkeypatch.setattr(convolutions, "_is_product", lambda x, weight, *_: weight.shape[2:] == (1, 1))
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=False)
    found = torch.autograd.grad(compiled(x, embedding), leaves, weights)
    torch._dynamo.reset()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


class _Seen(TorchDispatchMode):
    """The names of the operations that are dispatched, and the shapes of what convolutions give."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        result = func(*args, **(kwargs or {}))
        if "conv" in func.overloadpacket.__name__ and isinstance(result, Tensor):
            self.shapes.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_multiplies_where_a_cpu_convolves(device: str) -> None:
    """On tensors without values, for which no device is needed."""
    convolved = {"convolution", "convolution_backward"}
    layer, reading = ImageConv2d(8, 3), FullPrecisionConv2d(3, 8, 3, padding=1)
    with FakeTensorMode(), torch.device(device), torch.no_grad():
        x = torch.empty(2, 8, 4, 4)
        for size, padding in ((1, 0), (1, 1), (3, 1)):
            weight = torch.empty(6, 8, size, size)
            with _Seen() as seen:
                convolution_gradients(convolution(x, weight, None, padding), x, weight, padding)
            as_product = device == "cuda" and (size, padding) == (1, 0)
            assert seen.names & convolved == (set() if as_product else convolved), (size, padding)
        with _Seen() as seen:
            weights = {"weight": torch.empty(3, 8, 3, 3), "bias": torch.empty(3)}
            torch.func.functional_call(layer, weights, x)
        assert ("convolution" in seen.names) == (device == "cpu")
        with _Seen() as seen:
            weights = {"weight": torch.empty(8, 3, 3, 3), "bias": torch.empty(8)}
            torch.func.functional_call(reading, weights, torch.empty(2, 3, 4, 4))
        assert ("convolution" in seen.names) == (device == "cpu")


@pytest.mark.parametrize("reads_image", [False, True])
@pytest.mark.parametrize("tf32", [False, True])
def test_on_a_gpu_a_step_of_the_pyramid_has_nothing_between_convolution_and_filter(
    reads_image: bool, tf32: bool
) -> None:
    width = 3 if reads_image else 8
    pyramid = Pyramid(width, 8, reads_image=reads_image)
    set_tf32(pyramid, tf32)
    for device in ("cpu", "cuda"):
        with FakeTensorMode(), torch.device(device), torch.no_grad(), _Seen() as seen:
            weights = {
                "conv.weight": torch.empty(8, 3 if reads_image else 8, 3, 3),
                "conv.bias": torch.empty(8),
            }
            images = torch.empty(2, 3 if reads_image else 8, 12, 12)
            halved = torch.func.functional_call(pyramid, weights, (torch.empty(2, 8, 6, 6), images))
        assert halved.shape == (2, 8, 6, 6)
        assert halved.device.type == device
        assert all(14 not in shape for shape in seen.shapes) == (device == "cuda")


@pytest.mark.parametrize("tf32", [False, True])
def test_on_a_gpu_a_block_convolves_before_nearest_upsampling(tf32: bool) -> None:
    with torch.device("meta"):
        block = _doubling_block()
    set_tf32(block, tf32)
    for device in ("cpu", "cuda"):
        with FakeTensorMode(), torch.device(device), torch.no_grad(), _Seen() as seen:
            block.conv0.weight = nn.Parameter(torch.empty(16, 12, 3, 3))
            doubled = block._resampled_and_convolved(torch.empty(2, 12, 5, 5))
        assert doubled.shape == (2, 16, 10, 10)
        assert doubled.device.type == device
        assert seen.shapes == {(2, 64, 6, 6) if device == "cuda" else (2, 16, 10, 10)}
