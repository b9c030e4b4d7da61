"""What all suites share: where they find each other, the machine's ceilings, and raw JSON of every run.

Without an option that says otherwise each run is saved under .benchmarks/, timings, versions, commit and
ceilings included. `--benchmark-json FILE` names a place.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent)]

import torch  # noqa: E402
from machine import ceilings, commit, copy_seconds, hardware, versions  # noqa: E402

from ict_fast.training.launch import configure_torch  # noqa: E402

Record = Callable[..., None]


def pytest_configure(config: pytest.Config) -> None:
    # Before pytest-benchmark reads them: a run whose figures are lost was for nothing.
    options = config.option
    if getattr(options, "benchmark_json", None) is None and not getattr(options, "benchmark_save", None):
        options.benchmark_autosave = getattr(options, "benchmark_autosave", None) or "suite"
        options.benchmark_save_data = True
    configure_torch(torch.device("cuda" if torch.cuda.is_available() else "cpu"), deterministic=False)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Leaves out what names a machine instead of describing it."""
    for name in ("node", "release"):
        machine_info.pop(name, None)
    cpu = machine_info.get("cpu") or {}
    machine_info["cpu"] = {name: cpu[name] for name in ("brand_raw", "count", "arch") if name in cpu}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    for name in ("project", "branch"):
        output_json.get("commit_info", {}).pop(name, None)
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    output_json["ict_fast"] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "ceilings": {kind: ceilings(kind) for kind in kinds},
    }


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The GPU; its memory is given back after each test."""
    if not torch.cuda.is_available():
        pytest.skip(f"{request.node.name}: needs an NVIDIA GPU")
    yield torch.device("cuda")
    torch.cuda.empty_cache()


@pytest.fixture
def record(benchmark: Any) -> Record:
    """Writes a figure's meaning beside it: what it is compared with, and its share of the machine's
    ceilings."""

    def write(
        *,
        op: str,
        variant: str,
        baseline: str,
        minimum_bytes: float | None = None,
        flops: float | None = None,
        images: int | None = None,
        dtype: str = "fp32",
        device: str = "cpu",
        **facts: Any,
    ) -> None:
        """
        Args:
            op: what is measured; contestants of the same op are compared.
            variant: whose way of doing it; baseline: the variant to compare with.
            minimum_bytes: that any way must read and write.
            flops: matrix FLOPs, 2 per multiply-add.
            images: that one round handles.
            dtype: of the matrix products.
        """
        seconds = benchmark.stats.stats.median
        found: dict[str, Any] = {"op": op, "variant": variant, "baseline": baseline, "ms": 1e3 * seconds}
        if minimum_bytes:
            large = minimum_bytes / ceilings(device)["copy_gb_per_s"] / 1e9
            copy = copy_seconds(int(minimum_bytes)) if device == "cpu" and minimum_bytes < 2**28 else large
            found |= {
                "minimum_bytes": int(minimum_bytes),
                "gb_per_s": minimum_bytes / seconds / 1e9,
                "percent_of_copy": 100 * copy / seconds,
            }
        if flops:
            rate = ceilings(device)["matrix_tflop_per_s"][dtype]
            found |= {
                "flops": int(flops),
                "tflop_per_s": flops / seconds / 1e12,
                "percent_of_matrix_rate": 100 * flops / seconds / 1e12 / rate,
            }
        if images:
            found["images_per_second"] = images / seconds
        benchmark.extra_info.update(found | facts)

    return write
