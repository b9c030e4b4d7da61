"""The ADM state dicts of openai/consistency_models and openai/guided-diffusion.

What the network is follows from names and shapes, except for three things: the resolution (ADM is
convolutional), the channels per attention head, and the order of the attention's rows. For the published
models they are known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ict_fast.config import MethodConfig, NetworkConfig
from ict_fast.errors import InputError, did_you_mean
from ict_fast.interop.edm_pickle import holds_network
from ict_fast.interop.files import file_kind, read_state_dict
from ict_fast.interop.imported import KINDS, Imported, imported
from ict_fast.interop.layouts import openai_names

HEAD_CHANNELS = 64
# The norms here have 32 groups from this width on; theirs have at every width.
NARROWEST = 128
_RESOLUTIONS = {(1, 2, 3, 4): 64, (1, 1, 2, 3, 4): 128, (1, 1, 2, 2, 4, 4): 256}
_ORDERS = {"new": "qkv-head-channel", "legacy": "head-qkv-channel"}
# Second steps, as index and number of levels, with which the authors sample (consistency_models,
# scripts/launch.sh).
_SECOND_STEPS = {
    "cd_imagenet64": (22, 39),
    "ct_imagenet64": (106, 200),
    "cd_bedroom256_lpips": (17, 39),
    "cd_bedroom256_l2": (18, 39),
    "ct_bedroom256": (67, 150),
    "ct_cat256": (62, 150),
}


def import_openai(
    path: Path,
    *,
    kind: str | None = None,
    resolution: int | None = None,
    head_channels: int | None = None,
    attention_order: str | None = None,
) -> Imported:
    """A model of OpenAI from its `.pt` (or `.safetensors`) file.

    Args:
        path: the file.
        kind: "consistency" or "denoiser"; by default what the file's name says, as the published ones do
            (cd_, ct_, edm_). The weights of guided-diffusion are known by their shapes.
        resolution: in pixels; by default that of the published network of these levels.
        head_channels: channels per attention head; by default 64.
        attention_order: "new" or "legacy", for guided-diffusion, whose option `use_new_attention_order`
            leaves no trace in the weights; by default new at 64x64 and legacy else, as published.
    Raises:
        InputError: see `read_state_dict` and `imported`; or an architecture that is not expressible.
    """
    if file_kind(path) == "pickle" and holds_network(path):
        raise InputError(f"{path}: is a snapshot of EDM or ECT, not of OpenAI; `ict-fast import edm {path}`")
    tensors = read_state_dict(path)
    if any(re.match(r"(module\.)?(model\.)?enc\.\d+x\d+_", name) for name in tensors):
        raise InputError(f"{path}: is a network of EDM's, not of OpenAI; `ict-fast import edm {path}`")
    network = _network(path, tensors)
    notes: list[str] = []

    known = _RESOLUTIONS.get(network.channel_mult)
    if resolution is None and known is None:
        mults = ",".join(map(str, network.channel_mult))
        raise InputError(f"{path}: a network of levels {mults} has no known resolution; give --resolution")
    size = resolution or known or 0
    notes.append(f"resolution {size}: " + ("given" if resolution else "that of the published network"))
    attends = [size >> level for level in network.attention_resolutions]
    heads = HEAD_CHANNELS if head_channels is None else head_channels
    notes.append(f"{heads} channels per attention head: " + ("given" if head_channels else "as published"))

    predicts_noise = tensors["middle_block.1.qkv.weight"].ndim == 3
    qkv_order = _ORDERS["new"]
    if predicts_noise:
        if kind not in (None, "noise-prediction"):
            raise InputError(f"{path}: is of guided-diffusion, which predicts noise; --kind {kind} is not it")
        if known == 128 and head_channels is None:
            raise InputError(
                f"{path}: guided-diffusion's 128x128 network has 4 heads at every width; networks here have"
                " heads of one width"
            )
        kind = "noise-prediction"
        order = attention_order or ("new" if size == 64 else "legacy")
        if order not in _ORDERS:
            raise InputError(f"--attention-order is {order}{did_you_mean(order, _ORDERS)}")
        qkv_order = _ORDERS[order]
        notes.append(f"attention order {order}: " + ("given" if attention_order else "as published"))
        network, tensors = _without_variance(path, network, tensors, notes)
    elif attention_order is not None:
        raise InputError(
            f"{path}: is of consistency_models, whose attention has one order; leave --attention-order out"
        )
    if kind is None:
        kind = _kind_of_name(path)
        notes.append(f"kind {kind}: by the file's name")
    if kind not in KINDS:
        raise InputError(f"--kind is {kind}{did_you_mean(kind, KINDS)}")

    method = MethodConfig(boundary_sigma=0.0 if kind != "consistency" else None)
    return imported(
        path,
        tensors,
        replace(network, resolution=size, head_channels=heads, attention_resolutions=tuple(attends)),
        replace(method, second_sigma=_second_sigma(path, method)),
        kind=kind,
        layout="guided-diffusion" if predicts_noise else "consistency_models",
        names=openai_names,
        qkv_order=qkv_order,
        notes=notes,
        # guided-diffusion's attention convolves in one dimension.
        adjust=lambda name, tensor: tensor[..., None] if tensor.ndim == 3 else tensor,
    )


def _network(path: Path, tensors: Mapping[str, Tensor]) -> NetworkConfig:
    """The network by names and shapes; `attention_resolutions` are still levels, the resolution is open.

    Raises:
        InputError: for what is no ADM, or one with other parts than these.
    """
    for name, what in (
        (r"input_blocks\.\d+\.0\.op\.", "downsampling by convolution (resblock_updown False)"),
        (r"output_blocks\.\d+\.\d\.conv\.", "upsampling by convolution (resblock_updown False)"),
        (r".*\.encoder_kv\.", "attention to another encoder"),
    ):
        if any(re.match(name, key) for key in tensors):
            raise InputError(f"{path}: has {what}, which the networks here do not have")
    shape = _Shapes(path, tensors)
    channels = shape["time_embed.0.weight"][1]
    width, image_channels = shape["input_blocks.0.0.weight"][:2]
    outputs = _count(tensors, "output_blocks")
    levels = 1 + sum(
        bool(re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight", name)) for name in tensors
    )
    per_level, rest = divmod(outputs, levels)
    inputs = _count(tensors, "input_blocks")
    if rest or per_level < 2 or inputs != levels * per_level:
        raise InputError(
            f"{path}: {inputs} input and {outputs} output blocks on {levels} levels are no ADM; get it again"
        )
    widths, attends = [], []
    for level in range(levels):
        first, last = 1 + level * per_level, (level + 1) * per_level - 1
        widths.append(shape[f"input_blocks.{last}.0.out_layers.3.weight"][0])
        if f"input_blocks.{first}.1.qkv.weight" in tensors:
            attends.append(level)
    if not channels or any(w % channels for w in widths) or width != widths[0]:
        raise InputError(f"{path}: widths {widths} are no multiples of its {channels} channels")
    if min(widths) < NARROWEST:
        raise InputError(
            f"{path}: a layer has {min(widths)} channels, which OpenAI normalises in 32 groups; here a group"
            " has at least four channels"
        )
    labels = tensors.get("label_emb.weight")
    block = "input_blocks.1.0."
    rows = shape[f"{block}emb_layers.1.weight"][0]
    shape["middle_block.1.qkv.weight"]  # the middle attends in every ADM
    return NetworkConfig(
        name="adm",
        image_channels=image_channels,
        num_classes=0 if labels is None else labels.shape[0],
        channels=channels,
        channel_mult=tuple(w // channels for w in widths),
        num_blocks=per_level - 1,
        attention_resolutions=tuple(attends),
        adaptive_norm=rows == 2 * shape[f"{block}out_layers.3.weight"][0],
        embedding="positional",
        c_noise="adm-openai",
    )


class _Shapes:
    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self._path, self._tensors = path, tensors

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self._tensors:
            raise InputError(f"{self._path}: lacks {name}; it is no ADM of OpenAI's")
        shape = tuple(self._tensors[name].shape)
        if len(shape) < 2:
            raise InputError(f"{self._path}: {name} has the shape {shape}, which is no weight's")
        return shape


def _count(tensors: Mapping[str, Tensor], stem: str) -> int:
    numbers = {int(found[1]) for name in tensors if (found := re.match(rf"{stem}\.(\d{{1,4}})\.", name))}
    return len(numbers)


def _without_variance(
    path: Path, network: NetworkConfig, tensors: dict[str, Tensor], notes: list[str]
) -> tuple[NetworkConfig, dict[str, Tensor]]:
    """Drops the second half of the output, a learned variance, where there is one."""
    if network.image_channels == 6:
        raise InputError(f"{path}: takes 6 channels, a small image beside the noisy one; it is an upsampler")
    names = ("out.2.weight", "out.2.bias")
    if all(name in tensors and tensors[name].shape[0] == 2 * network.image_channels for name in names):
        notes.append("the learned variance, half of the output's channels, is left out")
        tensors = tensors | {name: tensors[name][: network.image_channels] for name in names}
    return network, tensors


def _kind_of_name(path: Path) -> str:
    stem = path.name.lower()
    if stem.startswith(("cd_", "ct_")):
        return "consistency"
    if stem.startswith("edm_"):
        return "denoiser"
    raise InputError(
        f"{path}: is it a consistency model, or a diffusion model of EDM's kind? The weights do not tell;"
        " give --kind consistency or --kind denoiser"
    )


def _second_sigma(path: Path, method: MethodConfig) -> float:
    """The level of the second step with which the authors sample a published model; else the default."""
    for stem, (index, pairs) in _SECOND_STEPS.items():
        if path.name.lower().startswith(stem):
            high, low = (sigma ** (1 / method.rho) for sigma in (method.sigma_max, method.sigma_min))
            return (high + index / pairs * (low - high)) ** method.rho
    return method.second_sigma
