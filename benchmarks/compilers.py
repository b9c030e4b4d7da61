"""What compiles for run_gpu.py: which assembler, which caches, and processes that compile beforehand.

Compiling takes most of the time that a measurement on a new machine takes, and one core of it. So other
processes, a core each, run what is to be measured once, on whatever stands in memory; the caches on the disk
hand on what they compiled. They have ended their work, or are ended, before anything is timed.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import multiprocessing
import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from functools import cache
from pathlib import Path

_ASSEMBLER = "TRITON_PTXAS_PATH"


def settle() -> None:
    """Makes one assembler and one set of caches serve all that is compiled, in child processes too.

    By itself Triton takes the ptxas that it brings until Inductor has compiled a first kernel, then torch's;
    its cache, which asks for the version once, does not tell apart what the two made. And Inductor moves
    Triton's cache into a folder of its own, where it does not find what was compiled before. To be called
    before either is imported. What is set already stays.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ict-fast/run_gpu"
    os.environ.setdefault("TRITON_CACHE_DIR", str(home / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home / "inductor"))
    torchs = _folder_of("torch") / "bin/ptxas"
    if os.access(torchs, os.X_OK):
        os.environ.setdefault(_ASSEMBLER, str(torchs))
        os.environ.setdefault("TRITON_PTXAS_BLACKWELL_PATH", str(torchs))


def assembler() -> str | None:
    """The version of the ptxas that Triton runs, such as "13.0.88 (torch's)"; None where there is none."""
    try:
        tritons = str(_folder_of("triton") / "backends/nvidia/bin/ptxas")
        path = os.environ.get(_ASSEMBLER, tritons)
        printed = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    version = re.search(r"V([\d.]+)", printed)
    return f"{version[1] if version else printed.strip()} ({'Triton' if path == tritons else 'torch'}'s)"


def _folder_of(package: str) -> Path:
    """Where a package is installed, which is not imported; OSError if it is not."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{package} is not installed")
    return Path(spec.origin).parent


def compile_beside(work: Sequence[Callable[[], object]], seconds: float) -> list[str]:
    """Runs pieces of work in other processes, in their order, for what they leave in the caches.

    Args:
        work: functions of modules, with their arguments by `partial`.
        seconds: after which what has not ended is given up, and its process killed.
    Returns:
        Of each "ended", "given up", or the error that ended it.
    """
    found = ["given up"] * len(work)
    to_come, running = iter(enumerate(work)), dict[Future[object], tuple[int, int]]()

    def begin(lane: int) -> None:
        for number, each in to_come:
            try:
                future = _lanes()[lane].submit(each)
            except BrokenExecutor:  # its process died while it had no work
                _lanes()[lane] = _lane()
                future = _lanes()[lane].submit(each)
            running[future] = number, lane
            return

    for lane in range(len(_lanes())):
        begin(lane)
    deadline = time.monotonic() + max(1.0, seconds)
    while running:
        done, _ = wait(running, timeout=max(0.0, deadline - time.monotonic()), return_when=FIRST_COMPLETED)
        if not done:
            dismiss(kill=True)
            break
        for future in done:
            number, lane = running.pop(future)
            found[number] = _outcome(future)
            begin(lane)
    return found


def _outcome(future: Future[object]) -> str:
    error = future.exception()
    return "ended" if error is None else f"{type(error).__name__}: {error}".splitlines()[0]


def dismiss(kill: bool = False) -> None:
    """Ends the processes, which hold memory of the GPU; the next work starts others.

    Args:
        kill: do not wait for what they are at.
    """
    if _lanes.cache_info().currsize:
        lanes = _lanes()
        _lanes.cache_clear()
        for child in multiprocessing.active_children() if kill else ():
            child.kill()
        for each in lanes:
            each.shutdown(cancel_futures=True)


@cache
def _lanes() -> list[ProcessPoolExecutor]:
    return [_lane() for _ in range(max(1, min(12, (os.cpu_count() or 2) - 2)))]


def _lane() -> ProcessPoolExecutor:
    """A pool of one process: of a larger one, a process that crashes takes the work of all others along."""
    return ProcessPoolExecutor(1, initializer=_alone, mp_context=multiprocessing.get_context("spawn"))


def _alone() -> None:
    """Without processes of its own; and which of Inductor's variants is fastest is not found on a GPU that
    others use. A process that crashes says where.
    """
    faulthandler.enable()
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1
    torch._inductor.config.autotune_local_cache = False
