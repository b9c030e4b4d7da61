"""A pickle gives back plain data, or is refused by the name of what it asks for; it never runs anything."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from ict_fast.errors import InputError
from ict_fast.restricted_unpickler import ARRAYS, NUMBERS, PickledArray, load_restricted

PLAIN = {"a": [1, 2.5, None, True], b"b": ("text", b"bytes"), "c": {3, 4}, "d": 2**70}


def load(content: bytes, allowed: dict | None = None, **options: str) -> object:
    return load_restricted(
        io.BytesIO(content), ARRAYS if allowed is None else allowed, name="a.pkl", **options
    )


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_come_back_in_every_protocol(protocol: int) -> None:
    plain = PLAIN if protocol >= 4 else {"a": PLAIN["a"], "d": PLAIN["d"]}  # sets and bytes are globals there
    assert load(pickle.dumps(plain, protocol), {}) == plain


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([1, -2, 300], dtype=">i4"),
        np.array([True, False]),
        np.float32([[0.5]]),
    ],
    ids=lambda array: str(array.dtype),
)
def test_arrays_of_numbers_come_back_in_every_protocol(array: np.ndarray, protocol: int) -> None:
    loaded = load(pickle.dumps({"data": array}, protocol))
    assert isinstance(loaded["data"], PickledArray)
    np.testing.assert_array_equal(loaded["data"].array, array)
    assert loaded["data"].array.dtype == array.dtype


def test_text_of_python_2_may_stay_bytes() -> None:
    python_2 = b"\x80\x02}q\x01U\x06labelsq\x02]q\x03(K\x06K\x09es."
    assert load(python_2, encoding="bytes") == {b"labels": [6, 9]}
    assert load(python_2) == {"labels": [6, 9]}


class _Payload:
    def __init__(self, function: object, *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.reduced


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_call_of_the_system_is_refused_by_name_and_not_made(tmp_path: Path, protocol: int) -> None:
    proof = tmp_path / "executed"
    hostile = pickle.dumps({"data": _Payload(os.system, f"touch {proof}")}, protocol)
    with pytest.raises(InputError, match=r"a\.pkl: refused, it asks for '(posix|os)\.system'") as caught:
        load(hostile)
    assert not proof.exists()
    assert "\n" not in str(caught.value)
    pickle.loads(hostile)  # the payload is live: without the restriction it runs
    assert proof.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"),
        ("__builtin__", "eval"),  # Python 2's name, which Python 3 would translate
        ("numpy", "load"),
        ("numpy", "ndarray.tofile"),  # protocol 4 follows dots
        ("numpy.core.multiarray", "scalar"),
        ("torch.storage", "_load_from_bytes"),
        ("os\nos", "system"),
    ],
)
def test_what_is_not_on_the_list_is_refused_even_beside_what_is(module: str, name: str) -> None:
    stack_global = b"\x80\x04" + b"".join(
        b"\x8c" + bytes([len(word)]) + word.encode() for word in (module, name)
    )
    with pytest.raises(InputError, match="refused, it asks for") as caught:
        load(stack_global + b"\x93.")
    assert repr(f"{module}.{name}") in str(caught.value)


def test_the_caller_chooses_what_a_name_leads_to() -> None:
    content = pickle.dumps(_Payload(os.getcwd), 2)
    module = "posix" if b"posix" in content else "os"
    assert load(content, {(module, "getcwd"): lambda: "a stand-in"}) == "a stand-in"


@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param(np.array([[1], "x"], dtype=object), id="objects"),
        pytest.param(np.array(["text"]), id="text"),
        pytest.param(np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]), id="records"),
        pytest.param(np.array(["2020-01-01"], dtype="M8[D]"), id="dates"),
        pytest.param(np.dtype("V8"), id="raw memory"),
    ],
)
def test_arrays_of_other_things_than_numbers_are_refused(hostile: object) -> None:
    with pytest.raises(InputError, match=r"a\.pkl: truncated, or not a pickle that can be read"):
        load(pickle.dumps(hostile, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"c_codecs\nencode\n(Vtext\nVutf-7\ntR.", "text encoded as 'utf-7'"),
        (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I0\ntVb\ntR.",
            "an array of an unknown class",
        ),
    ],
)
def test_what_is_on_the_list_is_called_for_arrays_alone(content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(content)


# A type whose state says that its eight bytes are an object. NumPy 2.4 takes the bytes for its address, and
# printing what `pickle.loads` gives for V8 is a segmentation fault.
FORGED = (
    b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85c_codecs\nencode\n"
    b"X\x01\x00\x00\x00bX\x06\x00\x00\x00latin1\x86R\x87R(K\x01K\x01\x85cnumpy\ndtype\nX\x02\x00\x00\x00%b"
    b"\x89\x88\x87R(K\x03X\x01\x00\x00\x00|NX\x01\x00\x00\x00a\x85}X\x01\x00\x00\x00acnumpy\ndtype\n"
    b"X\x02\x00\x00\x00O8\x89\x88\x87RK\x00\x86sK\x08K\x08K\x00tb\x89c_codecs\nencode\n"
    b"X\x08\x00\x00\x00AAAAAAAAX\x06\x00\x00\x00latin1\x86Rtb."
)


@pytest.mark.parametrize("type_name", [b"V8", b"u8", b"O8"])
def test_a_forged_type_that_crashes_numpy_itself_is_refused(type_name: bytes) -> None:
    with pytest.raises(InputError, match=r"an array of (object|\|V8)"):
        load(FORGED % type_name)


WHOLE = pickle.dumps({"data": np.arange(12, dtype=np.uint8), "labels": [1, 2, 3]}, 2)


def test_a_pickle_cut_anywhere_is_one_clear_line() -> None:
    for length in range(len(WHOLE)):
        with pytest.raises(InputError, match=r"^a\.pkl: truncated"):
            load(WHOLE[:length])


def test_a_byte_changed_anywhere_gives_data_or_one_clear_line() -> None:
    refused = []
    for position in range(len(WHOLE)):
        for change in (1, 0x40, 0xFF):
            damaged = bytearray(WHOLE)
            damaged[position] ^= change
            try:
                load(bytes(damaged))
            except InputError as error:
                refused.append(str(error))
    assert len(refused) > len(WHOLE)
    assert all(line.startswith("a.pkl: ") and "\n" not in line for line in refused)


def test_a_length_beyond_the_file_costs_no_memory() -> None:
    with pytest.raises(InputError, match="truncated"):
        load(b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.")


def test_a_file_that_cannot_be_read_says_so() -> None:
    class Broken(io.BytesIO):
        def read(self, size: int = -1) -> bytes:
            raise OSError(5, "Input/output error")

        readline = readinto = read

    with pytest.raises(InputError, match=r"a\.pkl: cannot be read: Input/output error"):
        load_restricted(Broken(), {}, name="a.pkl")


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("number", [np.float64(0.5), np.float32(-2), np.int64(2**40), np.bool_(True)])
def test_scalars_of_numpy_are_numbers_of_python(number: np.generic, protocol: int) -> None:
    loaded = load(pickle.dumps([number], protocol), dict(ARRAYS) | dict(NUMBERS))
    assert loaded == [number.item()]
    assert type(loaded[0]) is type(number.item())


def test_a_scalar_of_something_else_is_refused() -> None:
    with pytest.raises(InputError, match="truncated, or not a pickle that can be read"):
        load(pickle.dumps(np.datetime64("2020-01-01"), 2), dict(ARRAYS) | dict(NUMBERS))


class _Outside(pickle.Pickler):
    def persistent_id(self, value: object) -> object:
        return ("outside", str(value)) if isinstance(value, complex) else None


def test_references_to_the_outside_go_to_the_caller_or_are_refused() -> None:
    file = io.BytesIO()
    _Outside(file, 2).dump([1, 2j])
    loaded = load_restricted(
        io.BytesIO(file.getvalue()), {}, name="a.pkl", persistent_load=lambda reference: reference
    )
    assert loaded == [1, ("outside", "2j")]
    with pytest.raises(InputError, match="refers to something outside"):
        load(file.getvalue())
