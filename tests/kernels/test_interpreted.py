"""The Triton kernels in Triton's interpreter: each file of interpreted/ in a process of its own.

TRITON_INTERPRET is read when Triton is imported, and changes what it can do; so never in this process. The
processes run beside the rest of the suite (see tests/conftest.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "interpreted"
NAMES = sorted(path.stem for path in FOLDER.glob("interpreted_*.py"))


def _interpret(name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / f"{name}.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def beside() -> dict[str, Callable[[], subprocess.CompletedProcess[str]]]:
    """What runs beside all other tests."""
    return {name: partial(_interpret, name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_in_the_interpreter(name: str, done_beside: Callable[[str], Any]) -> None:
    pytest.importorskip("triton")
    run = done_beside(name)
    assert run.returncode == 0, run.stdout + run.stderr
