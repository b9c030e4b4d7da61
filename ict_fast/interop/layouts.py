"""What the tensors of these networks are called elsewhere: by OpenAI, by EDM and ECT, by diffusers.

A layout is a table from our names to theirs, made for one configuration. Names are not all that differs: the
rows of a joint query-key-value projection have another order in each code base, see `QKV_ORDERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ict_fast.config import NetworkConfig
from ict_fast.networks import UNet, build_network

QKV_ORDERS = {
    "qkv-head-channel": (0, 1, 2),  # ours; consistency_models, and guided-diffusion's "new attention order"
    "head-qkv-channel": (1, 0, 2),  # guided-diffusion's default, "legacy"
    "head-channel-qkv": (2, 0, 1),  # EDM and ECT
}
"""The axes of (query key value, head, channel) in each order of the rows."""


@dataclass(frozen=True)
class Block:
    """One residual block, and where it stands in the network."""

    ours: str
    """The prefix of its names, such as `encoder.1.down`."""
    role: str
    """encoder, down, middle, up or decoder."""
    level: int
    index: int
    """Its number within the level, or in the middle."""
    attention: bool


def blocks(config: NetworkConfig) -> Iterator[Block]:
    """The residual blocks in the order in which they run."""
    levels = range(len(config.channel_mult))
    attends = [config.resolution >> level in config.attention_resolutions for level in levels]
    for level in levels:
        if level:
            yield Block(f"encoder.{level}.down", "down", level, 0, False)
        for index in range(config.num_blocks):
            yield Block(f"encoder.{level}.blocks.{index}", "encoder", level, index, attends[level])
    yield Block("middle.0", "middle", levels[-1], 0, True)
    yield Block("middle.1", "middle", levels[-1], 1, False)
    for level in reversed(levels):
        if level < levels[-1]:
            yield Block(f"decoder.{level}.up", "up", level, 0, False)
        for index in range(config.num_blocks + 1):
            last_only = config.name != "adm" and index < config.num_blocks
            here = attends[level] and not last_only
            yield Block(f"decoder.{level}.blocks.{index}", "decoder", level, index, here)


def meta_network(config: NetworkConfig) -> UNet:
    """The network without values: its names and shapes cost neither time nor memory."""
    with torch.device("meta"):
        return build_network(config)


def openai_names(config: NetworkConfig) -> dict[str, str]:
    """Our tensors' names to those of guided-diffusion and consistency_models."""
    modules = {
        "embedding.linear0": "time_embed.0",
        "embedding.linear1": "time_embed.2",
        "embedding.label": "label_emb",
        "input": "input_blocks.0.0",
        "output.norm": "out.0",
        "output.conv": "out.2",
    }
    inner = {
        "norm0": "in_layers.0",
        "conv0": "in_layers.2",
        "embedding": "emb_layers.1",
        "norm1": "out_layers.0",
        "conv1": "out_layers.3",
        "skip": "skip_connection",
    }
    encoder, decoder, after_decoder = 1, 0, 0
    for block in blocks(config):
        attention = ""
        if block.role in ("encoder", "down"):
            theirs, attention = f"input_blocks.{encoder}.0", f"input_blocks.{encoder}.1"
            encoder += 1
        elif block.role == "middle":
            theirs, attention = f"middle_block.{2 * block.index}", "middle_block.1"
        elif block.role == "up":  # the last module of the block before
            theirs = f"output_blocks.{decoder - 1}.{after_decoder}"
        else:
            theirs, attention = f"output_blocks.{decoder}.0", f"output_blocks.{decoder}.1"
            decoder, after_decoder = decoder + 1, 2 if block.attention else 1
        modules |= {f"{block.ours}.{name}": f"{theirs}.{other}" for name, other in inner.items()}
        modules |= _attention(block, attention, {"norm": "norm", "qkv": "qkv", "projection": "proj_out"})
    return _tensor_names(config, modules)


def edm_names(config: NetworkConfig) -> dict[str, str]:
    """Our tensors' names to those of EDM's SongUNet (NCSN++, DDPM++) and DhariwalUNet (ADM)."""
    top = f"{config.resolution}x{config.resolution}"
    is_adm = config.name == "adm"
    modules = {
        "embedding.linear0": "map_layer0",
        "embedding.linear1": "map_layer1",
        "embedding.label": "map_label",
        "input": f"enc.{top}_conv",
        "output.norm": "out_norm" if is_adm else f"dec.{top}_aux_norm",
        "output.conv": "out_conv" if is_adm else f"dec.{top}_aux_conv",
    }
    inner = {name: name for name in ("norm0", "conv0", "norm1", "conv1", "skip")} | {"embedding": "affine"}
    for block in blocks(config):
        size = f"{config.resolution >> block.level}x{config.resolution >> block.level}"
        place = {
            "encoder": f"enc.{size}_block{block.index}",
            "down": f"enc.{size}_down",
            "middle": f"dec.{size}_in{block.index}",
            "up": f"dec.{size}_up",
            "decoder": f"dec.{size}_block{block.index}",
        }[block.role]
        modules |= {f"{block.ours}.{name}": f"{place}.{other}" for name, other in inner.items()}
        modules |= _attention(block, place, {"norm": "norm2", "qkv": "qkv", "projection": "proj"})
        if block.role == "down":
            modules[f"encoder.{block.level}.pyramid.conv"] = f"enc.{size}_aux_residual"
    names = _tensor_names(config, modules)
    if "embedding.features.frequencies" in names:
        names["embedding.features.frequencies"] = "map_noise.freqs"
    return names


def diffusers_names(config: NetworkConfig) -> dict[str, str]:
    """Our tensors' names to those of diffusers' UNet2DModel; only ADM is one.

    It keeps query, key and value apart: `...attention.qkv` maps to a name with a hole, to be filled with q, k
    and v in turn.
    """
    modules = {
        "embedding.linear0": "time_embedding.linear_1",
        "embedding.linear1": "time_embedding.linear_2",
        "embedding.label": "class_embedding",
        "input": "conv_in",
        "output.norm": "conv_norm_out",
        "output.conv": "conv_out",
    }
    inner = {
        "norm0": "norm1",
        "conv0": "conv1",
        "embedding": "time_emb_proj",
        "norm1": "norm2",
        "conv1": "conv2",
        "skip": "conv_shortcut",
    }
    last = len(config.channel_mult) - 1
    for block in blocks(config):
        theirs, attention = {
            "encoder": (
                f"down_blocks.{block.level}.resnets.{block.index}",
                f"down_blocks.{block.level}.attentions.{block.index}",
            ),
            "down": (f"down_blocks.{block.level - 1}.downsamplers.0", ""),
            "middle": (f"mid_block.resnets.{block.index}", "mid_block.attentions.0"),
            "up": (f"up_blocks.{last - block.level - 1}.upsamplers.0", ""),
            "decoder": (
                f"up_blocks.{last - block.level}.resnets.{block.index}",
                f"up_blocks.{last - block.level}.attentions.{block.index}",
            ),
        }[block.role]
        modules |= {f"{block.ours}.{name}": f"{theirs}.{other}" for name, other in inner.items()}
        modules |= _attention(
            block, attention, {"norm": "group_norm", "qkv": "to_{}", "projection": "to_out.0"}
        )
    return _tensor_names(config, modules)


def reorder_qkv(rows: Tensor, head_channels: int, order: str) -> Tensor:
    """The rows of a query-key-value projection, from `order` to ours (query key value, head, channel).

    Args:
        rows: (3 * channels, ...), a weight or a bias.
        head_channels: channels per head, 0 for a single head.
        order: one of QKV_ORDERS.
    """
    channels = rows.shape[0] // 3
    size = head_channels or channels
    sizes = (3, channels // size, size)  # of the axes in our order
    axes = QKV_ORDERS[order]
    # The file's axes, from the outermost: the ones whose position in `axes` is 0, 1, 2.
    theirs = sorted(range(3), key=lambda axis: axes[axis])
    split = rows.reshape(*(sizes[axis] for axis in theirs), *rows.shape[1:])
    return split.permute(*axes, *range(3, split.ndim)).reshape(rows.shape)


def _attention(block: Block, theirs: str, inner: dict[str, str]) -> dict[str, str]:
    if not block.attention:
        return {}
    return {f"{block.ours}.attention.{name}": f"{theirs}.{other}" for name, other in inner.items()}


def _tensor_names(config: NetworkConfig, modules: dict[str, str]) -> dict[str, str]:
    """From modules to the tensors that this network has; what has no counterpart keeps its name."""
    names = {}
    for ours in meta_network(config).state_dict():
        module, _, tensor = ours.rpartition(".")
        names[ours] = f"{modules[module]}.{tensor}" if module in modules else ours
    return names


Names = Callable[[NetworkConfig], dict[str, str]]
