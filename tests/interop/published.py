"""The published networks once more, as functions of their own state dicts, and their names and shapes.

Written from the publications' descriptions and released layouts: SongUNet (NCSN++, DDPM++) and DhariwalUNet
of EDM, UNetModel of OpenAI. Nothing here knows ict-fast's networks. Each returns the output, and what every
block put out, by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """What a published network is built from."""

    kind: str
    """ncsnpp, ddpmpp, adm"""
    size: int = 8
    colours: int = 3
    classes: int = 5
    channels: int = 8
    mults: tuple[int, ...] = (1, 2)
    blocks: int = 1
    attention: tuple[int, ...] = (4,)
    head: int = 0
    adaptive: bool = False
    augmentation: int = 0


def seeded(layout: list[tuple[str, tuple[int, ...]]], seed: int = 0) -> Weights:
    """Values for names and shapes: no weight at zero, activations of about unit size."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in layout:
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            values = 0.2 * values + float("norm" in name and name.endswith("weight"))
        else:
            values /= math.prod(shape[1:]) ** 0.5
        weights[name] = values
    return weights


# ---- layouts: names and shapes ----


def _conv(name: str, out: int, into: int, size: int = 3) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"{name}.weight", (out, into, size, size)), (f"{name}.bias", (out,))]


def _linear(name: str, out: int, into: int) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"{name}.weight", (out, into)), (f"{name}.bias", (out,))]


def _norm(name: str, channels: int) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"{name}.weight", (channels,)), (f"{name}.bias", (channels,))]


def edm_layout(s: Shape) -> list[tuple[str, tuple[int, ...]]]:
    """EDM's names (networks.py: map_*, enc.<res>x<res>_*, dec.<res>x<res>_*) and shapes, filters included."""
    adm, width = s.kind == "adm", 4 * s.channels
    taps = 4 if s.kind == "ncsnpp" else 2
    noise = 2 * s.channels if s.kind == "ncsnpp" else s.channels
    names: list[tuple[str, tuple[int, ...]]] = []
    if s.kind == "ncsnpp":
        names += [("map_noise.freqs", (noise // 2,))]
    if s.classes and adm:
        names += [("map_label.weight", (width, s.classes))]
    elif s.classes:
        names += _linear("map_label", noise, s.classes)
    if s.augmentation:
        names += [("map_augment.weight", (noise, s.augmentation))]
    names += _linear("map_layer0", width, noise) + _linear("map_layer1", width, width)

    def block(name: str, into: int, out: int, attends: bool = False, resampled: bool = False) -> None:
        names.extend(_norm(f"{name}.norm0", into) + _conv(f"{name}.conv0", out, into))
        names.extend(_linear(f"{name}.affine", out * (2 if s.adaptive else 1), width))
        names.extend(_norm(f"{name}.norm1", out) + _conv(f"{name}.conv1", out, out))
        if into != out or (resampled and not adm):
            names.extend(_conv(f"{name}.skip", out, into, 1))
        if resampled:
            names.append((f"{name}.conv0.resample_filter", (1, 1, taps, taps)))
            names.append((f"{name}.skip.resample_filter", (1, 1, taps, taps)))
        if attends:
            names.extend(_norm(f"{name}.norm2", out) + _conv(f"{name}.qkv", 3 * out, out, 1))
            names.extend(_conv(f"{name}.proj", out, out, 1))

    at = s.channels * (s.mults[0] if adm else 1)
    names += _conv(f"enc.{s.size}x{s.size}_conv", at, s.colours)
    skips, aux = [at], s.colours
    for level, mult in enumerate(s.mults):
        res = s.size >> level
        if level:
            block(f"enc.{res}x{res}_down", at, at, resampled=True)
            skips.append(at)
            if s.kind == "ncsnpp":
                names += _conv(f"enc.{res}x{res}_aux_residual", at, aux)
                names.append((f"enc.{res}x{res}_aux_residual.resample_filter", (1, 1, 4, 4)))
                aux = at
        for index in range(s.blocks):
            block(f"enc.{res}x{res}_block{index}", at, s.channels * mult, res in s.attention)
            at = s.channels * mult
            skips.append(at)
    for level, mult in reversed(list(enumerate(s.mults))):
        res = s.size >> level
        if level == len(s.mults) - 1:
            block(f"dec.{res}x{res}_in0", at, at, True)
            block(f"dec.{res}x{res}_in1", at, at)
        else:
            block(f"dec.{res}x{res}_up", at, at, resampled=True)
        for index in range(s.blocks + 1):
            here = res in s.attention and (adm or index == s.blocks)
            block(f"dec.{res}x{res}_block{index}", at + skips.pop(), s.channels * mult, here)
            at = s.channels * mult
    last = "out" if adm else f"dec.{s.size}x{s.size}_aux"
    return names + _norm(f"{last}_norm", at) + _conv(f"{last}_conv", s.colours, at)


def edm_weights(s: Shape, seed: int = 0) -> Weights:
    """Seeded values for a network of EDM, with its resampling filters, which are constants."""
    weights = seeded(edm_layout(s), seed)
    taps = torch.tensor([1.0, 3, 3, 1] if s.kind == "ncsnpp" else [1.0, 1])
    for name in weights:
        if name.endswith("resample_filter"):
            weights[name] = (torch.outer(taps, taps) / taps.sum() ** 2)[None, None]
    return weights


def openai_layout(s: Shape, variance: bool = False, flat: bool = False) -> list[tuple[str, tuple[int, ...]]]:
    """OpenAI's names (unet.py: time_embed, input_blocks, middle_block, output_blocks, out) and shapes.

    Args:
        s: kind adm.
        variance: twice the output channels, for a learned variance.
        flat: attention by one-dimensional convolutions, as in guided-diffusion.
    """
    width, mult = 4 * s.channels, 2 if s.adaptive else 1
    names = _linear("time_embed.0", width, s.channels) + _linear("time_embed.2", width, width)
    if s.classes:
        names += [("label_emb.weight", (s.classes, width))]

    def residual(name: str, into: int, out: int) -> None:
        names.extend(_norm(f"{name}.in_layers.0", into) + _conv(f"{name}.in_layers.2", out, into))
        names.extend(_linear(f"{name}.emb_layers.1", mult * out, width))
        names.extend(_norm(f"{name}.out_layers.0", out) + _conv(f"{name}.out_layers.3", out, out))
        if into != out:
            names.extend(_conv(f"{name}.skip_connection", out, into, 1))

    def attention(name: str, channels: int) -> None:
        kernel = (1,) if flat else (1, 1)
        names.extend(_norm(f"{name}.norm", channels))
        names.append((f"{name}.qkv.weight", (3 * channels, channels, *kernel)))
        names.append((f"{name}.qkv.bias", (3 * channels,)))
        names.append((f"{name}.proj_out.weight", (channels, channels, *kernel)))
        names.append((f"{name}.proj_out.bias", (channels,)))

    at = s.channels * s.mults[0]
    names += _conv("input_blocks.0.0", at, s.colours)
    skips, number = [at], 1
    for level, multiplier in enumerate(s.mults):
        for _ in range(s.blocks):
            residual(f"input_blocks.{number}.0", at, s.channels * multiplier)
            at = s.channels * multiplier
            if s.size >> level in s.attention:
                attention(f"input_blocks.{number}.1", at)
            skips.append(at)
            number += 1
        if level < len(s.mults) - 1:
            residual(f"input_blocks.{number}.0", at, at)
            skips.append(at)
            number += 1
    residual("middle_block.0", at, at)
    attention("middle_block.1", at)
    residual("middle_block.2", at, at)
    number = 0
    for level, multiplier in reversed(list(enumerate(s.mults))):
        for index in range(s.blocks + 1):
            residual(f"output_blocks.{number}.0", at + skips.pop(), s.channels * multiplier)
            at, place = s.channels * multiplier, 1
            if s.size >> level in s.attention:
                attention(f"output_blocks.{number}.1", at)
                place = 2
            if level and index == s.blocks:
                residual(f"output_blocks.{number}.{place}", at, at)
            number += 1
    return names + _norm("out.0", at) + _conv("out.2", s.colours * (2 if variance else 1), at)


# ---- mathematics ----


def conv(w: Weights, name: str, x: Tensor) -> Tensor:
    kernel = w[f"{name}.weight"]
    kernel = kernel.reshape(*kernel.shape[:2], *([1, 1] if kernel.ndim < 4 else kernel.shape[2:]))
    return F.conv2d(x, kernel, w[f"{name}.bias"], padding=kernel.shape[-1] // 2)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))


def group_norm(w: Weights, name: str, x: Tensor, groups: int, eps: float) -> Tensor:
    """By the definition: mean and biased variance of each group of channels."""
    split = x.reshape(x.shape[0], groups, -1)
    mean, variance = split.mean(2, keepdim=True), split.var(2, unbiased=False, keepdim=True)
    x = ((split - mean) / (variance + eps).sqrt()).reshape(x.shape)
    return x * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def resample(x: Tensor, direction: str, taps: list[float]) -> Tensor:
    """Filtering with separable taps, then every second pixel; or zeros between the pixels, then filtering."""
    count, channels, height, width = x.shape
    filter1d = torch.tensor(taps, dtype=x.dtype) / sum(taps)
    pad = len(taps) // 2 - 1
    if direction == "up":
        spread = torch.zeros(count, channels, 2 * height, 2 * width, dtype=x.dtype)
        spread[:, :, ::2, ::2] = 4 * x
        left = len(taps) - 1 - pad
        padded = F.pad(spread, (left, pad, left, pad))
    else:
        padded = F.pad(x, (pad, pad, pad, pad))
    windows = padded.unfold(2, len(taps), 1).unfold(3, len(taps), 1)
    step = 1 if direction == "up" else 2
    return torch.einsum("nchwij,i,j->nchw", windows[:, :, ::step, ::step], filter1d, filter1d)


def attend(qkv: Tensor, heads: int, order: str) -> Tensor:
    """softmax(q k / sqrt d) v over all pixels; `order` names the axes of the rows of qkv, outermost first."""
    count, rows, height, width = qkv.shape
    sizes = {"qkv": 3, "head": heads, "channel": rows // 3 // heads}
    axes = order.split("-")
    split = qkv.reshape(count, *(sizes[axis] for axis in axes), height * width)
    split = split.permute(0, *(1 + axes.index(axis) for axis in ("qkv", "head", "channel")), 4)
    query, key, value = split.unbind(1)
    weights = torch.einsum("nhcq,nhck->nhqk", query, key) / math.sqrt(sizes["channel"])
    mixed = torch.einsum("nhqk,nhck->nhcq", weights.softmax(3), value)
    return mixed.reshape(count, rows // 3, height, width)


def edm(w: Weights, s: Shape, x: Tensor, noise: Tensor, labels: Tensor | None) -> tuple[Tensor, Weights]:
    """SongUNet and DhariwalUNet."""
    adm = s.kind == "adm"
    eps, scale = (1e-5, 1.0) if adm else (1e-6, math.sqrt(0.5))
    taps = [1.0, 3.0, 3.0, 1.0] if s.kind == "ncsnpp" else [1.0, 1.0]
    seen: Weights = {}

    def norm(name: str, x: Tensor) -> Tensor:
        return group_norm(w, name, x, min(32, x.shape[1] // 4), eps)

    def block(name: str, x: Tensor, embedding: Tensor, direction: str = "") -> Tensor:
        hidden = silu(norm(f"{name}.norm0", x))
        if direction:
            hidden, x = resample(hidden, direction, taps), resample(x, direction, taps)
        hidden = conv(w, f"{name}.conv0", hidden)
        condition = linear(w, f"{name}.affine", embedding)[:, :, None, None]
        if s.adaptive:
            factor, shift = condition.chunk(2, 1)
            hidden = silu(norm(f"{name}.norm1", hidden) * (1 + factor) + shift)
        else:
            hidden = silu(norm(f"{name}.norm1", hidden + condition))
        hidden = conv(w, f"{name}.conv1", hidden)
        x = conv(w, f"{name}.skip", x) if f"{name}.skip.weight" in w else x
        x = (x + hidden) * scale
        if f"{name}.qkv.weight" in w:
            heads = x.shape[1] // s.head if s.head else 1
            mixed = attend(conv(w, f"{name}.qkv", norm(f"{name}.norm2", x)), heads, "head-channel-qkv")
            x = (x + conv(w, f"{name}.proj", mixed)) * scale
        seen[name] = x
        return x

    # Embedding. SongUNet's features come as sines, then cosines; DhariwalUNet's the other way round.
    if s.kind == "ncsnpp":
        angles = torch.outer(noise, 2 * math.pi * w["map_noise.freqs"])
    else:
        half = s.channels // 2
        frequencies = (1 / 10000) ** (torch.arange(half, dtype=x.dtype) / (half - (not adm)))
        angles = torch.outer(noise, frequencies)
    one_hot = torch.zeros(len(x), 0) if labels is None else torch.eye(s.classes, dtype=x.dtype)[labels]
    if adm:
        embedding = linear(w, "map_layer0", torch.cat([angles.cos(), angles.sin()], 1))
        embedding = linear(w, "map_layer1", silu(embedding))
        if labels is not None:
            embedding = embedding + one_hot @ w["map_label.weight"].T
        embedding = silu(embedding)
    else:
        embedding = torch.cat([angles.sin(), angles.cos()], 1)
        if labels is not None:
            embedding = embedding + linear(w, "map_label", one_hot * math.sqrt(s.classes))
        embedding = silu(linear(w, "map_layer1", silu(linear(w, "map_layer0", embedding))))

    image = x
    x = conv(w, f"enc.{s.size}x{s.size}_conv", x)
    skips = [x]
    for level in range(len(s.mults)):
        res = s.size >> level
        if level:
            x = block(f"enc.{res}x{res}_down", x, embedding, "down")
            if s.kind == "ncsnpp":
                # Convolved with a border, so that the filter sees the convolution beyond the image's edge.
                name = f"enc.{res}x{res}_aux_residual"
                wide = F.conv2d(image, w[f"{name}.weight"], padding=2)
                spread = torch.tensor(taps, dtype=x.dtype) / sum(taps)
                windows = wide.unfold(2, 4, 2).unfold(3, 4, 2)
                image = torch.einsum("nchwij,i,j->nchw", windows, spread, spread)
                image = image + w[f"{name}.bias"][:, None, None]
                x = image = (x + image) / math.sqrt(2)
            skips.append(x)
        for index in range(s.blocks):
            x = block(f"enc.{res}x{res}_block{index}", x, embedding)
            skips.append(x)
    for level in reversed(range(len(s.mults))):
        res = s.size >> level
        if level == len(s.mults) - 1:
            x = block(f"dec.{res}x{res}_in0", x, embedding)
            x = block(f"dec.{res}x{res}_in1", x, embedding)
        else:
            x = block(f"dec.{res}x{res}_up", x, embedding, "up")
        for index in range(s.blocks + 1):
            x = block(f"dec.{res}x{res}_block{index}", torch.cat([x, skips.pop()], 1), embedding)
    last = "out" if adm else f"dec.{s.size}x{s.size}_aux"
    return conv(w, f"{last}_conv", silu(norm(f"{last}_norm", x))), seen


def openai(
    w: Weights, s: Shape, x: Tensor, noise: Tensor, labels: Tensor | None, order: str
) -> tuple[Tensor, Weights]:
    """UNetModel with resblock_updown; every norm has 32 groups; `order` as in `attend`."""
    seen: Weights = {}

    def norm(name: str, x: Tensor) -> Tensor:
        return group_norm(w, name, x, 32, 1e-5)

    def residual(name: str, x: Tensor, move: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        hidden = conv(w, f"{name}.in_layers.2", move(silu(norm(f"{name}.in_layers.0", x))))
        x = move(x)
        condition = linear(w, f"{name}.emb_layers.1", silu(embedding))[:, :, None, None]
        if s.adaptive:
            factor, shift = condition.chunk(2, 1)
            hidden = norm(f"{name}.out_layers.0", hidden) * (1 + factor) + shift
        else:
            hidden = norm(f"{name}.out_layers.0", hidden + condition)
        hidden = conv(w, f"{name}.out_layers.3", silu(hidden))
        x = conv(w, f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in w else x
        return x + hidden

    def module(name: str, x: Tensor) -> Tensor:
        """One entry of input_blocks, middle_block or output_blocks, whatever it is."""
        if f"{name}.qkv.weight" in w:
            qkv = conv(w, f"{name}.qkv", norm(f"{name}.norm", x))
            return x + conv(w, f"{name}.proj_out", attend(qkv, x.shape[1] // s.head, order))
        return residual(name, x)

    half = s.channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=x.dtype) / half)
    angles = torch.outer(noise, frequencies)
    embedding = silu(linear(w, "time_embed.0", torch.cat([angles.cos(), angles.sin()], 1)))
    embedding = linear(w, "time_embed.2", embedding)
    if labels is not None:
        embedding = embedding + w["label_emb.weight"][labels]

    def halved(x: Tensor) -> Tensor:
        return resample(x, "down", [1.0, 1.0])

    def doubled(x: Tensor) -> Tensor:
        return resample(x, "up", [1.0, 1.0])

    x = conv(w, "input_blocks.0.0", x)
    skips, number = [x], 1
    for level in range(len(s.mults)):
        for _ in range(s.blocks):
            x = module(f"input_blocks.{number}.0", x)
            if f"input_blocks.{number}.1.qkv.weight" in w:
                x = module(f"input_blocks.{number}.1", x)
            seen[f"input_blocks.{number}"] = x
            skips.append(x)
            number += 1
        if level < len(s.mults) - 1:
            x = seen[f"input_blocks.{number}"] = residual(f"input_blocks.{number}.0", x, halved)
            skips.append(x)
            number += 1
    x = seen["middle_block.1"] = module("middle_block.1", module("middle_block.0", x))
    x = seen["middle_block.2"] = module("middle_block.2", x)
    number = 0
    for level in reversed(range(len(s.mults))):
        for index in range(s.blocks + 1):
            name = f"output_blocks.{number}"
            x = module(f"{name}.0", torch.cat([x, skips.pop()], 1))
            attends = f"{name}.1.qkv.weight" in w
            x = seen[name] = module(f"{name}.1", x) if attends else x
            if level and index == s.blocks:
                x = residual(f"{name}.{1 + attends}", x, doubled)
                seen[f"{name} up"] = x
            number += 1
    return conv(w, "out.2", silu(norm("out.0", x))), seen
