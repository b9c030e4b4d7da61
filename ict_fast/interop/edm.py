"""The networks of EDM and ECT: NCSN++, DDPM++ (both are their SongUNet) and ADM (DhariwalUNet).

A snapshot (`.pkl`) names its own preconditioning; a plain state dict does not. Everything about the network
but the heads follows from names and shapes, and what a snapshot says of itself is compared with that.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ict_fast.config import MethodConfig, NetworkConfig
from ict_fast.errors import InputError, did_you_mean
from ict_fast.interop.edm_pickle import PickledModule, read_pickled_network
from ict_fast.interop.files import file_kind, read_state_dict
from ict_fast.interop.imported import Imported, imported
from ict_fast.interop.layouts import blocks, edm_names

ADM_HEAD_CHANNELS = 64  # DhariwalUNet's
ECT_SIGMA_MIN = 0.003  # ECMPrecond's; where its models are the identity
_KINDS = {"EDMPrecond": "denoiser", "ECMPrecond": "consistency"}
_FILTERS = {"ncsnpp": (1.0, 3.0, 3.0, 1.0), "ddpmpp": (1.0, 1.0), "adm": (1.0, 1.0)}


def import_edm(path: Path, *, kind: str | None = None) -> Imported:
    """A model of EDM or ECT from its snapshot (`.pkl`), or from a state dict (`.pt`, `.safetensors`).

    Args:
        path: the file.
        kind: "consistency" (ECT) or "denoiser" (EDM), for a state dict. A snapshot says it itself.
    Raises:
        InputError: see `read_pickled_network`, `read_state_dict`, `imported`; or an architecture or a
            preconditioning that is not expressible.
    """
    notes: list[str] = []
    snapshot = read_pickled_network(path) if file_kind(path) == "pickle" else None
    if snapshot is None:
        tensors = read_state_dict(path)
        if any(name.startswith("input_blocks.") for name in tensors):
            raise InputError(f"{path}: is an ADM of OpenAI, not of EDM; `ict-fast import openai {path}`")
        if kind is None:
            raise InputError(
                f"{path}: a state dict does not tell a consistency model of ECT from a denoiser of EDM; give"
                " --kind consistency or --kind denoiser"
            )
        if kind not in _KINDS.values():
            raise InputError(f"--kind is {kind}{did_you_mean(kind, _KINDS.values())}")
        values: Mapping[str, Any] = {}
    else:
        kind, values = _kind_of_snapshot(path, snapshot, kind), snapshot.attributes
        tensors = snapshot.tensors()
        notes.append(f"kind {kind}: {snapshot.class_name}, says the file; its source code was not executed")
    if all(name.startswith("model.") for name in tensors):
        tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}

    network = _network(path, tensors)
    tensors = _checked_filters(path, network, tensors)
    if tensors.pop("map_augment.weight", None) is not None:
        # It has no bias and is fed zeros when sampling (EDM's augmentation labels): it adds nothing.
        notes.append("map_augment, the input for augmentation labels, is left out: it is zero in sampling")
    if snapshot is not None:
        network = _checked_snapshot(path, network, snapshot)
    return imported(
        path,
        tensors,
        network,
        _method(path, kind, values),
        kind=kind,
        layout="ect" if kind == "consistency" else "edm",
        names=edm_names,
        qkv_order="head-channel-qkv",
        notes=notes,
        # ADM's classes are the columns of a matrix there, the rows of an embedding here.
        adjust=lambda name, tensor: (
            tensor.T if name == "embedding.label.weight" and network.name == "adm" else tensor
        ),
    )


def _kind_of_snapshot(path: Path, snapshot: PickledModule, asked: str | None) -> str:
    if snapshot.class_name not in _KINDS:
        raise InputError(
            f"{path}: its preconditioning is {snapshot.class_name}; {' and '.join(_KINDS)} are expressible"
        )
    found = _KINDS[snapshot.class_name]
    if asked not in (None, found):
        raise InputError(f"{path}: is {snapshot.class_name}, a {found}; --kind is {asked}")
    return found


def _method(path: Path, kind: str, values: Mapping[str, Any]) -> MethodConfig:
    """Preconditioning and levels; `values` are the attributes of a snapshot, or nothing."""
    sigma_data = _finite(path, "sigma_data", values.get("sigma_data", 0.5))
    if kind == "denoiser":
        return MethodConfig(sigma_data=sigma_data, boundary_sigma=0.0)
    sigma_min = _finite(path, "sigma_min", values.get("sigma_min", ECT_SIGMA_MIN))
    return MethodConfig(sigma_data=sigma_data, sigma_min=sigma_min)


def _finite(path: Path, name: str, value: Any) -> float:
    """An attribute of a snapshot as a number.

    Raises:
        InputError: if it is none, or not finite, or beyond what a float holds.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{path}: {name} is a {type(value).__name__}; it must be a number")
    if not abs(value) < sys.float_info.max:  # also nan; compares integers of any length
        raise InputError(f"{path}: {name} is not finite, or too large to be a number of the network")
    return float(value)


def _network(path: Path, tensors: Mapping[str, Tensor]) -> NetworkConfig:
    """The network by names and shapes.

    Raises:
        InputError: for what is none of the three, or has parts that they do not have.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise InputError(f"{path}: lacks {name}; it is no network of EDM's")
        if tensors[name].ndim < 2:
            raise InputError(f"{path}: {name} has the shape {tuple(tensors[name].shape)}, no weight's")
        return tuple(tensors[name].shape)

    sizes = sorted(
        {int(found[1]) for name in tensors if (found := re.match(r"enc\.(\d{1,5})x\1_", name))}, reverse=True
    )
    if not sizes:
        raise InputError(f"{path}: lacks enc.<size>x<size>_conv; it is no network of EDM's")
    top = f"{sizes[0]}x{sizes[0]}"
    unknown = [name for name in tensors if re.search(r"_aux_(skip|down|up)\.", name)]
    if unknown:
        raise InputError(
            f"{path}: has {unknown[0]}, of the architecture `skip`, which networks here have not"
        )
    if "out_conv.weight" in tensors:
        name = "adm"
        channels = shape("map_layer0.weight")[1]
    else:
        pyramid = any("_aux_residual." in key for key in tensors)
        name = "ncsnpp" if pyramid or (len(sizes) == 1 and "map_noise.freqs" in tensors) else "ddpmpp"
        channels = shape(f"enc.{top}_conv.weight")[0]
    count = len({key.split(".")[1] for key in tensors if key.startswith(f"enc.{top}_block")})
    if not channels or not count:
        raise InputError(f"{path}: has no blocks; it is no network of EDM's")
    widths = [shape(f"enc.{size}x{size}_block{count - 1}.conv1.weight")[0] for size in sizes]
    if any(width % channels for width in widths):
        raise InputError(f"{path}: widths {widths} are no multiples of its {channels} channels")
    frequencies = tensors.get("map_noise.freqs")
    labels = tensors.get("map_label.weight")
    return NetworkConfig(
        name=name,  # type: ignore[arg-type]
        resolution=sizes[0],
        image_channels=shape(f"enc.{top}_conv.weight")[1],
        num_classes=0 if labels is None or labels.ndim != 2 else labels.shape[1],
        head_channels=ADM_HEAD_CHANNELS if name == "adm" else 0,
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        num_blocks=count,
        attention_resolutions=tuple(
            size for size in sizes if f"enc.{size}x{size}_block0.qkv.weight" in tensors
        ),
        adaptive_norm=shape(f"enc.{top}_block0.affine.weight")[0] == 2 * widths[0],
        embedding="positional" if frequencies is None else "fourier",
        embedding_scale=_scale(frequencies),
    )


def _scale(frequencies: Tensor | None) -> float:
    """The standard deviation that the frequencies were drawn with, estimated; they themselves come along."""
    default = NetworkConfig().embedding_scale
    if frequencies is None or not frequencies.is_floating_point() or frequencies.numel() < 2:
        return default
    measured = float(frequencies.float().square().mean().sqrt())
    return float(f"{measured:.2g}") or default


def _checked_filters(path: Path, network: NetworkConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the resampling filters, which are constants here.

    Raises:
        InputError: a filter other than the network's.
    """
    taps = torch.tensor(_FILTERS[network.name])
    expected = torch.outer(taps, taps) / taps.sum() ** 2
    for name, tensor in tensors.items():
        if name.endswith(".resample_filter"):
            same = tensor.numel() == expected.numel() and torch.allclose(
                tensor.float().reshape(expected.shape), expected, atol=1e-6
            )
            if not same:
                raise InputError(
                    f"{path}: {name} is not the filter {[int(tap) for tap in taps]} of {network.name}"
                )
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".resample_filter")}


def _checked_snapshot(path: Path, network: NetworkConfig, snapshot: PickledModule) -> NetworkConfig:
    """The network with what only a snapshot knows: width of the heads, dropout.

    Raises:
        InputError: if a snapshot says something else of itself than its tensors do.
    """
    unet = snapshot.children().get("model")
    if unet is None:
        raise InputError(f"{path}: {snapshot.class_name} holds no model")
    for name, ours in (("img_resolution", network.resolution), ("img_channels", network.image_channels)):
        said = snapshot.attributes.get(name, ours)
        if type(said) is not int or said != ours:
            raise InputError(f"{path}: says another {name} than its tensors, which say {ours}")
    modules = dict(unet.modules())
    try:
        names = edm_names(replace(network, head_channels=0))  # names do not depend on the heads
    except InputError as error:
        raise InputError(f"{path}: its network cannot be built here: {error}") from None
    heads, dropouts = set(), set()
    for block in blocks(network):
        theirs = modules.get(names[f"{block.ours}.norm0.weight"].removesuffix(".norm0.weight"))
        if theirs is None:
            continue  # its tensors are missed later, by name
        dropout, count = theirs.attributes.get("dropout"), theirs.attributes.get("num_heads")
        if dropout is not None:
            dropouts.add(_finite(path, "dropout", dropout))
        if block.attention and type(count) is int and count > 0:
            width = network.channels * network.channel_mult[block.level]
            if width % count:  # more heads than channels included
                raise InputError(f"{path}: num_heads does not divide the {width} channels of an attention")
            heads.add(0 if count == 1 and network.name != "adm" else width // count)
    if len(heads) > 1:
        raise InputError(
            f"{path}: its attention heads have {sorted(heads)} channels; here they have one width"
        )
    return replace(
        network,
        head_channels=heads.pop() if heads else network.head_channels,
        dropout=dropouts.pop() if len(dropouts) == 1 else 0.0,
    )
