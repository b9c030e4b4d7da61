"""The Triton kernels in Triton's interpreter: the files of interpreted/, in one process of their own.

TRITON_INTERPRET is read when Triton is imported, and changes what it can do; so never in this process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


def test_all_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    files = [str(path) for path in sorted(FOLDER.glob("interpreted_*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
