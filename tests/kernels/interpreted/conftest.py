"""These files run under TRITON_INTERPRET=1 alone: ../test_interpreted.py starts them."""

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ict_kernels.triton_support import INTERPRETED

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED and any(item.path.parent == FOLDER for item in items):
        raise pytest.UsageError("set TRITON_INTERPRET=1, or run tests/kernels/test_interpreted.py")


def remember_what_is_patched() -> None:
    """At each call of each function Triton's interpreter looks through all of `triton.language` for what it
    has to replace, which takes half of these tests' time. Here it looks once.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @cache
    def names_in(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in names_in(package):
            member = getattr(package, name)
            if is_builtin(member):  # else it has been replaced already
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


if INTERPRETED:
    remember_what_is_patched()
