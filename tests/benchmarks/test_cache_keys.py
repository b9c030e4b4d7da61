"""Why a graph is not found in Inductor's cache: the part of its key that is another one is named."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from torch._inductor.codecache import FxGraphCache

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

cache_keys: Any = importlib.import_module("cache_keys")


def test_the_part_that_is_another_one_is_said_once_and_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    states = iter(("miss", "miss", "hit", "miss", "miss"))
    look_up = staticmethod(lambda *arguments, **named: (None, {"cache_state": next(states)}))
    monkeypatch.setattr(FxGraphCache, "load_with_key", look_up)
    code, seed = "[aa] gm: def forward(x):\n    return x", "[bb] example_inputs[7]: storage_offset={}"

    def asked(key: str, *parts: str) -> Any:
        return FxGraphCache.load_with_key(key, list(parts), [], local=True)

    with cache_keys.kept_keys():
        asked("f1", code, seed.format(0))
        asked("f2", code.replace("aa", "cc"), "[dd] example_inputs[7]: requires_grad=True")
    with cache_keys.explained_misses() as unlike:
        asked("f1", code, seed.format(0))
        for key in ("f3", "f4"):
            assert asked(key, code, seed.format(64).replace("bb", "ee")) == (None, {"cache_state": "miss"})
    assert FxGraphCache.load_with_key is look_up.__func__
    assert unlike == {"example_inputs[7]": 2}
    said = capsys.readouterr().err
    assert said == "    not in the cache: example_inputs[7] is '64', beforehand '0'\n"
