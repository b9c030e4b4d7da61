"""Tensors out of files that strangers wrote: nothing in them is run, and no size in them is believed.

`.pt` goes through torch's own restricted loader (`weights_only`) after its ZIP directory was checked, and
`.safetensors` through safetensors. EDM's pickles are read in edm_pickle.py.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ict_fast.errors import InputError
from ict_fast.restricted_unpickler import load_restricted

# What torch.save wrote before it wrote ZIPs: a pickle of this number comes first.
LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ZIP = b"PK\x03\x04"
_WRAPPERS = ("ema", "ema_state_dict", "state_dict", "model", "model_state_dict")
_BYTES_PER_HEADER = 8


def file_kind(path: Path) -> str:
    """What a file is, by its first bytes: torch, safetensors, or else a pickle, which may begin anyhow.

    Raises:
        InputError: if it is not there, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        raise InputError(f"{path}: does not exist") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name the file with the weights") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    if start.startswith((_ZIP, LEGACY_TORCH)):
        return "torch"
    if start[_BYTES_PER_HEADER : _BYTES_PER_HEADER + 1] == b"{":
        return "safetensors"
    return "pickle"


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict by name, on the CPU, as they are in the file.

    The averaged weights are taken where the file has them under a name of their own (`ema`), and the prefix
    `module.` of parallel training is dropped.

    Raises:
        InputError: a file that is truncated, malformed or unreadable, claims more than it holds, asks for
            anything else than tensors and plain containers, or holds no state dict.
    """
    kind = file_kind(path)
    if kind == "safetensors":
        tensors: Any = _read_safetensors(path)
    elif kind == "torch":
        tensors = _read_torch(path)
    else:  # not as torch saves tensors; a pickle gets its say, so that what it asks for is named
        with path.open("rb") as file:
            tensors = load_restricted(file, {}, name=str(path))
    for wrapper in _WRAPPERS:
        if isinstance(tensors, Mapping) and isinstance(tensors.get(wrapper), Mapping):
            tensors = tensors[wrapper]
            break
    if not isinstance(tensors, Mapping) or not tensors:
        raise InputError(f"{path}: holds no state dict, names and their tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(
                f"{path}: {str(name)[:80]!r} is a {type(tensor).__name__}; a state dict has tensors alone"
            )
        check_extent(path, name, tensor)
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def check_extent(path: Path, name: str, tensor: Tensor) -> None:
    """Refuses a tensor that shows the same memory many times: copying it would cost what the file has not.

    Raises:
        InputError: naming the tensor.
    """
    if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > (
        tensor.untyped_storage().nbytes()
    ):
        raise InputError(f"{path}: {name} claims the shape {tuple(tensor.shape)}, more than it holds")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be read: {_line(error)}; get it again") from None


def _read_torch(path: Path) -> Any:
    _check_zip(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:unsupported|global:) GLOBAL (\S+)", str(error))
        if wanted is None:
            raise InputError(f"{path}: truncated, or not weights; {_line(error)}") from None
        raise InputError(
            f"{path}: refused, it asks for {wanted[1]!r}, which weights have no use for and"
            " which may run code; nothing was executed; get the file from its publisher"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged file raises nearly anything
        raise InputError(f"{path}: truncated, or not weights that can be read ({_line(error)})") from None


def _check_zip(path: Path) -> None:
    """Refuses a ZIP whose directory claims what the file does not hold."""
    with path.open("rb") as file:
        if file.read(4) != _ZIP:
            return
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise InputError(f"{path}: truncated, not a whole ZIP ({_line(error)}); get it again") from None
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        raise InputError(f"{path}: has a member twice; it is refused")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise InputError(
                f"{path}: {member.filename} is compressed or encrypted, as torch never writes it"
            )
        if member.file_size > size or member.header_offset + member.file_size > size:
            raise InputError(
                f"{path}: {member.filename} claims {member.file_size:,} bytes, the whole file has {size:,};"
                " get it again"
            )


def _line(error: Exception) -> str:
    """The beginning of a message, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:160]}..."
