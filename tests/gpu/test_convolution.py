"""The convolutions that a GPU computes in another form: exact, and channels_last."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ict_fast.networks.convolution import ImageConv2d
from ict_fast.networks.layers import FullPrecisionConv2d, NearestUpsample, ResidualBlock
from ict_fast.networks.tf32 import TrunkConv2d, set_tf32
from ict_fast.networks.unet import Pyramid
from ict_kernels import fir_downsample


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def _images(count: int, channels: int, height: int, width: int) -> Tensor:
    x = torch.randn(count, channels, height, width, device="cuda")
    return x.to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("arithmetic", "least", "most"),
    [("fp32", 0.0, 1e-6), ("tf32", 1e-5, 1e-3), ("bf16", 1e-4, 6e-3), ("fp16", 1e-5, 8e-4)],
)
def test_a_1x1_convolution_of_the_trunk_is_float64s_in_its_arithmetic(
    arithmetic: str, least: float, most: float
) -> None:
    layer = TrunkConv2d(384, 1152, 1).cuda().to(memory_format=torch.channels_last)
    x, grad = _images(4, 384, 9, 7).requires_grad_(), _images(4, 1152, 9, 7)
    exact = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    expected = F.conv2d(*exact)
    set_tf32(layer, arithmetic == "tf32")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(arithmetic)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        found = layer(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert least <= _error(found, expected) < most
    leaves = [x, layer.weight, layer.bias]
    of_found = torch.autograd.grad(found, leaves, grad.to(found.dtype))
    of_expected = torch.autograd.grad(expected, exact, grad.double())
    for ours, theirs in zip(of_found, of_expected, strict=True):
        assert _error(ours, theirs) < most
    assert of_found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_weight_is_summed_over_all_pixels_in_fp32(dtype: torch.dtype) -> None:
    """Not, where cuBLAS splits half a million terms, in 16 bits."""
    layer = TrunkConv2d(192, 192, 1, bias=False).cuda().to(memory_format=torch.channels_last)
    x, grad = (_images(128, 192, 64, 64).to(dtype) for _ in range(2))
    with torch.autocast("cuda", dtype=dtype):
        (found,) = torch.autograd.grad(layer(x), layer.weight, grad)
    pixels = [each.permute(0, 2, 3, 1).reshape(-1, 192).double() for each in (grad, x)]
    exact = pixels[0].t() @ pixels[1]
    # To round the result once is 0.21 eps in the mean square.
    assert _error(found.flatten(1), exact) < 0.3 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("channels", "images"), [(192, 3), (256, 3), (24, 1)])
def test_the_output_convolution_is_float64s_to_fp32(channels: int, images: int) -> None:
    layer = ImageConv2d(channels, images).cuda()
    x, grad = _images(3, channels, 33, 20).requires_grad_(), torch.randn(3, images, 33, 20, device="cuda")
    exact = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    expected, found = F.conv2d(*exact, padding=1), layer(x)
    assert _error(found, expected) < 1e-6
    of_found = torch.autograd.grad(found, [x, *layer.parameters()], grad)
    of_expected = torch.autograd.grad(expected, exact, grad.double())
    for ours, theirs in zip(of_found, of_expected, strict=True):
        assert _error(ours, theirs) < 1e-6
    assert of_found[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_input_convolution_is_float64s_to_fp32_also_under_autocast(channels: int, autocast: bool) -> None:
    layer = FullPrecisionConv2d(channels, 64, 3, padding=1).cuda().to(memory_format=torch.channels_last)
    x, grad = _images(3, channels, 33, 20).requires_grad_(), _images(3, 64, 33, 20)
    exact = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    expected = F.conv2d(*exact, padding=1)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        found = layer(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert _error(found, expected) < 1e-6
    of_found = torch.autograd.grad(found, [x, *layer.parameters()], grad)
    of_expected = torch.autograd.grad(expected, exact, grad.double())
    for ours, theirs in zip(of_found, of_expected, strict=True):
        assert _error(ours, theirs) < 1e-6
    assert of_found[1].stride() == layer.weight.stride()


@pytest.mark.parametrize("reads_image", [True, False])
@pytest.mark.parametrize(
    ("arithmetic", "least", "most"), [("fp32", 0.0, 1e-6), ("tf32", 1e-5, 1e-3), ("bf16", 1e-4, 8e-3)]
)
def test_a_step_of_the_pyramid_is_float64s_in_its_arithmetic(
    arithmetic: str, least: float, most: float, reads_image: bool
) -> None:
    """Of the image in fp32 in any case; of the activations before it the sum is rounded as they are."""
    before = 3 if reads_image else 64
    layer = Pyramid(before, 64, reads_image=reads_image).cuda().to(memory_format=torch.channels_last)
    set_tf32(layer, arithmetic == "tf32")
    x, grad = _images(2, before, 16, 16).requires_grad_(), _images(2, 64, 8, 8)
    exact = [t.detach().double().requires_grad_() for t in (x, *layer.parameters())]
    expected = fir_downsample(F.conv2d(*exact, padding=2), padding=0) * 0.5**0.5
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=arithmetic == "bf16"):
        found = layer(torch.zeros_like(grad), x)
    if reads_image:
        least, most = 0.0, 1e-6
    assert least <= _error(found, expected) < most
    of_found = torch.autograd.grad(found, [x, *layer.parameters()], grad)
    of_expected = torch.autograd.grad(expected, exact, grad.double())
    for ours, theirs in zip(of_found, of_expected, strict=True):
        assert _error(ours, theirs) < most


@pytest.mark.parametrize(("height", "width"), [(8, 5), (1, 1)])
@pytest.mark.parametrize(
    ("arithmetic", "least", "most", "is_compiled"),
    [
        ("fp32", 0.0, 2e-6, False),
        ("tf32", 1e-5, 1e-3, False),
        ("bf16", 1e-4, 6e-3, False),
        ("fp16", 1e-5, 8e-4, False),
        ("bf16", 1e-4, 6e-3, True),
    ],
)
def test_a_convolution_after_nearest_upsampling_is_float64s_in_its_arithmetic(
    arithmetic: str, least: float, most: float, is_compiled: bool, height: int, width: int
) -> None:
    """Computed before the upsampling: 4 taps for each pixel, whose weights are sums."""
    settings = {"embedding_channels": 4, "eps": 1e-5, "adaptive_norm": False, "dropout": 0.0}
    block = ResidualBlock(64, 96, **settings, resample=NearestUpsample())
    block = block.cuda().to(memory_format=torch.channels_last)
    set_tf32(block, arithmetic == "tf32")
    x, grad = _images(3, 64, height, width).requires_grad_(), _images(3, 96, 2 * height, 2 * width)
    exact = [t.detach().double().requires_grad_() for t in (x, block.conv0.weight)]
    expected = F.conv2d(NearestUpsample()(exact[0]), exact[1], padding=1)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(arithmetic)
    convolved = block._resampled_and_convolved
    if is_compiled:
        torch._dynamo.reset()
        convolved = torch.compile(convolved, fullgraph=True, dynamic=False)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        found = convolved(x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert least <= _error(found, expected) < most
    of_found = torch.autograd.grad(found, [x, block.conv0.weight], grad.to(found.dtype))
    of_expected = torch.autograd.grad(expected, exact, grad.double())
    for ours, theirs in zip(of_found, of_expected, strict=True):
        assert _error(ours, theirs) < most
    assert of_found[0].is_contiguous(memory_format=torch.channels_last)
    assert of_found[1].stride() == block.conv0.weight.stride()
