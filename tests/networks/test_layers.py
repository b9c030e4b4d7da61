"""Each part against straightforward code that shares nothing with it, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.signal import upfirdn
from torch import Tensor

from ict_fast.errors import InputError
from ict_fast.networks.layers import (
    AverageDownsample,
    FirDownsample,
    FirUpsample,
    FourierFeatures,
    NearestUpsample,
    PositionalFeatures,
    ResidualBlock,
    SelfAttention,
    group_count,
)
from ict_fast.networks.unet import Pyramid

TAPS = np.array([1.0, 3.0, 3.0, 1.0]) / 8


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(7)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * 0.3 + 0.1
            )
    return module


def fir_down(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """Along both axes: sum_k taps[k] x[2i + k - 1], zero outside."""
    for axis in (-2, -1):
        size = plane.shape[axis] // 2
        full = upfirdn(TAPS, plane, up=1, down=1, axis=axis)  # full[n] = sum_k taps[k] x[n - k]
        plane = np.take(full, 2 * np.arange(size) + 2, axis=axis)
    return plane


def fir_up(plane: NDArray[np.float64]) -> NDArray[np.float64]:
    """Along both axes: zeros between the samples, then the taps with gain 2."""
    for axis in (-2, -1):
        size = plane.shape[axis]
        full = upfirdn(2 * TAPS, plane, up=2, down=1, axis=axis)
        full = np.concatenate([full, np.zeros_like(full)], axis=axis)
        plane = np.take(full, np.arange(2 * size) + 1, axis=axis)
    return plane


def test_fir_resampling_is_upfirdn_with_1331() -> None:
    x = random(2, 5, 8, 6)
    down, up = FirDownsample(), FirUpsample()
    np.testing.assert_allclose(down(x).numpy(), fir_down(x.numpy()), atol=1e-12)
    np.testing.assert_allclose(up(x).numpy(), fir_up(x.numpy()), atol=1e-12)


def test_fir_resampling_keeps_constants_away_from_the_border() -> None:
    x = torch.ones(1, 2, 8, 8)
    torch.testing.assert_close(FirDownsample()(x)[:, :, 1:-1, 1:-1], torch.ones(1, 2, 2, 2))
    torch.testing.assert_close(FirUpsample()(x)[:, :, 1:-1, 1:-1], torch.ones(1, 2, 14, 14))


def test_box_resampling_is_mean_and_repetition() -> None:
    x = random(2, 3, 4, 6)
    torch.testing.assert_close(AverageDownsample()(x), x.reshape(2, 3, 2, 2, 3, 2).mean((3, 5)))
    torch.testing.assert_close(NearestUpsample()(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_nearest_upsampling_is_torchs_bit_for_bit_and_channels_last(layout: torch.memory_format) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = random(2, 12, 5, 7).to(dtype).contiguous(memory_format=layout)
        doubled = NearestUpsample()(x)
        assert torch.equal(doubled, F.interpolate(x, scale_factor=2.0, mode="nearest"))
        assert doubled.is_contiguous(memory_format=torch.channels_last)


def test_the_gradient_of_nearest_upsampling_is_torchs_and_channels_last() -> None:
    x = random(2, 12, 5, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = random(2, 12, 10, 14, seed=1)
    (expected,) = torch.autograd.grad(F.interpolate(x, scale_factor=2.0, mode="nearest"), x, weights)
    (found,) = torch.autograd.grad(NearestUpsample()(x), x, weights)
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=0)
    (laid_out,) = torch.autograd.grad(NearestUpsample()(x), x, weights.to(memory_format=torch.channels_last))
    assert laid_out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("reads_image", [True, False])
def test_pyramid_filters_the_convolution_of_the_zero_extended_image(reads_image: bool) -> None:
    pyramid = randomised(Pyramid(3, 4, reads_image=reads_image))
    image, x = random(2, 3, 8, 8), random(2, 4, 4, 4, seed=1)
    # The convolution on a plane extended by 4 zeros on each side; its own padding never reaches what is read.
    extended = F.conv2d(F.pad(image, (4, 4, 4, 4)), pyramid.conv.weight, pyramid.conv.bias, padding=1)
    filtered = torch.from_numpy(fir_down(extended.detach().numpy()))[:, :, 2:6, 2:6]
    torch.testing.assert_close(pyramid(x, image), (x + filtered) / math.sqrt(2), atol=1e-12, rtol=0)


def test_fourier_features_are_sinusoids_of_two_pi_f_noise() -> None:
    noise = random(4)
    for sine_first in (True, False):
        features = FourierFeatures(6, scale=16.0, sine_first=sine_first).double()
        angles = 2 * math.pi * noise[:, None] * features.frequencies[None]
        halves = [angles.sin(), angles.cos()] if sine_first else [angles.cos(), angles.sin()]
        torch.testing.assert_close(features(noise), torch.cat(halves, 1), atol=1e-12, rtol=0)


def test_fourier_frequencies_are_saved_and_have_the_given_spread() -> None:
    features = FourierFeatures(20000, scale=0.02, sine_first=True)
    assert "frequencies" in features.state_dict()
    assert abs(features.frequencies.std().item() / 0.02 - 1) < 0.03


@pytest.mark.parametrize("endpoint", [True, False])
def test_positional_features_are_geometric_sinusoids(endpoint: bool) -> None:
    features = PositionalFeatures(8, sine_first=False, endpoint=endpoint)
    noise = torch.tensor([0.0, 1.0, -1.3, 700.0])
    expected = [
        [math.cos(n * 10000 ** (-i / (4 - endpoint))) for i in range(4)]
        + [math.sin(n * 10000 ** (-i / (4 - endpoint))) for i in range(4)]
        for n in noise.tolist()
    ]
    torch.testing.assert_close(features(noise), torch.tensor(expected), atol=1e-4, rtol=0)
    assert not features.state_dict()


@pytest.mark.parametrize("head_channels", [0, 4])
def test_attention_is_softmax_per_head(head_channels: int) -> None:
    """The published rows (head, channel, query key value) reordered, then the explicit formula on them."""
    channels, heads = 8, 8 // (head_channels or 8)
    attention = randomised(SelfAttention(channels, head_channels, eps=1e-6))
    published_weight, published_bias = random(3 * channels, channels, seed=2), random(3 * channels, seed=3)
    order = torch.arange(3 * channels).reshape(heads, channels // heads, 3).permute(2, 0, 1).flatten()
    with torch.no_grad():
        attention.qkv.weight.copy_(published_weight[order][:, :, None, None])
        attention.qkv.bias.copy_(published_bias[order])

    x = random(2, channels, 3, 4, seed=4)
    normed = F.group_norm(x, 2, attention.norm.weight, attention.norm.bias, 1e-6).flatten(2)
    qkv = torch.einsum("oc,ncp->nop", published_weight, normed) + published_bias[:, None]
    query, key, value = qkv.reshape(2 * heads, channels // heads, 3, 12).unbind(2)
    weights = torch.einsum("ncq,nck->nqk", query, key).div(math.sqrt(channels / heads)).softmax(2)
    mixed = torch.einsum("nqk,nck->ncq", weights, value).reshape(2, channels, 3, 4)
    expected = F.conv2d(mixed, attention.projection.weight, attention.projection.bias)
    torch.testing.assert_close(attention(x), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("direction", ["up", "down", "same"])
@pytest.mark.parametrize("filtered", [True, False], ids=["fir", "box"])
def test_residual_block_is_the_published_formula(adaptive: bool, direction: str, filtered: bool) -> None:
    in_channels, out_channels = 12, 12 if direction != "same" else 8
    kinds = {"up": (NearestUpsample, FirUpsample), "down": (AverageDownsample, FirDownsample)}
    resample = None
    if direction != "same":
        kind = kinds[direction][filtered]
        resample = kind()
    block = randomised(
        ResidualBlock(
            in_channels,
            out_channels,
            embedding_channels=10,
            eps=1e-6,
            adaptive_norm=adaptive,
            dropout=0.5,
            resample=resample,
            project_skip=filtered,
            skip_scale=0.7,
        )
    )
    weights = dict(block.named_parameters())
    x, embedding = random(2, in_channels, 4, 4, seed=5), random(2, 10, seed=6)

    def resampled(plane: Tensor) -> Tensor:
        if direction == "same":
            return plane
        if filtered:
            return torch.from_numpy({"up": fir_up, "down": fir_down}[direction](plane.detach().numpy()))
        if direction == "up":
            return plane.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return plane.reshape(2, in_channels, 2, 2, 2, 2).mean((3, 5))

    hidden = F.silu(F.group_norm(x, 3, weights["norm0.weight"], weights["norm0.bias"], 1e-6))
    hidden = F.conv2d(resampled(hidden), weights["conv0.weight"], weights["conv0.bias"], padding=1)
    condition = F.linear(embedding, weights["embedding.weight"], weights["embedding.bias"])[:, :, None, None]
    norm1 = (out_channels // 4, weights["norm1.weight"], weights["norm1.bias"], 1e-6)
    if adaptive:
        scale, shift = condition[:, :out_channels], condition[:, out_channels:]
        hidden = F.group_norm(hidden, *norm1) * (1 + scale) + shift
    else:
        hidden = F.group_norm(hidden + condition, *norm1)
    hidden = F.conv2d(F.silu(hidden), weights["conv1.weight"], weights["conv1.bias"], padding=1)
    skip = resampled(x)
    if filtered or in_channels != out_channels:
        if direction == "same" or filtered:
            skip = F.conv2d(skip, weights["skip.weight"], weights["skip.bias"])
    else:
        assert block.skip is None
    torch.testing.assert_close(block(x, embedding), (skip + hidden) * 0.7, atol=1e-9, rtol=0)


@pytest.mark.parametrize("attention", [True, False])
def test_a_block_concatenates_what_the_skip_connection_brings(attention: bool) -> None:
    settings = {"embedding_channels": 10, "eps": 1e-6, "adaptive_norm": False, "dropout": 0.3}
    block = randomised(ResidualBlock(20, 8, attention=attention, **settings))
    x, skip, embedding = random(2, 12, 4, 4), random(2, 8, 4, 4, seed=1), random(2, 10, seed=2)
    inputs = [each.requires_grad_() for each in (x, skip, embedding, *block.parameters())]
    outside = block(torch.cat([x, skip], dim=1), embedding, 5, 3)
    inside = block(x, embedding, 5, 3, skip_nchw=skip)
    assert torch.equal(inside, outside)
    weights = random(*inside.shape, seed=3)
    expected = torch.autograd.grad(outside, inputs, weights)
    found = torch.autograd.grad(inside, inputs, weights)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    # Forward-mode derivatives go through it too, as the difference quotient says.
    tangents = random(*x.shape, seed=4), random(*skip.shape, seed=5)

    def run(x: Tensor, skip: Tensor) -> Tensor:
        return block(x, embedding, skip_nchw=skip)

    _, along = torch.func.jvp(run, (x, skip), tangents)
    ahead, behind = (run(x + h * tangents[0], skip + h * tangents[1]) for h in (1e-5, -1e-5))
    torch.testing.assert_close(along, (ahead - behind) / 2e-5, atol=1e-7, rtol=1e-6)


def test_groups_are_32_or_have_four_channels() -> None:
    assert [group_count(channels) for channels in (4, 24, 120, 128, 576, 1536)] == [1, 6, 30, 32, 32, 32]
    for channels in (3, 9, 144):
        with pytest.raises(InputError, match=f"a layer of {channels} channels"):
            group_count(channels)
