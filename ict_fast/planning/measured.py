"""Measured throughputs, in place of an assumption: what `benchmarks/run_gpu.py --part step` leaves.

The contract: a file `step-*.json` with `part` "step", `hardware.gpu` (the name that CUDA gives) and
`results`, a list; of these, each that has `preset`, `precision`, `batch_size` and `images_per_second` is the
rate of whole training steps on one such GPU. `date`, in ISO 8601, says which of several files is the newest;
one without it is older than all that have one. Anything else in the file is not read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_HALVES = ("auto", "bf16", "fp16")


@dataclass(frozen=True)
class Measured:
    """A rate of one GPU.

    Attributes:
        images_per_second: of whole training steps.
        batch_size: images per step, on the one GPU.
        gpu: its name, as CUDA gives it.
        file: where it was found.
    """

    images_per_second: float
    batch_size: int
    gpu: str
    file: str


def best_measured(folder: Path, preset: str, gpu: str, precision: str) -> Measured | None:
    """The highest rate measured for a preset, if any, in the newest file that has one: older code is not run.

    Args:
        folder: of the JSON; it need not exist.
        preset: its name.
        gpu: "a100", "h100", "h200": part of the name that CUDA gives.
        precision: that of the plan; the half precisions, equally fast, count as one.
    """
    alike = _HALVES if precision in _HALVES else (precision,)
    found = [
        (date, Measured(float(result["images_per_second"]), int(result["batch_size"]), name, path.name))
        for path in sorted(folder.glob("step-*.json"))
        for date, name, result in _results(path)
        if _is_kind(gpu, name) and result["preset"] == preset and result["precision"] in alike
    ]
    if not found:
        return None
    _, newest = max(found, key=lambda each: (each[0], each[1].file))
    of_newest = [measured for _, measured in found if measured.file == newest.file]
    return max(of_newest, key=lambda each: each.images_per_second)


def _is_kind(gpu: str, name: str) -> bool:
    """Whether it is the SXM version, alone: H100 PCIe and NVL, GH200, parts of a GPU have other rates."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return gpu in words and not {"pcie", "nvl", "mig"} & set(words)


def _results(path: Path) -> Iterator[tuple[datetime, str, dict[str, Any]]]:
    """Date, GPU and result, of those that keep the contract."""
    try:
        report = json.loads(path.read_text())
        if report["part"] != "step" or not isinstance(gpu := report["hardware"]["gpu"], str):
            return
        results = list(report["results"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    for result in results:
        if (
            isinstance(result, dict)
            and isinstance(result.get("preset"), str)
            and isinstance(result.get("precision"), str)
            and _is_positive(result.get("batch_size"))
            and _is_positive(result.get("images_per_second"))
        ):
            yield _date(report.get("date")), gpu, result


def _date(stated: Any) -> datetime:
    """The oldest of all for what is no date; one without a time zone is taken for UTC's."""
    try:
        date = datetime.fromisoformat(stated)
    except (TypeError, ValueError):
        date = datetime.min
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf
