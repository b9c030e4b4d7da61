"""Small pickles that would take memory or time without end, or alter what they reach: refused, at once."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

MEGABYTE = 2**20
# Reads every file with at most half a gigabyte more than the libraries take.
READ = """
import json, resource, sys
from pathlib import Path
from ict_fast.errors import InputError
from ict_fast.interop import edm_pickle
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**29
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
lines = {}
for file in sorted(Path(sys.argv[1]).iterdir()):
    try:
        edm_pickle.read_pickled_network(file)
        lines[file.name] = "read"
    except InputError as error:
        lines[file.name] = str(error)
lines["defaults"] = str(edm_pickle._rebuild_tensor.__defaults__)
print(json.dumps(lines))
"""


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _bytes(content: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(content)) + content


def _called_often(module: str, name: str, argument: bytes, more: bytes = b"", times: int = 3000) -> bytes:
    """A list of results of one function, of an argument that is in the file once."""
    kept = argument + b"q\x000" + _name(module, name) + b"q\x010"
    return b"\x80\x03" + kept + b"](" + (b"h\x01(h\x00" + more + b"tR") * times + b"e."


def _nested_tuples(depth: int) -> bytes:
    """(x, x), where x is (y, y), and so on."""
    return b")" + b"2\x86" * depth


def _modules(depth: int) -> bytes:
    """A module that is in the next one twice, and so on."""

    def module(content: bytes) -> bytes:
        state = b"}" + _text("_modules") + content + b"s"
        meta = b"}(" + _text("version") + b"K\x06" + _text("class_name") + _text("A") + _text("state")
        return _name("torch_utils.persistence", "_reconstruct_persistent_obj") + meta + state + b"u\x85R"

    inner = module(b"}")
    for _ in range(depth):
        inner += b"q\x010" + module(b"}(" + _text("a") + b"h\x01" + _text("b") + b"h\x01u")
    return b"\x80\x03}" + _text("ema") + inner + b"s."


HOSTILE = {
    "a memo of two billion places": (b"\x80\x03Nr" + struct.pack("<I", 2**31) + b".", "holds no network"),
    "nested tuples as a key": (b"\x80\x03}" + _nested_tuples(60) + b"Ns.", "a tuple as a key"),
    "nested tuples as keys": (b"\x80\x03}(" + _nested_tuples(60) + b"Nu.", "a tuple as a key"),
    "nested tuples as keys of protocol 0": (b"(" + _nested_tuples(60) + b"Nd.", "a tuple as a key"),
    "nested tuples in a set": (b"\x80\x04\x8f(" + _nested_tuples(60) + b"\x90.", "a tuple as a key"),
    "nested tuples in a frozen set": (b"\x80\x04(" + _nested_tuples(60) + b"\x91.", "a tuple as a key"),
    "nested tuples in a set that is called": (
        b"\x80\x03" + _name("__builtin__", "set") + b"](" + _nested_tuples(60) + b"e\x85R.",
        "a tuple as a key",
    ),
    "nested tuples as keys of pairs": (
        b"\x80\x03" + _name("collections", "OrderedDict") + b"](" + _nested_tuples(60) + b"N\x86e\x85R.",
        "a tuple as a key",
    ),
    "nested tuples in a message": (
        b"\x80\x03" + _name("_codecs", "encode") + b"(" + _text("a") + _nested_tuples(60) + b"tR.",
        "text encoded as tuple",
    ),
    "a number of a megabyte as a key": (
        b"\x80\x03}\x8b" + struct.pack("<I", MEGABYTE) + b"\x01" * MEGABYTE + b"Ns.",
        "a int as a key",
    ),
    "modules in modules": (_modules(60), "a module that is there twice"),
    "sizes of a megabyte": (_called_often("torch", "Size", _bytes(bytes(MEGABYTE))), "unknown shape"),
    "sets of the same list": (
        _called_often("builtins", "set", b"](" + b"N" * MEGABYTE + b"e"),
        "copied over and over",
    ),
    "texts to encode": (
        _called_often("_codecs", "encode", _text("a" * MEGABYTE), _text("latin1")),
        "copied over and over",
    ),
    "tensors of the same bytes": (
        _called_often("torch.storage", "_load_from_bytes", _bytes(pickle.dumps(0, 2) * 2**16)),
        "a tensor in an unknown form",
    ),
    "bytes that can be written to": (b"\x80\x05\x96" + struct.pack("<Q", 2**31) + b".", "written to"),
    "the defaults of a function": (
        b"\x80\x03" + _name("torch._utils", "_rebuild_tensor_v2") + b"N}"
        + _text("__defaults__") + _text("altered") + b"\x85s\x86b.",
        "a state for a function",
    ),
    "the methods of a dictionary": (
        b"\x80\x03" + _name("collections", "OrderedDict") + b")R}" + _text("get") + b"Nsb.",
        "holds no network",
    ),
}  # fmt: skip


class _WithState:
    """A tensor that is given a state: its storage, which can grow, with another shape."""

    def __init__(self, tensor: torch.Tensor, state: tuple) -> None:
        self.tensor, self.state = tensor, state

    def __reduce__(self) -> tuple:
        function, arguments = self.tensor.__reduce_ex__(4)[:2]
        return function, arguments, self.state


def test_small_hostile_pickles_are_refused_at_once(
    published: ModuleType, snapshot: Callable, tmp_path: Path
) -> None:
    for name, (content, _) in HOSTILE.items():
        (tmp_path / name).write_bytes(content)
    grown = _WithState(torch.zeros(1), (torch.zeros(0), 0, (2**26,), (1,)))
    shape = published.Shape("ddpmpp", classes=0)
    (tmp_path / "memory of others").write_bytes(
        snapshot(published.edm_weights(shape), shape, "ECMPrecond", extra=grown)
    )
    (tmp_path / "good").write_bytes(snapshot(published.edm_weights(shape), shape, "ECMPrecond"))
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    lines = json.loads(done.stdout)
    assert lines.pop("good") == "read"
    assert lines.pop("defaults") == "None"
    expected = {name: reason for name, (_, reason) in HOSTILE.items()}
    expected["memory of others"] = "a state for a Tensor"
    assert lines.keys() == expected.keys()
    for name, line in lines.items():
        assert expected[name] in line, (name, line)
        assert line.startswith(str(tmp_path / name)), "the message does not name the file"


def test_a_tensor_of_the_same_bytes_many_times_is_refused(snapshot: Callable) -> None:
    """Three thousand storages of a megabyte out of two."""
    import io

    from ict_fast.errors import InputError
    from ict_fast.interop.edm_pickle import _allowed
    from ict_fast.restricted_unpickler import load_restricted

    storage = io.BytesIO()
    torch.save(torch.zeros(MEGABYTE // 4).untyped_storage(), storage, _use_new_zipfile_serialization=False)
    content = _called_often("torch.storage", "_load_from_bytes", _bytes(storage.getvalue()))
    with pytest.raises(InputError, match="copied over and over"):
        load_restricted(io.BytesIO(content), _allowed("a tensor"), name="a.pkl")
