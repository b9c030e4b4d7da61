"""The network in a pickle of EDM or ECT, without the program that such a pickle carries.

EDM saves its modules with the source code of their classes, which `pickle.load` would execute. Here a module
becomes its class's name and its attributes, a tensor is rebuilt from its bytes, and the source stays text.
"""

from __future__ import annotations

import functools
import io
import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ict_fast.errors import InputError
from ict_fast.interop.files import LEGACY_TORCH, check_extent
from ict_fast.restricted_unpickler import ARRAYS, NUMBERS, PickledDict, check_keys, load_restricted

_LONGEST_NAME = 1000
_MOST_DIMENSIONS = 8
_PERSISTENCE_VERSION = 6  # of EDM's torch_utils/persistence.py
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


@dataclass
class PickledModule:
    """A module as data."""

    class_name: str
    attributes: dict[str, Any] = field(default_factory=dict)

    def __setstate__(self, state: Any) -> None:
        """The unpickler gives torch's own containers, and our loss, their attributes."""
        if not isinstance(state, dict):
            raise pickle.UnpicklingError("a module whose state is no dictionary")
        self.attributes = state

    def children(self) -> dict[str, PickledModule]:
        """The modules directly inside of this one."""
        return {
            name: module
            for name, module in self._entries("_modules").items()
            if isinstance(module, PickledModule)
        }

    def modules(self, prefix: str = "") -> Iterator[tuple[str, PickledModule]]:
        """This module and all inside of it, by dotted name; refused where one is inside of two, or too deep.

        Raises:
            UnpicklingError: a tree that only pretends to be one could have any number of branches.
        """
        seen: set[int] = set()
        waiting = [(prefix, self)]
        while waiting:
            name, module = waiting.pop()
            containers = [module.attributes.get(kind) for kind in ("_modules", "_parameters", "_buffers")]
            met = [id(each) for each in (module, *containers) if each is not None]
            if not seen.isdisjoint(met) or len(set(met)) < len(met):
                raise pickle.UnpicklingError("a module that is there twice")
            seen.update(met)
            if len(name) > _LONGEST_NAME:
                raise pickle.UnpicklingError(f"a module with a name of {len(name):,} characters")
            yield name, module
            children = [
                (f"{name}.{inner}" if name else inner, child) for inner, child in module.children().items()
            ]
            waiting += reversed(children)

    def tensors(self) -> dict[str, Tensor]:
        """The state dict: parameters and buffers by dotted name."""
        found = {}
        for prefix, module in self.modules():
            for kind in ("_parameters", "_buffers"):
                for name, tensor in module._entries(kind).items():
                    if isinstance(tensor, Tensor):
                        found[f"{prefix}.{name}" if prefix else name] = tensor
        return found

    def _entries(self, kind: str) -> dict[str, Any]:
        entries = self.attributes.get(kind) or {}
        if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
            raise pickle.UnpicklingError(f"a module whose {kind} are no dictionary of names")
        return entries


def read_pickled_network(path: Path) -> PickledModule:
    """The network of a file of EDM or ECT: of its averaged weights, the entry `ema`, if it has one.

    Raises:
        InputError: a file that is truncated, malformed, holds no network, or asks for anything else than
            tensors, plain containers and EDM's modules, by its name.
    """
    try:
        with path.open("rb") as file:
            content = load_restricted(file, _allowed(f"{path}: a tensor"), name=str(path))
        network = content.get("ema", content.get("net")) if isinstance(content, dict) else content
        if not isinstance(network, PickledModule):
            raise InputError(f"{path}: holds no network; EDM's snapshots have one under the name ema")
        for name, tensor in network.tensors().items():
            check_extent(path, name, tensor)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (pickle.UnpicklingError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"{path}: not a network that can be read ({why})") from None
    return network


def holds_network(path: Path) -> bool:
    """Whether a file is a snapshot of EDM or ECT, whole and harmless."""
    try:
        read_pickled_network(path)
    except InputError:
        return False
    return True


class _Storage:
    """The numbers of a tensor, flat, of one type."""

    def __init__(self, content: Tensor) -> None:
        self.content = content


def _persistent_object(meta: Any) -> PickledModule:
    """In place of EDM's `_reconstruct_persistent_obj`, which would execute meta's `module_src`."""
    if not isinstance(meta, dict) or not isinstance(meta.get("class_name"), str):
        raise pickle.UnpicklingError("an object of EDM without a class")
    if meta.get("version") != _PERSISTENCE_VERSION:
        raise pickle.UnpicklingError("another version of EDM's persistence than 6")
    module = PickledModule(meta["class_name"])
    module.__setstate__(meta.get("state") or {})
    return module


def _method(owner: Any, name: Any) -> None:
    """In place of `getattr`, by which bound methods are pickled, such as the schedule of ECT's loss.

    Looks nothing up: no method is needed here.
    """
    if not isinstance(owner, PickledModule) or not isinstance(name, str):
        raise pickle.UnpicklingError("an attribute of something else than EDM's objects")


def _container(class_name: str) -> type[PickledModule]:
    """A class to stand in for one of torch.nn's, or our loss; the unpickler makes it without arguments."""

    class Container(PickledModule):
        def __new__(cls) -> Container:
            module = super().__new__(cls)
            module.class_name, module.attributes = class_name, {}
            return module

    return Container


def _load_storage(name: str, content: Any) -> _Storage:
    """In place of `torch.storage._load_from_bytes`: a storage as torch.save wrote it before it wrote ZIPs.

    Five pickles, then for each storage the number of its elements and their bytes.

    Args:
        name: of what is read, for messages.
        content: as it was pickled.
    """
    if not isinstance(content, bytes) or not content.startswith(LEGACY_TORCH):
        raise pickle.UnpicklingError("a tensor in an unknown form")
    file = io.BytesIO(content)
    described: list[tuple[torch.dtype, int]] = []

    def describe(reference: Any) -> None:
        kind, dtype, _, _, count = reference[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(count, int):
            raise pickle.UnpicklingError("a storage of an unknown kind")
        described.append((dtype, count))

    for _ in range(3):  # magic number, protocol, byte order and sizes
        load_restricted(file, {}, name=name)
    load_restricted(file, _STORAGES, name=name, persistent_load=describe)
    load_restricted(file, {}, name=name)
    if len(described) != 1:
        raise pickle.UnpicklingError("a tensor of several storages")
    dtype, count = described[0]
    stored = int.from_bytes(file.read(8), "little")
    data = file.read()
    if stored != count or len(data) != count * dtype.itemsize:
        raise pickle.UnpicklingError(f"a tensor that claims {count:,} numbers and holds {len(data):,} bytes")
    if not count:
        return _Storage(torch.empty(0, dtype=dtype))
    return _Storage(torch.frombuffer(bytearray(data), dtype=dtype))


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """In place of `torch._utils._rebuild_tensor_v2`; within the storage."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
        raise pickle.UnpicklingError("a tensor of an unknown shape")
    if len(size) != len(stride) or len(size) > _MOST_DIMENSIONS:
        raise pickle.UnpicklingError("a tensor of an unknown shape")
    last = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= storage.content.numel():
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(size)} that reaches beyond its numbers")
    return storage.content.as_strided(size, stride, offset)


def _rebuild_parameter(tensor: Any, *_: Any) -> Tensor:
    """In place of `torch._utils._rebuild_parameter`: the tensor itself."""
    if not isinstance(tensor, Tensor):
        raise pickle.UnpicklingError("a parameter that is no tensor")
    return tensor


def _size(extents: Any) -> tuple:
    """In place of `torch.Size`."""
    if not isinstance(extents, tuple | list) or len(extents) > _MOST_DIMENSIONS:
        raise pickle.UnpicklingError("a tensor of an unknown shape")
    return tuple(extents)


def _set(members: Any = ()) -> set:
    check_keys(members)
    return set(members)


_STORAGES = {("torch", name): dtype for name, dtype in _DTYPES.items()} | {
    ("torch.storage", "UntypedStorage"): torch.uint8
}
_CONTAINERS = ("ModuleDict", "ModuleList", "Sequential")
_ALLOWED: Mapping[tuple[str, str], Any] = (
    dict(ARRAYS)
    | dict(NUMBERS)
    | _STORAGES
    | {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
        ("dnnlib.util", "EasyDict"): PickledDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("collections", "OrderedDict"): PickledDict,
        ("builtins", "set"): _set,
        ("__builtin__", "set"): _set,
        ("builtins", "getattr"): _method,
        ("__builtin__", "getattr"): _method,
        ("torch", "Size"): _size,
        ("ict_kernels.adapters.ect", "ECMLoss"): _container("ECMLoss"),  # the loss_fn of trainers that use it
    }
    | {("torch.nn.modules.container", name): _container(name) for name in _CONTAINERS}
)


def _allowed(tensor: str) -> Mapping[tuple[str, str], Any]:
    """What a snapshot may name; `tensor` is what messages call one in it."""
    return {**_ALLOWED, ("torch.storage", "_load_from_bytes"): functools.partial(_load_storage, tensor)}
