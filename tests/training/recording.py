"""In place of CUDA's graphs, where there is no GPU: operations that are repeated without what Python does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Recording(TorchDispatchMode):
    """What a CUDA graph is: operations on tensors that stay where they are, and nothing that Python does."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__()
        self._operations: list[tuple[Any, ...]] = []
        self._before: list[tuple[Tensor, Tensor]] = []
        with self:
            work()
        with torch.no_grad():
            for tensor, value in reversed(self._before):  # a capture only records
                tensor.copy_(value)
        self._before.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        given = [*args, *kwargs.values()]
        names = [*(each.name for each in func._schema.arguments[: len(args)]), *kwargs]
        written = {
            each.name for each in func._schema.arguments if each.alias_info and each.alias_info.is_write
        }
        for each in tree_flatten(
            [value for name, value in zip(names, given, strict=True) if name in written]
        )[0]:
            self._before.append((each, each.clone()))
        results = func(*args, **kwargs)
        self._operations.append((func, args, kwargs, results))
        return results

    def __call__(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, results in self._operations:
                again = tree_flatten(func(*args, **kwargs))[0]
                for place, result in zip(tree_flatten(results)[0], again, strict=True):
                    if isinstance(place, Tensor) and not _overlap(place, result):
                        place.copy_(result)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether they lie in the same memory: views, and what is written in place."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
