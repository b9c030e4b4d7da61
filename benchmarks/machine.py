"""The machine that is measured: what it is, what runs on it, and how fast it copies and multiplies at
best."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import itertools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
_VERSIONS_OF = ("torch", "triton", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
# Four times a CPU's caches, and on a GPU forty times L2.
_COPIED_BYTES = {"cpu": 2**28, "cuda": 2**32}
_MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
_DTYPES = {
    "cpu": {"fp32": torch.float32},
    "cuda": {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32},
}


def hardware() -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    described: dict[str, Any] = {"cpu": cpu_name(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        described |= {
            "gpu": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks": clocks(),
        }
    return described


def cpu_name() -> str:
    """The processor's model, as the kernel has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def clocks() -> str | None:
    """The GPU's clocks, temperature and power, as nvidia-smi gives them now."""
    fields = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.draw"
    return output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv")


def versions() -> dict[str, str | None]:
    """Versions of what was measured; None where it is absent."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in _VERSIONS_OF:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """What ICT_FAST_COMMIT says: files copied to another machine may lie on an older checkout there.

    Without it the commit that is checked out, with `-dirty` where files differ from it; None without git's.
    """
    said = os.environ.get("ICT_FAST_COMMIT")
    return said or output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty")


@functools.cache
def kernel_sources() -> str:
    """A digest of ict_kernels' code: whether what was measured is what is here, with or without git."""
    return digest_of_code(ROOT / "kernels/ict_kernels")


def digest_of_code(folder: Path) -> str:
    """Of its Python files, but for docstrings, blank lines and those of comments alone."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update("\n".join([path.name, *_lines_of_code(path.read_text())]).encode() + b"\0")
    return digest.hexdigest()[:16]


def _lines_of_code(source: str) -> Iterator[str]:
    said: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            said.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    for number, line in enumerate(source.splitlines(), 1):
        if number not in said and line.strip() and not line.lstrip().startswith("#"):
            yield line


def output_of(*command: str) -> str | None:
    """What a command prints, or None if it cannot run or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def absent(*packages: str) -> list[str]:
    """Those of the packages that cannot be imported here."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of a call, until the device has done what it asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def median_seconds(run: Callable[[], object], device: torch.device, rounds: int = 9) -> float:
    """The median of some calls, after two that warm up."""
    for _ in range(2):
        run()
    return statistics.median(seconds_of(run, device) for _ in range(rounds))


# A GPU's clock takes a while to settle under load.
_WARM_UP_SECONDS, _PRODUCTS = 0.5, 20


def matrix_tflop_per_s(a: torch.Tensor, b: torch.Tensor) -> float:
    """The rate of the product of two square matrices, 2 per multiply-add; on a GPU with a settled clock."""
    work = 2 * len(a) ** 3 / 1e12
    if a.device.type != "cuda":
        return work / median_seconds(lambda: a @ b, a.device, 5)
    started = time.perf_counter()
    while time.perf_counter() - started < _WARM_UP_SECONDS:
        a @ b
        torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(_PRODUCTS + 1)]
    events[0].record()
    for event in events[1:]:
        a @ b
        event.record()
    torch.cuda.synchronize()
    return work / statistics.median(x.elapsed_time(y) / 1e3 for x, y in itertools.pairwise(events))


@functools.cache
def ceilings(kind: str) -> dict[str, Any]:
    """The two rates that results are compared with, measured: a large copy, and a large matrix product.

    On a CPU oneDNN's convolutions exceed the latter: they were 1.3 to 1.9 times as fast.

    Args:
        kind: "cpu" or "cuda".
    Returns:
        copy_gb_per_s, of bytes read plus bytes written; matrix_tflop_per_s by dtype, of random data, 2 per
        multiply-add. fp32 is IEEE: the network's ends must not be TF32.
    """
    device = torch.device(kind)
    source = torch.empty(_COPIED_BYTES[kind] // 8, device=device).uniform_()
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), device)
    rates = {}
    size = _MATRIX_SIZE[kind]
    for name, dtype in _DTYPES[kind].items():
        a, b = (torch.empty(size, size, device=device).normal_().to(dtype) for _ in range(2))
        rates[name] = matrix_tflop_per_s(a, b)
    return {
        "copy_gb_per_s": _COPIED_BYTES[kind] / copy / 1e9,
        "copied_bytes": _COPIED_BYTES[kind],
        "matrix_tflop_per_s": rates,
        "matrix_size": size,
    }


@functools.cache
def copy_seconds(moved: int) -> float:
    """The time of a copy on the CPU that reads and writes so many bytes together."""
    source = torch.ones(max(1, moved // 8))
    target = torch.empty_like(source)
    return median_seconds(lambda: target.copy_(source), torch.device("cpu"), 15)
