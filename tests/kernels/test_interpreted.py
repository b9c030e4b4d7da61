"""The Triton kernels in Triton's interpreter: each file of interpreted/ in a process of its own.

TRITON_INTERPRET is read when Triton is imported, and changes what it can do; so never in this process. The
processes run one after the other beside the rest of the suite, from its start (see tests/conftest.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
NAMES = sorted(path.stem for path in FOLDER.glob("interpreted_*.py"))


def _interpret(name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / f"{name}.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@cache
def start() -> dict[str, Future[subprocess.CompletedProcess[str]]]:
    """Starts all files, one at a time; gives what will be their results."""
    pool = ThreadPoolExecutor(max_workers=1)
    return {name: pool.submit(_interpret, name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_in_the_interpreter(name: str) -> None:
    pytest.importorskip("triton")
    run = start()[name].result()
    assert run.returncode == 0, run.stdout + run.stderr
