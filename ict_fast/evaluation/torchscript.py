"""Opening a TorchScript file that somebody else has made, after looking at what it is.

A TorchScript archive is a ZIP of tensors and of code in a small language that torch compiles itself. Its
`.pkl` members are read by torch's own interpreter in C++, which knows tensors, containers and the archive's
classes and can import nothing. What `torch.save` and `pickle.dump` write is different: a program for Python's
unpickler, which may call any function of any module. Such a file is recognised by its structure and refused
unopened.

The code of an archive still runs, and torch's operators can read and write files: whence the SHA-256.
"""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import torch

from ict_fast.durable import sha256_file
from ict_fast.errors import InputError

MOST_BYTES = 8 << 30
"""An archive that claims more is not loaded."""

_PICKLE_STARTS = (b"\x80", b"(", b"}", b"]", b"c", b"ccopy_reg")  # binary protocols; those of protocol 0
_REQUIRED = ("constants.pkl", "data.pkl")


def open_torchscript(path: Path, sha256: str | None = None) -> tuple[torch.jit.ScriptModule, str]:
    """Loads a TorchScript module onto the CPU, in evaluation mode.

    Args:
        path: what `torch.jit.save` has written.
        sha256: what the file's SHA-256 must be, in hexadecimal; None to accept any.
    Returns:
        The module, and the file's SHA-256.
    Raises:
        InputError: a file that is not there, is a pickle, is not whole, claims too much or has another
            SHA-256. Nothing of it was executed.
    """
    require_torchscript(path)
    found = sha256_file(path)
    if sha256 is not None and found != sha256.strip().lower():
        raise InputError(f"{path}: its SHA-256 is {found}, not {sha256} as asked; get the file again")
    try:
        with warnings.catch_warnings():
            # torch.jit is deprecated since 2.13, and no other format holds the published Inception network.
            warnings.simplefilter("ignore")
            module = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError, OSError, MemoryError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: torch cannot load it as TorchScript: {why}") from error
    module.eval()
    return module, found


def require_torchscript(path: Path) -> None:
    """Raises InputError unless the file has the structure of a TorchScript archive; executes nothing."""
    again = "--features takes a TorchScript file, as torch.jit.save writes it"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(16)
        if not path.is_file():
            raise InputError(f"{path}: is not a file; {again}")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; {again}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}; {again}") from error
    if not zipfile.is_zipfile(path):
        if start.startswith(_PICKLE_STARTS) or path.suffix in (".pkl", ".pickle"):
            raise InputError(_pickle_refused(path, "a pickle"))
        raise InputError(f"{path}: truncated, or not a TorchScript file; {again}")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise InputError(f"{path}: truncated or damaged ({error}); get it again") from error

    claimed = sum(member.file_size for member in members)
    if claimed > max(MOST_BYTES, size):
        raise InputError(
            f"{path}: a file of {size / 1e6:.3g} MB that claims to hold {claimed / 1e9:.3g} GB; not loaded"
        )
    inside = [name.partition("/")[2] for name in (member.filename for member in members)]
    if not (all(name in inside for name in _REQUIRED) and any(name.startswith("code/") for name in inside)):
        if "data.pkl" in inside:
            raise InputError(_pickle_refused(path, "a pickle of torch.save"))
        raise InputError(f"{path}: a ZIP, but not a TorchScript archive (no code/, constants.pkl); {again}")


def _pickle_refused(path: Path, what: str) -> str:
    return (
        f"{path}: refused, it is {what}, which can run any program when it is loaded; nothing was executed;"
        " --features takes a TorchScript file, as torch.jit.save writes it"
    )
