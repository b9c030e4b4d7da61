"""Weights of another code base as a model of this one: checked, renamed, and written as a checkpoint."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ict_fast.checkpoint import write_checkpoint
from ict_fast.config import Config, DataConfig, MethodConfig, NetworkConfig, to_dict, validate
from ict_fast.durable import sha256_file
from ict_fast.errors import InputError
from ict_fast.interop.layouts import Names, meta_network, reorder_qkv
from ict_fast.version import __version__

KINDS = {
    "consistency": "a consistency model: images in one step",
    "denoiser": (
        "a diffusion model (EDM's denoiser), a start for `ict-fast train --init`; sampled in one or two steps"
        " it gives blurred means, not images"
    ),
    "noise-prediction": (
        "a diffusion model that predicts noise at 1,000 discrete times, which is not what is computed here: a"
        " start for `ict-fast train --init` and nothing else; sampling it gives no images"
    ),
}
# There is no data set that belongs to imported weights; a command that needs one asks for it.
NO_DATA = "(not known)"


@dataclass(frozen=True)
class Imported:
    """A model as it came out of a file."""

    config: Config
    tensors: dict[str, Tensor]
    """Our names, fp32."""
    kind: str
    """One of KINDS."""
    source: dict[str, Any]
    """What state.json records: file, its SHA-256, layout, what was assumed."""
    notes: list[str] = field(default_factory=list)
    """What a person should know, a line each."""


def imported(
    path: Path,
    tensors: Mapping[str, Tensor],
    network: NetworkConfig,
    method: MethodConfig,
    *,
    kind: str,
    layout: str,
    names: Names,
    qkv_order: str,
    notes: list[str],
    origin: Mapping[str, Any] | None = None,
    adjust: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> Imported:
    """Renames and checks; every tensor of the file must have found its place.

    Args:
        path: the file, for messages and the record.
        tensors: by their names.
        network: what the file's network was found to be.
        method: preconditioning and noise levels.
        kind: one of KINDS.
        layout: what the record calls it.
        names: the table of names.
        qkv_order: of the rows of the attention's projections.
        notes: see `Imported`.
        origin: of an export of ict-fast, what it says of where the model comes from; see `Description`.
        adjust: what else differs: (our name, their tensor) -> the tensor in our shape.
    Raises:
        InputError: naming the tensors that are missing, left over, of a wrong shape or type, or not finite.
    """
    config = Config(preset="imported", data=DataConfig(path=NO_DATA), network=network, method=method)
    try:
        validate(config)
        expected = meta_network(network).state_dict()
        table = names(network)
    except InputError as error:
        raise InputError(f"{path}: its network cannot be built here: {error}") from None
    missing = [theirs for theirs in table.values() if theirs not in tensors]
    if missing:
        raise InputError(f"{path}: lacks {_some(missing)}; get it again")
    extra = sorted(tensors.keys() - set(table.values()))
    if extra:
        raise InputError(f"{path}: has {_some(extra)}, which this network has no place for")
    ours = {}
    for name, theirs in table.items():
        tensor = adjust(name, tensors[theirs])
        if not tensor.is_floating_point():
            raise InputError(
                f"{path}: {theirs} holds {str(tensor.dtype).removeprefix('torch.')}, not weights"
            )
        if tensor.shape != expected[name].shape:
            given = tuple(tensors[theirs].shape)
            needed = tuple(expected[name].shape)
            raise InputError(f"{path}: {theirs} has the shape {given}; as {name} it needs {needed}")
        tensor = tensor.float()
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{path}: {theirs} is not finite")
        if name.rpartition(".")[0].endswith("attention.qkv"):
            tensor = reorder_qkv(tensor, network.head_channels, qkv_order)
        ours[name] = tensor.contiguous()
    source = {
        "file": path.name,
        "sha256": sha256_file(path),
        "layout": layout,
        "kind": kind,
        "qkv_order": qkv_order,
        "notes": notes,
        "caution": None if kind == "consistency" else KINDS[kind],  # `load_model` passes it on
        **({} if origin is None else {"origin": dict(origin)}),
    }
    return Imported(config, ours, kind, source, notes)


def with_second_sigma(model: Imported, sigma: float) -> Imported:
    """The model with another noise level of the second sampling step.

    Raises:
        InputError: if it is not between sigma_min and sigma_max.
    """
    config = replace(model.config, method=replace(model.config.method, second_sigma=sigma))
    low, high = config.method.sigma_min, config.method.sigma_max
    if not low < sigma < high:
        raise InputError(f"--second-sigma is {sigma}; it must be between {low} and {high}")
    return replace(model, config=config)


def save(model: Imported, out: Path) -> Path:
    """Writes the model as the checkpoint of a run of 0 steps: `sample`, `evaluate`, `--init` read it.

    Args:
        model: see `imported`.
        out: a new folder, or an empty one.
    Returns:
        the checkpoint's folder.
    Raises:
        InputError: if `out` holds anything, or cannot be written.
    """
    require_new(out)
    state = {
        "step": 0,
        "config": to_dict(model.config),
        "imported": model.source,
        "versions": {
            "ict_fast": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    try:
        return write_checkpoint(out, 0, {"ema": model.tensors}, state, keep=2)
    except OSError as error:
        raise InputError(
            f"{out} cannot be written: {error.strerror or error}; choose another --out"
        ) from None


def require_new(out: Path) -> None:
    """Raises InputError if there is anything at `out`."""
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"--out is {out}, which is not empty; choose another place, or delete it")


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().float().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3:,} more"
