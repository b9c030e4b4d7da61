"""ADM as diffusers' UNet2DModel: its configuration and its tensors, there and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ict_fast.config import Config, NetworkConfig
from ict_fast.errors import InputError
from ict_fast.interop.layouts import diffusers_names, meta_network
from ict_kernels import GroupNormSiLU

# Of UNet2DModel, what an ADM cannot do without.
_FIXED = {
    "time_embedding_type": "positional",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "act_fn": "silu",
    "norm_eps": 1e-05,
    "add_attention": True,
    "center_input_sample": False,
    "mid_block_scale_factor": 1,
    "class_embed_type": None,
}
# What UNet2DModel takes where its configuration says nothing, as far as that is not an ADM's.
_DEFAULTS = {"downsample_type": "conv", "upsample_type": "conv"}
_DOWN = {"ResnetDownsampleBlock2D": False, "AttnDownBlock2D": True}
_UP = {"ResnetUpsampleBlock2D": False, "AttnUpBlock2D": True}


def why_not(config: Config) -> str:
    """Why diffusers' UNet2DModel, with its scheduler, cannot be this model; empty if it can."""
    network, method = config.network, config.method
    if network.name != "adm":
        return f"{network.name} is not a network of diffusers"
    if network.c_noise != "adm-openai":
        return "its c_noise is ln(sigma)/4, and diffusers' scheduler gives 250 ln(sigma)"
    if network.embedding != "positional":
        return "its noise embedding is random Fourier features"
    if method.identity_sigma != method.sigma_min:
        return f"it is the identity at sigma {method.identity_sigma}, diffusers' scheduler at sigma_min"
    if network.channel_mult[0] != 1:
        return "its first level is wider than its noise embedding"
    if len(_group_counts(network)) > 1:
        return "its norms differ in their number of groups"
    return ""


def config(network: NetworkConfig) -> dict[str, Any]:
    """The configuration of the UNet2DModel that is this network (see `why_not`)."""
    attends = [
        network.resolution >> level in network.attention_resolutions
        for level in range(len(network.channel_mult))
    ]
    (groups,) = _group_counts(network)
    down, up = ({value: name for name, value in names.items()} for names in (_DOWN, _UP))
    return {
        "_class_name": "UNet2DModel",
        "sample_size": network.resolution,
        "in_channels": network.image_channels,
        "out_channels": network.image_channels,
        **_FIXED,
        "down_block_types": [down[here] for here in attends],
        "up_block_types": [up[here] for here in reversed(attends)],
        "block_out_channels": [network.channels * multiplier for multiplier in network.channel_mult],
        "layers_per_block": network.num_blocks,
        "attention_head_dim": network.head_channels or None,
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,
        "resnet_time_scale_shift": "scale_shift" if network.adaptive_norm else "default",
        "num_class_embeds": network.num_classes or None,
        "dropout": 0.0,
    }


def network(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a NetworkConfig that a UNet2DModel's configuration says, as JSON values.

    Raises:
        InputError: for what is no ADM.
    """
    for name, right in _FIXED.items():
        seen = values.get(name, _DEFAULTS.get(name, right))
        if seen != right:
            raise InputError(f"{path}: {name} is {seen!r}; only {right!r} is expressible here")
    widths, down, up = (
        values.get(name) for name in ("block_out_channels", "down_block_types", "up_block_types")
    )
    size = values.get("sample_size")
    well_formed = (
        isinstance(widths, list)
        and isinstance(down, list)
        and isinstance(up, list)
        and len(widths) == len(down) == len(up) > 0
        and all(type(width) is int and width > 0 for width in widths)
        and type(size) is int
        and len(widths) <= 16
    )
    if not well_formed:
        raise InputError(f"{path}: its unet/config.json lacks sizes, or has them in an unknown form")
    assert isinstance(widths, list)
    assert isinstance(down, list)
    assert isinstance(up, list)
    assert isinstance(size, int)
    for kinds, known in ((down, _DOWN), (up, _UP)):
        unknown = [kind for kind in kinds if kind not in known]
        if unknown:
            raise InputError(f"{path}: has a block {unknown[0]}; {' and '.join(known)} are expressible here")
    attends = [_DOWN[kind] for kind in down]
    if attends != [_UP[kind] for kind in reversed(up)]:
        raise InputError(f"{path}: attends at other resolutions on the way down than on the way up")
    if any(width % widths[0] for width in widths):
        raise InputError(f"{path}: widths {widths} are no multiples of the first")
    return {
        "name": "adm",
        "resolution": size,
        "image_channels": values.get("in_channels", 3),
        "num_classes": values.get("num_class_embeds") or 0,
        "head_channels": values.get("attention_head_dim", 8) or 0,
        "channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_blocks": values.get("layers_per_block", 2),
        "attention_resolutions": [size >> level for level, here in enumerate(attends) if here],
        "adaptive_norm": values.get("resnet_time_scale_shift") == "scale_shift",
        "embedding": "positional",
        "c_noise": "adm-openai",
    }


def check_groups(path: Path, network: NetworkConfig, values: Mapping[str, Any]) -> None:
    """Raises InputError if the UNet2DModel normalises in other groups than this network does."""
    groups, theirs = _group_counts(network), values.get("norm_num_groups", 32)
    if type(theirs) is not int or groups != {theirs}:
        here = " or ".join(map(str, sorted(groups)))
        raise InputError(f"{path}: norm_num_groups is {theirs!r}; a network of these widths has {here} here")
    # Of the attention in the middle alone. None: as many, or with scale_shift no norm at all.
    middle = values.get("attn_norm_num_groups")
    is_same = middle is None and values.get("resnet_time_scale_shift", "default") == "default"
    if middle != theirs and not is_same:
        raise InputError(f"{path}: attn_norm_num_groups is {middle!r}; its other norms have {theirs} groups")


def split(network: NetworkConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors by diffusers' names: query, key and value apart, 1x1 convolutions as matrices."""
    theirs = {}
    for name, other in diffusers_names(network).items():
        tensor = tensors[name]
        if ".attention." in name and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]
        if "{}" in other:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                theirs[other.format(letter)] = part
        else:
            theirs[other] = tensor
    return theirs


def join(network: NetworkConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `split`, still by diffusers' names; what is missing stays missing."""
    joined = dict(tensors)
    for name, other in diffusers_names(network).items():
        if "{}" in other:
            parts = [joined.pop(other.format(letter), None) for letter in "qkv"]
            whole = [part for part in parts if part is not None]
            if len(whole) < 3 or len({part.shape[1:] for part in whole}) > 1:
                continue
            joined[other] = torch.cat(whole)
        if name.rpartition(".")[0].endswith(("attention.qkv", "attention.projection")) and other in joined:
            tensor = joined[other]
            joined[other] = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
    return joined


def _group_counts(network: NetworkConfig) -> set[int]:
    return {
        module.num_groups for module in meta_network(network).modules() if isinstance(module, GroupNormSiLU)
    }
