"""These files run under TRITON_INTERPRET=1 alone: ../test_interpreted.py starts them."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ict_kernels.triton_support import INTERPRETED

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED and any(item.path.parent == FOLDER for item in items):
        raise pytest.UsageError("set TRITON_INTERPRET=1, or run tests/kernels/test_interpreted.py")


def do_without_what_changes_nothing() -> None:
    """Triton's interpreter spends most of these tests' time on what it need not do: at each sum of integers
    it computes whether it overflows, which it looks at in debug mode alone; at each call inside of a kernel
    it replaces its language's functions, which the kernel's launch has replaced already; for each value it
    works out numpy's name of its type, and its shape as constants.
    """
    import triton.language as tl
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    builder, patch = interpreter.interpreter_builder, interpreter._patch_lang
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)

    @cache
    def languages(fn: Any) -> list[Any]:
        return [module for module in (tl, tl.core) if any(module is each for each in fn.__globals__.values())]

    def patch_once(fn: Any) -> Any:
        to_do = any(is_builtin(language.load) for language in languages(fn))
        return patch(fn) if to_do else interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once

    numpy_type = interpreter._get_np_dtype
    of_scalars = cache(numpy_type)
    interpreter._get_np_dtype = lambda of: numpy_type(of) if of.scalar.is_ptr() else of_scalars(of.scalar)

    @cache
    def constants(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))

    def keep(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = constants(tuple(type.shape) if type.is_block() else ())

    tl.tensor.__init__ = keep


if INTERPRETED:
    do_without_what_changes_nothing()
