"""What is different in a graph that was compiled beforehand and is not found in Inductor's cache.

The key of a graph is a hash of many parts: its code, what its inputs are, every setting. Processes that
compile beforehand leave the parts of theirs beside the cache. The process that measures holds those of a
graph that it does not find against the nearest.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

_PART = re.compile(r"\[(\w+)\] (.+?): (.*)", re.DOTALL)
_SHOWN = 120  # characters, from the first that differs
Parts = dict[str, tuple[str, str]]  # by name: hash, text


def _folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "keys"


def _parts(lines: Sequence[str]) -> Parts:
    found = (_PART.match(line) for line in lines)
    return {match[2]: (match[1], match[3]) for match in found if match}


@contextmanager
def _lookups(note: Callable[[str, Sequence[str], str], None]) -> Iterator[None]:
    """Tells of each look-up in the cache meanwhile: key, parts, and "hit" or "miss"."""
    from torch._inductor.codecache import FxGraphCache

    original = FxGraphCache.load_with_key

    def load_with_key(key: str, lines: list[str], *arguments: Any, **named: Any) -> Any:
        graph, about = original(key, lines, *arguments, **named)
        note(key, lines, about.get("cache_state", ""))
        return graph, about

    FxGraphCache.load_with_key = staticmethod(load_with_key)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        FxGraphCache.load_with_key = staticmethod(original)  # type: ignore[method-assign]


@contextmanager
def kept_keys() -> Iterator[None]:
    """What is compiled meanwhile leaves the parts of its keys."""
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)

    def keep(key: str, lines: Sequence[str], state: str) -> None:
        partial = folder / f"partial-{os.getpid()}"  # processes are killed at any time
        partial.write_text(json.dumps(list(lines)))
        partial.replace(folder / key)

    with _lookups(keep):
        yield


@contextmanager
def explained_misses() -> Iterator[Counter[str]]:
    """Says on stderr of every graph that is not found in which parts the nearest kept one is another.

    Yields:
        How many graphs differ in each part; where no key was kept, nothing.
    """
    kept: list[Parts] = []
    differing: Counter[str] = Counter()

    def explain(key: str, lines: Sequence[str], state: str) -> None:
        if state != "miss":
            return
        if not kept:
            kept.extend(_parts(json.loads(path.read_text())) for path in sorted(_folder().glob("f*")))
        parts = _parts(lines)
        unlike = min((_differences(parts, each) for each in kept), key=len, default={})
        differing.update(unlike.keys())
        for name, (ours, theirs) in unlike.items():
            _say_once(f"    not in the cache: {name} is {ours!r}, beforehand {theirs!r}")

    with _lookups(explain):
        yield differing


def _differences(parts: Mapping[str, tuple[str, str]], others: Parts) -> dict[str, tuple[str, str]]:
    """By the name of the part, both texts from where they differ."""
    found = {}
    for name in {**parts, **others}:
        (ours, text), (theirs, other) = parts.get(name, ("", "")), others.get(name, ("", ""))
        if ours != theirs:
            pairs = enumerate(zip(text, other, strict=False))
            start = next((place for place, (a, b) in pairs if a != b), min(len(text), len(other)))
            found[name] = text[start : start + _SHOWN], other[start : start + _SHOWN]
    return found


@cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
