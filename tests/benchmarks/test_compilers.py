"""What compiles for run_gpu.py: one assembler, one set of caches, and processes that end when they must."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, wait
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

compilers: Any = importlib.import_module("compilers")

NAMES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A torch and a Triton, each with a ptxas of another version, and an environment that names none."""
    for path, version in (("torch/bin", "13.0.88"), ("triton/backends/nvidia/bin", "12.8.93")):
        (tmp_path / path).mkdir(parents=True)
        ptxas = tmp_path / path / "ptxas"
        ptxas.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release 1, V{version}'\n")
        ptxas.chmod(0o755)
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what is set below is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compilers, "_folder_of", lambda package: tmp_path / package)
    return tmp_path


def test_torchs_assembler_is_taken_where_there_is_one_and_tritons_where_not(installed: Path) -> None:
    assert compilers.assembler() == "12.8.93 (Triton's)"
    compilers.settle()
    assert compilers.assembler() == "13.0.88 (torch's)"
    assert os.environ["TRITON_PTXAS_BLACKWELL_PATH"] == os.environ["TRITON_PTXAS_PATH"]
    (installed / "torch/bin/ptxas").unlink()
    del os.environ["TRITON_PTXAS_PATH"]
    compilers.settle()
    assert compilers.assembler() == "12.8.93 (Triton's)"


def test_caches_lie_apart_and_what_the_environment_says_stays(installed: Path) -> None:
    os.environ["TRITON_CACHE_DIR"] = "/somewhere"
    compilers.settle()
    assert os.environ["TRITON_CACHE_DIR"] == "/somewhere"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(installed / "cache/ict-fast/run_gpu/inductor")


def test_run_gpu_settles_the_compilers_before_it_imports_torch() -> None:
    text = (ROOT / "benchmarks/run_gpu.py").read_text()
    assert 0 < text.index("compilers.settle()") < text.index("\nimport torch")


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "_alone", os.getpid)


@pytest.mark.usefixtures("without_torch")
def test_what_has_not_ended_in_time_is_named_and_its_process_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def until_one_has_ended(futures: Any, **options: Any) -> Any:
        if (tmp_path / "first").exists():
            return set(), set(futures)
        return wait(futures, return_when=FIRST_COMPLETED)

    monkeypatch.setattr(compilers, "wait", until_one_has_ended)
    work = [partial((tmp_path / "first").touch), partial(time.sleep, 600.0)]
    assert compilers.compile_beside(work, 1.0) == ["ended", "given up"]
    assert (tmp_path / "first").exists()
    assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("without_torch")
def test_work_that_fails_or_crashes_says_so_and_the_next_work_is_done(tmp_path: Path) -> None:
    [failed] = compilers.compile_beside([partial(os.rmdir, tmp_path / "absent")], 60.0)
    assert failed.startswith("FileNotFoundError: ")
    [crashed] = compilers.compile_beside([partial(os._exit, 7)], 60.0)
    assert crashed.startswith("BrokenProcessPool: ")
    assert compilers.compile_beside([partial((tmp_path / "next").touch)], 60.0) == ["ended"]
    assert (tmp_path / "next").exists()
    compilers.dismiss()
    assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("without_torch")
def test_a_process_that_crashes_takes_its_own_work_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)  # two processes
    third = tmp_path / "third"
    # Still running when the first crashes: it ends when the third does, which is begun after that.
    second = f"import os, time\nwhile not os.path.exists({str(third)!r}): time.sleep(0.01)"
    work = [partial(os._exit, 7), partial(exec, second), partial(third.touch)]
    crashed, *others = compilers.compile_beside(work, 60.0)
    compilers.dismiss()
    assert crashed.startswith("BrokenProcessPool: ")
    assert others == ["ended", "ended"]
