"""A checkpoint as a folder for others: weights in safetensors, their configuration, and a card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ict_fast.checkpoint import Checkpoint
from ict_fast.consistency import load_model
from ict_fast.durable import flush_directory, write_durably
from ict_fast.errors import InputError
from ict_fast.interop.card import model_card
from ict_fast.interop.description import describe, read_description
from ict_fast.interop.files import file_kind, read_state_dict
from ict_fast.interop.imported import Imported, imported, require_new
from ict_fast.interop.layouts import meta_network

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


def export_safetensors(
    checkpoint: Checkpoint, out: Path, weights: str = "ema", license_id: str | None = None
) -> list[str]:
    """Writes `model.safetensors`, `config.json` and a card.

    Args:
        checkpoint: see `open_checkpoint`.
        out: a new folder, or an empty one.
        weights: "ema" for the averaged weights, "ema-NAME" for a further average, "weights" for the trained
            ones themselves.
        license_id: for the card's front matter, as model hubs spell it; None to name none.
    Returns:
        the files' names.
    Raises:
        InputError: if `out` holds anything or cannot be written, or the checkpoint has no such weights.
    """
    model = load_model(checkpoint.path, weights)
    tensors = model.network.state_dict()
    description = describe(checkpoint, model.config, tensors, weights)
    files = {
        WEIGHTS_FILE: encode(tensors),
        CONFIG_FILE: encode_json(description),
        "README.md": model_card(checkpoint, model.config, weights, "safetensors", license_id=license_id),
    }
    write_folder(out, files)
    return sorted(files)


def import_safetensors(path: Path) -> Imported:
    """A model that `export_safetensors` wrote.

    Args:
        path: its folder.
    Raises:
        InputError: see `read_state_dict` and `imported`; or if the configuration is missing or altered, or
            describes other weights.
    """
    description = read_json(path / CONFIG_FILE)
    described = read_description(path / CONFIG_FILE, description)
    file = path / WEIGHTS_FILE
    if file_kind(file) != "safetensors":
        raise InputError(f"{file}: truncated, or not safetensors; get it again")
    model = imported(
        file,
        read_state_dict(file),
        described.config.network,
        described.config.method,
        kind=described.kind,
        layout="ict-fast",
        names=lambda network: {name: name for name in meta_network(network).state_dict()},
        qkv_order="qkv-head-channel",
        notes=described.notes(),
        origin=described.origin,
    )
    described.check_fingerprint(description.get("fingerprint"), model.tensors)
    return model


def encode(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as a safetensors file, contiguous and on their own memory."""
    return safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
        metadata={"format": "pt"},  # what transformers and diffusers ask for
    )


def encode_json(values: Any) -> bytes:
    """JSON values as a file."""
    return (json.dumps(values, indent=2) + "\n").encode()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object out of a file that a stranger wrote.

    Raises:
        InputError: if it is missing, unreadable, larger than 1 MB, or something else.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(2**20 + 1)
        values = json.loads(content) if len(content) <= 2**20 else None
    except FileNotFoundError:
        raise InputError(f"{file}: does not exist") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{file}: not readable as JSON") from None
    if not isinstance(values, dict):
        raise InputError(f"{file}: not a JSON object of at most 1 MB")
    return values


def write_folder(out: Path, files: Mapping[str, bytes]) -> None:
    """Writes a folder whole or not at all.

    Args:
        out: a new folder, or an empty one.
        files: content by path within the folder.
    Raises:
        InputError: if `out` holds anything, or cannot be written.
    """
    require_new(out)
    if not out.name:
        raise InputError(f"--out is {out}; the folder is renamed to its place, which needs a name")
    partial = out.parent / f".tmp-{out.name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, content in files.items():
            file = partial / name
            file.parent.mkdir(exist_ok=True)
            write_durably(file, content)
        for folder in {(partial / name).parent for name in files} | {partial}:
            flush_directory(folder)
        os.replace(partial, out)
        flush_directory(out.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(
            f"{out} cannot be written: {error.strerror or error}; choose another --out"
        ) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
