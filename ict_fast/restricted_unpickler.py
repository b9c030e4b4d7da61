"""Reading pickles without running them: what a pickle may name is on a list, anything else is refused.

Data sets and weights are published as pickles, and a pickle is a program: it names any function of any module
and has it called. Here a name only leads to what the caller has put in its place.

CPython's unpickler in C cannot be narrowed: it sets the state of whatever lies on its stack, hashes any key
and grows its memo to any index. So the one in Python reads, with the instructions replaced that do more than
build plain data. Large arrays are one instruction each, and as fast.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any, ClassVar

import numpy as np

from ict_fast.errors import InputError

_SCALARS = (str, bytes, int, float, bool, type(None))
_SIZED = (str, bytes, list, tuple, dict, set, frozenset)
# Of the arguments of calls, entries or bytes: per byte read, and on top. Files that others wrote need 1.
_GIVEN_PER_BYTE, _GIVEN_FREELY = 4, 2**12


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
            The pickle calls these with arguments of its own choice, and gives a state of its own choice to
            instances of the classes that have a `__setstate__`: put in only what can bear that. Together
            the arguments may be a few times as long as the file.
        name: what the person knows the file as, for messages.
        encoding: how text of Python 2 is decoded; "bytes" leaves it as bytes.
        persistent_load: what a reference to something outside of the pickle becomes; None refuses them.
    Returns:
        the unpickled object; its types are not checked, except that keys and members of sets are scalars.
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
        why = "no such instruction" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise InputError(
            f"{name}: truncated, or not a pickle that can be read ({why}); get it again"
        ) from error


_InPython: Any = pickle._Unpickler  # whose methods for the instructions have no types


class _Unpickler(_InPython):
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(_InPython.dispatch)

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
        self._stateful = {
            kind for kind in allowed.values() if isinstance(kind, type) and hasattr(kind, "__setstate__")
        }
        self._file, self._begins_at, self._given = file, file.tell(), 0
        self._file_readline = self._whole_line

    def persistent_load(self, reference: Any) -> Any:
        """Called for every reference to something that lies outside of the pickle."""
        if self._persistent_load is None:
            raise pickle.UnpicklingError("it refers to something outside of it")
        return self._persistent_load(reference)

    def find_class(self, module: str, name: str) -> Any:
        """Called for every global that the pickle names, whatever the opcode."""
        if (module, name) not in self._allowed:
            wanted = repr(f"{module}.{name}"[:200])
            raise InputError(
                f"{self._name}: refused, it asks for {wanted}, which plain data have no use for and which may"
                " run code; nothing was executed; get the file from its publisher"
            )
        return self._allowed[module, name]

    def _whole_line(self) -> bytes:
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        return line

    def _charge(self, arguments: Any) -> None:
        """Counts what a call is given, which it may copy: the same large object could be given to many."""
        self._given += sum(len(each) for each in arguments if isinstance(each, _SIZED))
        if self._given > _GIVEN_PER_BYTE * (self._file.tell() - self._begins_at) + _GIVEN_FREELY:
            raise pickle.UnpicklingError("it has the same data copied over and over")

    # The instructions that differ. Each method's docstring is the trap.

    def load_reduce(self) -> None:
        """Calls with arguments that cost the file nothing, because it refers to them."""
        self._charge(self.stack[-1])
        super().load_reduce()

    def _instantiate(self, kind: Any, arguments: Any) -> None:
        """As `load_reduce`, in the protocols 0 and 1."""
        self._charge(arguments)
        super()._instantiate(kind, arguments)

    def load_newobj(self) -> None:
        """As `load_reduce`, since protocol 2."""
        self._charge(self.stack[-1])
        super().load_newobj()

    def load_build(self) -> None:
        """Sets attributes of anything: the defaults of a function here, the memory of a tensor."""
        if type(self.stack[-2]) not in self._stateful:
            raise pickle.UnpicklingError(f"a state for a {type(self.stack[-2]).__name__}")
        super().load_build()

    def load_setitem(self) -> None:
        """Writes into anything, such as a tensor; hashes any key."""
        self._check_entries(self.stack[-3], [self.stack[-2]])
        super().load_setitem()

    def load_setitems(self) -> None:
        """As `load_setitem`."""
        self._check_entries(self.metastack[-1][-1], self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        """As `load_setitem`."""
        check_keys(self.stack[::2])
        super().load_dict()

    def load_additems(self) -> None:
        """Calls the method `add` of anything; hashes any member."""
        if not isinstance(self.metastack[-1][-1], set):
            raise pickle.UnpicklingError("members of something else than a set")
        check_keys(self.stack)
        super().load_additems()

    def load_frozenset(self) -> None:
        """Hashes any member."""
        check_keys(self.stack)
        super().load_frozenset()

    def load_bytearray8(self) -> None:
        """Takes memory for any length before it reads."""
        raise pickle.UnpicklingError("an array of bytes that can be written to")

    @staticmethod
    def _check_entries(target: Any, keys: list[Any]) -> None:
        if not isinstance(target, dict):
            raise pickle.UnpicklingError(f"entries for a {type(target).__name__}")
        check_keys(keys)

    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }
    # NEWOBJ_EX gives arguments by name, which no plain data have.
    del dispatch[pickle.NEWOBJ_EX[0]]


def check_keys(keys: Iterable[Any]) -> None:
    """Raises UnpicklingError unless all are scalars: to hash nested tuples, or huge numbers, has no end."""
    for key in keys:
        if not isinstance(key, _SCALARS) or (isinstance(key, int) and key.bit_length() > 64):
            raise pickle.UnpicklingError(f"a {type(key).__name__} as a key")


class PickledDict(dict):
    """Stands in for dictionaries with more to them, such as `OrderedDict`: takes entries, no attributes."""

    def __init__(self, pairs: Any = ()) -> None:
        """Takes the list of pairs that Python 2 writes."""
        super().__init__()
        for key, value in pairs:
            check_keys([key])
            self[key] = value

    def __setstate__(self, state: Any) -> None:
        """Leaves attributes out."""


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
    if not isinstance(text, str) or not isinstance(encoding, str) or encoding != "latin1":
        said = repr(encoding[:20]) if isinstance(encoding, str) else type(encoding).__name__
        raise pickle.UnpicklingError(f"text encoded as {said}")
    return text.encode("latin1")


def _text(value: str | bytes) -> Any:
    if not isinstance(value, str | bytes) or len(value) > 20:  # NumPy reads lists, and grammars, as types
        raise pickle.UnpicklingError("an array of an unknown type")
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
