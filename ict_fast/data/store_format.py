"""The parts of a store's files, for whoever writes them and whoever reads them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from ict_fast.errors import InputError

FORMAT = "ict-fast store"
VERSION = 1


def describe(source: str, recipe: str, classes: Sequence[str]) -> dict[str, Any]:
    """What meta.json says of any store; its files, and what its writer knows of it, are added."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "source": source,
        "recipe": recipe,
        "num_classes": len(classes),
        "classes": list(classes),
    }


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """The first bytes of a .npy file in C order; what follows is the array's memory."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return header.getvalue()


def encode_labels(labels: np.ndarray) -> bytes:
    """labels.npy."""
    return npy_header(labels.shape, labels.dtype) + labels.tobytes()


def file_entry(content: bytes) -> dict[str, Any]:
    """What meta.json says of a file."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def image_shape_problem(shape: tuple[int, ...]) -> str:
    """Why a store cannot hold images of that shape; empty if it can."""
    if len(shape) != 4 or shape[1] != shape[2] or shape[3] not in (1, 3) or 0 in shape:
        return f"shape {shape}; it must be (N, H, W, C) with N > 0, H = W and C = 1 or 3"
    return ""


def check_labels(labels: np.ndarray, num_classes: int, name: str) -> None:
    """Raises InputError, which begins with `name`, unless labels (N,) are those of `num_classes` classes."""
    if labels.ndim != 1 or len(labels) == 0:
        raise InputError(f"{name}: shape {labels.shape}; it must be (N,) with N > 0")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= max(1, num_classes):
        raise InputError(
            f"{name}: labels from {low} to {high}; there are {num_classes} classes, counted from 0"
        )
