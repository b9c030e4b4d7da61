"""Reading pickles without running them: what a pickle may name is on a list, anything else is refused.

Data sets and weights are published as pickles, and a pickle is a program: it names any function of any module
and has it called. Here a name only leads to what the caller has put in its place.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from ict_fast.errors import InputError


def load_restricted(
    file: IO[bytes],
    allowed: Mapping[tuple[str, str], Any],
    *,
    name: str,
    encoding: str = "ASCII",
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """Unpickles plain containers, numbers, text and bytes, and what `allowed` adds to them.

    Args:
        file: open for reading at the pickle's first byte.
        allowed: (module, global) to the class or function that the pickle gets for it. Nothing is imported.
            The pickle calls these with arguments, and sets states, of its own choice: put in only what can
            bear that.
        name: what the person knows the file as, for messages.
        encoding: how text of Python 2 is decoded; "bytes" leaves it as bytes.
        persistent_load: what a reference to something outside of the pickle becomes; None refuses them.
    Returns:
        the unpickled object; its types are not checked.
    Raises:
        InputError: a global that is not allowed, by name; a file that is truncated, malformed or unreadable.
    """
    try:
        return _Unpickler(file, allowed, name, encoding, persistent_load).load()
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged pickle raises nearly anything, MemoryError and IndexError included
        why = str(error) or type(error).__name__
        raise InputError(
            f"{name}: truncated, or not a pickle that can be read ({why}); get it again"
        ) from error


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        file: IO[bytes],
        allowed: Mapping[tuple[str, str], Any],
        name: str,
        encoding: str,
        persistent_load: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__(file, encoding=encoding)
        self._allowed = allowed
        self._name = name
        self._persistent_load = persistent_load

    def persistent_load(self, reference: Any) -> Any:
        """Called for every reference to something that lies outside of the pickle."""
        if self._persistent_load is None:
            raise pickle.UnpicklingError("it refers to something outside of it")
        return self._persistent_load(reference)

    def find_class(self, module: str, name: str) -> Any:
        """Called for every global that the pickle names, whatever the opcode."""
        if (module, name) not in self._allowed:
            wanted = repr(f"{module}.{name}")
            raise InputError(
                f"{self._name}: refused, it asks for {wanted}, which plain data have no use for and which may"
                " run code; nothing was executed; get the file from its publisher"
            )
        return self._allowed[module, name]


class PickledArray:
    """Stands in for `numpy.ndarray` in a pickle.

    NumPy's own classes cannot bear a hostile state: a dtype whose state was altered to hold objects makes an
    array of them from arbitrary addresses (NumPy 2.4: a segmentation fault). So the array is described by the
    pickle and built here, from bytes, as numbers.
    """

    array: np.ndarray = np.empty(0, np.uint8)
    """What the pickle describes, read-only."""

    def __setstate__(self, state: tuple[int, tuple[int, ...], object, bool, object]) -> None:
        _, shape, dtype, fortran_order, content = state
        if not isinstance(dtype, _PickledDtype) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array of something else than numbers")
        self.array = np.frombuffer(content, dtype.dtype).reshape(shape, order="F" if fortran_order else "C")


class _PickledDtype:
    """Stands in for `numpy.dtype`: a type of numbers, and nothing of its state but the byte order."""

    def __init__(self, name: str | bytes, align: object = False, copy: object = False) -> None:
        self.dtype = np.dtype(_text(name))
        if self.dtype.kind not in "biufc":
            raise pickle.UnpicklingError(f"an array of {self.dtype}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(_text(state[1]))


def _new_array(kind: object, shape: object, typecode: object) -> PickledArray:
    """In place of NumPy's `_reconstruct`, whose result is empty until its state is set."""
    if kind is not PickledArray:
        raise pickle.UnpicklingError("an array of an unknown class")
    return PickledArray()


def _number(dtype: _PickledDtype, content: bytes) -> int | float | complex | bool:
    """In place of NumPy's `scalar`: a number of Python."""
    if not isinstance(dtype, _PickledDtype):
        raise pickle.UnpicklingError("a number of an unknown type")
    return np.frombuffer(content, dtype.dtype, count=1)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """In place of `_codecs.encode`, by which Python 3 writes bytes in the protocols of Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


def _text(value: str | bytes) -> Any:
    return value.decode("ascii") if isinstance(value, bytes) else value


ARRAYS: Mapping[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,  # the module's name since NumPy 2
    ("numpy", "ndarray"): PickledArray,
    ("numpy", "dtype"): _PickledDtype,
    ("_codecs", "encode"): _encode,
}
"""For `load_restricted`: arrays of numbers, which arrive as PickledArray."""

NUMBERS: Mapping[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "scalar"): _number,
    ("numpy._core.multiarray", "scalar"): _number,
}
"""For `load_restricted`, beside ARRAYS: NumPy's scalars, which arrive as Python's numbers."""
