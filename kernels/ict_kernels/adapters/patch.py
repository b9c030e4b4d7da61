"""Names of somebody else's module set to something of ours, until undone."""

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any


class Patch:
    """What an `apply_ict_kernels_to_...` function changed. Call it, or leave its `with` block, to undo that.

    Attributes:
        changed: names that were set.
    """

    def __init__(self, changes: Mapping[tuple[Any, str], Any]) -> None:
        self.changed: list[str] = []
        self._originals: list[tuple[Any, str, Any]] = []
        for (owner, name), new in changes.items():
            if is_ours(getattr(owner, name)):
                continue  # applied before; who did that undoes it
            self._originals.append((owner, name, getattr(owner, name)))
            self.changed.append(f"{owner.__name__}.{name}")
            setattr(owner, name, new)

    def __call__(self) -> None:
        while self._originals:
            owner, name, original = self._originals.pop()
            setattr(owner, name, original)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self()


def ours(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks what a patch puts in, so that a second one leaves it alone."""
    function._ict_kernels = True  # type: ignore[attr-defined]
    return function


def is_ours(value: Any) -> bool:
    return getattr(value, "_ict_kernels", False) is True


def owners(module: Any, names: tuple[str, ...], submodule: str, what: str) -> list[Any]:
    """Of a package and its submodule, those that have the names.

    Raises:
        ValueError: if neither has: this is not the module that was meant.
    """
    found = [
        each
        for each in (module, getattr(module, submodule, None))
        if each is not None and all(hasattr(each, name) for name in names)
    ]
    if not found:
        raise ValueError(
            f"{getattr(module, '__name__', module)!r} has no {' and no '.join(names)}; pass {what}"
        )
    return found
