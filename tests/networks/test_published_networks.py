"""The whole networks against the published architectures, written down once more as plain functions.

The reference reads the state dict only. EDM's names are SongUNet (fourier, residual, standard), DhariwalUNet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ict_fast.config import NetworkConfig

Weights = dict[str, Tensor]


def conv(weights: Weights, name: str, x: Tensor) -> Tensor:
    kernel = weights[f"{name}.weight"]
    return F.conv2d(x, kernel, weights[f"{name}.bias"], padding=kernel.shape[-1] // 2)


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    groups = min(32, x.shape[1] // 4)
    return F.group_norm(x, groups, weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def fir(x: Tensor, direction: str) -> Tensor:
    """[1, 3, 3, 1] by explicit taps."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
    count, channels, height, width = x.shape
    if direction == "up":
        spread = torch.zeros(count, channels, 2 * height, 2 * width, dtype=x.dtype)
        spread[:, :, ::2, ::2] = 4 * x
        # Output m is sum_i x[i] taps[m + 1 - 2i]: position p of `spread` contributes to m = p - 1 ... p + 2.
        padded = F.pad(spread, (2, 1, 2, 1))
        height, width, stride = 2 * height, 2 * width, 1
    else:
        padded = F.pad(x, (1, 1, 1, 1))
        height, width, stride = height // 2, width // 2, 2
    total = torch.zeros(count, channels, height, width, dtype=x.dtype)
    for i in range(4):
        for j in range(4):
            rows = slice(i, i + stride * (height - 1) + 1, stride)
            columns = slice(j, j + stride * (width - 1) + 1, stride)
            total += taps[i] * taps[j] * padded[:, :, rows, columns]
    return total


def box(x: Tensor, direction: str) -> Tensor:
    if direction == "up":
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


class Reference:
    """The networks as functions of their state dict."""

    def __init__(self, config: NetworkConfig, weights: Weights) -> None:
        self.config, self.weights = config, weights
        self.is_ncsnpp = config.name != "adm"  # or its sister DDPM++
        self.is_filtered = config.name == "ncsnpp"
        self.eps = 1e-6 if self.is_ncsnpp else 1e-5
        self.scale = math.sqrt(0.5) if self.is_ncsnpp else 1.0

    def block(self, name: str, x: Tensor, embedding: Tensor, direction: str, attends: bool) -> Tensor:
        resample = fir if self.is_filtered else box
        hidden = F.silu(norm(self.weights, f"{name}.norm0", x, self.eps))
        if direction:
            hidden, x = resample(hidden, direction), resample(x, direction)
        hidden = conv(self.weights, f"{name}.conv0", hidden)
        condition = linear(self.weights, f"{name}.embedding", embedding)[:, :, None, None]
        if self.config.adaptive_norm:
            scale, shift = condition.chunk(2, dim=1)
            hidden = norm(self.weights, f"{name}.norm1", hidden, self.eps) * (1 + scale) + shift
        else:
            hidden = norm(self.weights, f"{name}.norm1", hidden + condition, self.eps)
        hidden = conv(self.weights, f"{name}.conv1", F.silu(hidden))
        if x.shape[1] != hidden.shape[1] or (self.is_ncsnpp and direction):
            x = conv(self.weights, f"{name}.skip", x)
        x = (x + hidden) * self.scale
        assert attends == (f"{name}.attention.qkv.weight" in self.weights), name
        return (x + self.attention(f"{name}.attention", x)) * self.scale if attends else x

    def attention(self, name: str, x: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        size = self.config.head_channels or channels
        qkv = conv(self.weights, f"{name}.qkv", norm(self.weights, f"{name}.norm", x, self.eps))
        qkv = qkv.reshape(count, 3, channels // size, size, height * width)
        query, key, value = qkv.unbind(1)
        weights = torch.einsum("nhcq,nhck->nhqk", query, key) / math.sqrt(size)
        mixed = torch.einsum("nhqk,nhck->nhcq", weights.softmax(3), value)
        return conv(self.weights, f"{name}.projection", mixed.reshape(x.shape))

    def embedding(self, noise: Tensor, labels: Tensor | None) -> Tensor:
        config, classes = self.config, self.config.num_classes
        if config.embedding == "fourier":
            angles = torch.outer(noise, self.weights["embedding.features.frequencies"]) * 2 * math.pi
        else:
            half = config.channels // 2
            exponents = torch.arange(half, dtype=torch.float64) / (half - self.is_ncsnpp)
            angles = torch.outer(noise, 10000.0**-exponents)
        halves = [angles.sin(), angles.cos()] if self.is_ncsnpp else [angles.cos(), angles.sin()]
        hidden = torch.cat(halves, dim=1)
        if self.is_ncsnpp:
            if labels is not None:
                one_hot = torch.eye(classes, dtype=noise.dtype)[labels] * math.sqrt(classes)
                hidden = hidden + linear(self.weights, "embedding.label", one_hot)
            hidden = F.silu(linear(self.weights, "embedding.linear0", hidden))
            return F.silu(linear(self.weights, "embedding.linear1", hidden))
        hidden = F.silu(linear(self.weights, "embedding.linear0", hidden))
        hidden = linear(self.weights, "embedding.linear1", hidden)
        if labels is not None:
            hidden = hidden + self.weights["embedding.label.weight"][labels]
        return F.silu(hidden)

    def __call__(self, x: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        config = self.config
        embedding = self.embedding(noise, labels)
        levels = range(len(config.channel_mult))
        attends = [config.resolution // 2**level in config.attention_resolutions for level in levels]
        pyramid = x
        x = conv(self.weights, "input", x)
        skips = [x]
        for level in levels:
            name = f"encoder.{level}"
            if level > 0:
                x = self.block(f"{name}.down", x, embedding, "down", False)
                if self.is_filtered:
                    # Convolved on the zero-extended plane, then filtered; the border does not reach the crop.
                    wide = conv(self.weights, f"{name}.pyramid.conv", F.pad(pyramid, (4, 4, 4, 4)))
                    x = pyramid = (x + fir(wide, "down")[:, :, 2:-2, 2:-2]) / math.sqrt(2)
                skips.append(x)
            for index in range(config.num_blocks):
                x = self.block(f"{name}.blocks.{index}", x, embedding, "", attends[level])
                skips.append(x)
        x = self.block("middle.0", x, embedding, "", True)
        x = self.block("middle.1", x, embedding, "", False)
        for level in reversed(levels):
            name = f"decoder.{level}"
            if level < levels[-1]:
                x = self.block(f"{name}.up", x, embedding, "up", False)
            for index in range(config.num_blocks + 1):
                x = torch.cat([x, skips.pop()], dim=1)
                here = attends[level] and (index == config.num_blocks or not self.is_ncsnpp)
                x = self.block(f"{name}.blocks.{index}", x, embedding, "", here)
        assert not skips
        return conv(self.weights, "output.conv", F.silu(norm(self.weights, "output.norm", x, self.eps)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adaptive_norm": True, "num_classes": 3, "head_channels": 8, "num_blocks": 2},
        {"adaptive_norm": False, "num_classes": 0, "embedding": "positional", "attention_resolutions": ()},
        {"embedding": "fourier", "channel_mult": (2, 1), "image_channels": 1},
    ],
    ids=["as-small", "adaptive", "additive-positional", "fourier-two-levels"],
)
def test_network_equals_the_published_architecture(
    small_config: NetworkConfig, changes: dict, make_network: Callable, make_inputs: Callable
) -> None:
    if changes.get("channel_mult") and small_config.attention_resolutions == (4, 2):
        changes = {**changes, "attention_resolutions": (4,)}
    config = replace(small_config, **changes)
    network = make_network(config).double()
    images, noise, labels = make_inputs(config, 2)
    images, noise = images.double(), noise.double()
    output = network(images, noise, labels)
    weights = {name: tensor.double() for name, tensor in network.state_dict().items()}
    expected = Reference(config, weights)(images, noise, labels)
    assert expected.std() > 0.1
    # 1e-6: the positional frequencies are rounded to fp32 in the network.
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-6)


def test_ddpmpp_equals_the_published_architecture(
    small_configs: dict[str, NetworkConfig], make_network: Callable, make_inputs: Callable
) -> None:
    """NCSN++ with averaged and repeated pixels in place of the filter, and without the pyramid."""
    config = replace(small_configs["ncsnpp"], name="ddpmpp", embedding="positional", num_classes=4)
    network = make_network(config).double()
    images, noise, labels = make_inputs(config, 2)
    output = network(images.double(), noise.double(), labels)
    weights = {name: tensor.double() for name, tensor in network.state_dict().items()}
    assert not any("pyramid" in name for name in weights)
    expected = Reference(config, weights)(images.double(), noise.double(), labels)
    assert expected.std() > 0.1
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-6)
