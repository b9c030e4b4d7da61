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
    it replaces its language's functions, which the kernel's launch has replaced already, and looks for them
    at each launch; for each value it works out its type, numpy's name of that, and its shape as constants.
    """
    import inspect

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

    @cache
    def builtins_of(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def interpreted(member: Any) -> Any:
        return lambda *args, **named: member(*args, **named | {"_semantic": interpreter.interpreter_semantic})

    def patch_builtins(package: Any, _: Any, scope: Any) -> None:
        for name in builtins_of(package):
            scope.set_attr(package, name, interpreted(getattr(package, name)))

    interpreter._patch_builtin = patch_builtins

    make_block, made = tl.block_type.__init__, {}

    def make_shape_once(self: Any, element: Any, shape: Any) -> None:
        sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        if sizes not in made:
            make_block(self, element, shape)
            made[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element
        self.shape, self.numel, written = made[sizes]
        self.name = f"<{written}, {element}>"

    tl.block_type.__init__ = make_shape_once

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
