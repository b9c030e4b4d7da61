"""The launches whose machine code compiled_kernels.py inspects: one file per op, each with `cases(full)`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass

from ict_kernels.triton_support import Launch


@dataclass(frozen=True)
class Case:
    """An op at one shape, and what it launches there.

    Attributes:
        op: such as "group_norm_silu forward".
        shape: in words, such as "256 x 32 x 32, 32 groups, bf16, dropout".
        algorithm: such as "one pass" or "split".
        launches: in order; see `ict_kernels.triton_support.record_launches`.
        bytes_per_element: HBM bytes that the algorithm moves.
        minimum_bytes_per_element: HBM bytes that any algorithm must move.
    """

    op: str
    shape: str
    algorithm: str
    launches: list[Launch]
    bytes_per_element: float
    minimum_bytes_per_element: float


def cases(full: bool) -> Iterator[Case]:
    """The cases of every file in this folder: all of them, or a representative few."""
    for module in sorted(each.name for each in pkgutil.iter_modules(__path__)):
        yield from importlib.import_module(f"{__name__}.{module}").cases(full)
