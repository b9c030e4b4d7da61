"""A million file names in the memory of their characters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np

# Not os.fsencode: an archive's names need not be ones of this machine's locale. A byte of a file name that is
# no character is half a surrogate pair, which passes.
_ERRORS = "surrogatepass"


class NameTable(Sequence[str]):
    """Names by number, of any bytes that a file name may have.

    A list of ImageNet's 1.28 M names takes 111 MB, in each worker process again; this takes 49.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", _ERRORS) for name in names]
        self._joined = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        start = int(self._ends[number - 1]) if number else 0
        return self._joined[start : int(self._ends[number])].decode("utf-8", _ERRORS)
