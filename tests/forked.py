"""Python's programs in processes of their own that have torch imported already, which takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *("torch._dynamo", "ict_fast.cli", "ict_fast.training.trainer", "ict_fast.evaluation"),
        *("sklearn.datasets", "torchmetrics.image.kid", "typeguard", "pytest"),
    ]
)


class ForkedPython:
    """`python WORDS...`, its output and errors in one file, with the methods of subprocess.Popen.

    All share what an interpreter begins with: the order of sets, and what libraries read of the environment
    when they are imported. At its end there is no `atexit`.
    """

    def __init__(self, words: Sequence[str | Path], output: Path, cwd: Path | None = None) -> None:
        output.unlink(missing_ok=True)
        self._output = output
        arguments = ([str(word) for word in words], output, cwd or Path.cwd(), dict(os.environ))
        self._process = _CONTEXT.Process(target=_run, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """As Popen's, but up to date."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            self.kill()  # else Python would wait for it at its end
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0, self.output().encode())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self.output(), None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def output(self) -> str:
        """Until now."""
        return self._output.read_text() if self._output.exists() else ""


def _run(words: list[str], output: Path, cwd: Path, environment: dict[str, str]) -> None:
    resource_tracker._resource_tracker._fd = None  # a program starts its own, see ict_fast/children.py
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
