"""The Triton kernels in Triton's interpreter: each file of interpreted/ in a process of its own.

TRITON_INTERPRET is read when Triton is imported, and changes what it can do; so never in this process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
NAMES = sorted(path.stem for path in FOLDER.glob("interpreted_*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_in_the_interpreter(name: str) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / f"{name}.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
